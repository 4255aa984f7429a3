"""metrics.jsonl and the trackers beside it; none of them may ever stop a run."""

import errno
import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import POINTS, make_runner, rows

from nanodiffusion import tracking
from nanodiffusion.errors import UserError
from nanodiffusion.tracking import Metrics, open_trackers
from nanodiffusion.train import Step

RUN = {**POINTS, "steps": 8, "log_every": 2, "validate_every": 4, "validation": 0.2}


def strict(line: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""
    return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_metrics_are_whole_lines_at_once(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    metrics({"step": 1, "loss": 0.5})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'  # before it is closed
    metrics.close()


def test_metrics_stay_json_whatever_the_numbers(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    metrics({"step": 1, "loss": math.nan, "a": math.inf, "b": [1.0, -math.inf], "c": "text"})
    assert strict((tmp_path / "m.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "a": None,
        "b": [1.0, None],
        "c": "text",
    }


def test_metrics_beyond_the_step_and_broken_lines_are_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\0\0\0\n[3]\n{"stop": 4}\n{"step": 3}\n\xff\xfe\n{"step": 2, "cut\xff')
    Metrics(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_metrics_that_cannot_be_written_are_one_message(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "m.jsonl", 0)

    def full(text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "file", SimpleNamespace(write=full))
    with pytest.raises(UserError, match="No space left"):
        metrics({"step": 1})
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write metrics"):
        Metrics(tmp_path / "folder.jsonl", 0)


def scalars(folder: Path) -> set[tuple[int, str, float]]:
    """The scalars of metrics.jsonl: (step, key, value)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(r["step"], k, v) for r in lines for k, v in r.items() if k != "step" and not isinstance(v, list)}


def test_tensorboard_holds_every_scalar(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_runner(tmp_path, RUN, trackers=["tensorboard"]).run()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    found = {(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    expected = scalars(tmp_path / "run")
    assert {f[:2] for f in found} == {e[:2] for e in expected}
    values = {f[:2]: f[2] for f in found}
    assert all(values[step, key] == pytest.approx(value, rel=1e-6) for step, key, value in expected)  # kept as fp32


def test_tensorboard_shows_a_step_of_a_killed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stands_at, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):  # killed after 4, its last checkpoint at 2
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {}, stands_at)
        for step in steps:
            tracker.log({"step": step, "loss": 10 * stands_at + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


# -- mlflow ------------------------------------------------------------------------------------------------------------

SWEEP = {"a": 0.01, "b": 0.02}  # learning rates by the name of the run


def stop(step: Step) -> None:
    if step.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def mlflow_runs(tmp_path_factory) -> dict[str, Any]:
    """Two runs of a sweep in one process, the first of them stopped and resumed; read back by MLflow's own client."""
    import mlflow

    out, options = tmp_path_factory.mktemp("mlflow"), {**RUN, "trackers": ["mlflow"], "sample_every": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(out)  # where mlflow would put what it is not told the place of
        first = make_runner(out, options, name="a", lr=SWEEP["a"])
        first.close(first.run(stop))
        client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("nanodiffusion").experiment_id
        stopped = [(run.info.run_name, run.info.status) for run in client.search_runs([experiment])]
        for name, lr in SWEEP.items():
            runner = make_runner(out, options, name=name, lr=lr)
            runner.close(runner.run())
        made = sorted(path.name for path in out.iterdir())
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    return {"out": out, "client": client, "runs": runs, "stopped": stopped, "made": made}


def test_mlflow_shows_all_runs_of_a_folder_a_resumed_one_once(mlflow_runs):
    client, runs = mlflow_runs["client"], mlflow_runs["runs"]
    assert mlflow_runs["stopped"] == [("a", "KILLED")]
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(SWEEP, "FINISHED")
    assert len(client.search_runs([runs["a"].info.experiment_id])) == 2
    assert mlflow_runs["made"] == ["a", "b", "mlflow-artifacts", "mlflow.db"]


@pytest.mark.parametrize("name", SWEEP)
def test_mlflow_holds_every_scalar_of_every_row(mlflow_runs, name):
    client, run = mlflow_runs["client"], mlflow_runs["runs"][name].info.run_id
    lines = [json.loads(line) for line in (mlflow_runs["out"] / name / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], k, v) for r in lines for k, v in r.items() if k != "step" and not isinstance(v, list)]
    keys = client.get_run(run).data.metrics
    found = [(m.step, m.key, m.value) for key in keys for m in client.get_metric_history(run, key)]
    assert sorted(found) == sorted(expected)  # each once, to the last digit
    assert {step for step, key, _ in found if key == "loss"} == {2, 4, 6, 8}


@pytest.mark.parametrize("name", SWEEP)
def test_mlflow_holds_the_config_and_the_pictures(mlflow_runs, name):
    client, run, folder = mlflow_runs["client"], mlflow_runs["runs"][name], mlflow_runs["out"] / name
    params, config = run.data.params, json.loads((folder / "config.json").read_text())
    assert (
        params["lr"] == str(SWEEP[name]) and params["net.hidden"] == "[16, 16]" and params["data.name"] == "swiss-roll"
    )
    assert {key.split(".")[0] for key in params} == config.keys()
    artifacts = Path(client.download_artifacts(run.info.run_id, ""))
    assert json.loads((artifacts / "config.json").read_text()) == config
    pictures = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    assert len(pictures) == 4 and {p.name: p.read_bytes() for p in (artifacts / "samples").iterdir()} == pictures


def fake(monkeypatch, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**functions))


def test_wandb_receives_every_scalar_and_the_config(tmp_path, monkeypatch):
    seen, given = set(), {}

    def log(row: dict[str, float], step: int) -> None:
        seen.update((step, k, v) for k, v in row.items())

    def init(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(log=log)

    fake(monkeypatch, init=init)
    make_runner(tmp_path, RUN, trackers=["wandb"]).run()
    assert seen == scalars(tmp_path / "run")
    assert given["name"] == "run" and given["config"]["batch_size"] == POINTS["batch_size"]
    assert given["dir"] == str(tmp_path / "run")


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    given = []
    fake(monkeypatch, init=lambda **options: given.append(options))
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        open_trackers(["wandb"], tmp_path / folder, {"name": folder})
    (tmp_path / "b" / "wandb.json").write_text("rubbish")
    open_trackers(["wandb"], tmp_path / "b", {"name": "b"})
    ids = [options["id"] for options in given]
    assert ids[0] == ids[1] and len(set(ids)) == 3 and {options["resume"] for options in given} == {"allow"}


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capsys):
    calls = []

    def log(row: dict[str, float], step: int) -> None:
        calls.append(step)
        raise ConnectionError("no network")

    fake(monkeypatch, init=lambda **_: SimpleNamespace(log=log))
    assert make_runner(tmp_path, RUN, trackers=["wandb"]).run() == "done"
    assert calls == [2]
    assert capsys.readouterr().err == "tracker wandb failed and is off from here: ConnectionError: no network\n"
    assert [r["step"] for r in rows(tmp_path / "run")] == [2, 4, 4, 6, 8, 8]


def test_a_tracker_that_does_not_open_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capsys):
    def init(**_: Any) -> None:
        raise PermissionError("not logged in")

    fake(monkeypatch, init=init)
    assert make_runner(tmp_path, RUN, trackers=["wandb"]).run() == "done"
    assert capsys.readouterr().err == "tracker wandb failed and is off from here: PermissionError: not logged in\n"


def test_a_failing_tracker_takes_no_other_with_it(tmp_path, monkeypatch):
    seen = []
    good, bad = SimpleNamespace(log=seen.append), SimpleNamespace(log=lambda row: 1 / 0)
    monkeypatch.setitem(tracking.TRACKERS, "good", lambda *_: good)
    monkeypatch.setitem(tracking.TRACKERS, "bad", lambda *_: bad)
    make_runner(tmp_path, RUN, trackers=["bad", "good"]).run()
    assert [row["step"] for row in seen] == [2, 4, 4, 6, 8, 8]


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        make_runner(tmp_path, RUN, trackers=["tensorbord"])
    assert not (tmp_path / "run/checkpoint").exists()


def test_an_unknown_tracker_is_refused_before_another_one_opens(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setitem(tracking.TRACKERS, "good", lambda *_: opened.append(1))
    with pytest.raises(UserError):
        open_trackers(["good", "bad"], tmp_path, {})
    assert opened == []


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    with pytest.raises(UserError, match=r"nanodiffusion\[wandb\]"):
        make_runner(tmp_path, RUN, trackers=["wandb"])
