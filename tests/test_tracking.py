"""metrics.jsonl and the trackers beside it; none of them may ever stop a run."""

import errno
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import POINTS, make_runner, rows

from nanodiffusion import tracking
from nanodiffusion.errors import UserError
from nanodiffusion.tracking import Metrics, open_trackers

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
    path.write_text('{"step": 1}\n{"step": 2}\n\0\0\0\n[3]\n{"stop": 4}\n{"step": 3}\n{"step": 2, "cut')
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


@pytest.mark.slow  # the first use of the store creates its tables
def test_mlflow_holds_every_scalar_in_its_sqlite_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    runners = [make_runner(tmp_path / name, RUN, trackers=["mlflow"], lr=lr) for name, lr in (("a", 0.01), ("b", 0.02))]
    for name, runner, lr in zip("ab", runners, ("0.01", "0.02")):  # two of a sweep, in one process
        runner.run()
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / name / 'run/mlflow.db'}")
        experiment = client.get_experiment_by_name("nanodiffusion")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.params["lr"] == lr and run.info.run_name == "run"
        for step, key, value in scalars(tmp_path / name / "run"):
            assert value in [m.value for m in client.get_metric_history(run.info.run_id, key) if m.step == step]


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
    monkeypatch.setitem(tracking.TRACKERS, "good", lambda folder, config: good)
    monkeypatch.setitem(tracking.TRACKERS, "bad", lambda folder, config: bad)
    make_runner(tmp_path, RUN, trackers=["bad", "good"]).run()
    assert [row["step"] for row in seen] == [2, 4, 4, 6, 8, 8]


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        make_runner(tmp_path, RUN, trackers=["tensorbord"])
    assert not (tmp_path / "run/checkpoint").exists()


def test_an_unknown_tracker_is_refused_before_another_one_opens(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setitem(tracking.TRACKERS, "good", lambda folder, config: opened.append(1))
    with pytest.raises(UserError):
        open_trackers(["good", "bad"], tmp_path, {})
    assert opened == []


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    with pytest.raises(UserError, match=r"nanodiffusion\[wandb\]"):
        make_runner(tmp_path, RUN, trackers=["wandb"])
