"""Where numbers and pictures go while a run trains: metrics.jsonl always, and any of tensorboard, mlflow, wandb beside it.

A tracker's error is said once and never stops a run.
"""

import atexit
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nanodiffusion.errors import UserError, lookup, need

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Another home of a run's rows and pictures."""

    def log(self, row: Row) -> None:
        """The scalars of a row, at its "step"."""
        ...

    def image(self, path: Path, step: int) -> None:
        """A picture of the run's folder."""
        ...

    def close(self, reason: str) -> None:
        """No more will come: why the run ended, "done", "patience", "time" or "signal"."""
        ...


Open = Callable[[Path, dict[str, Any], int], Tracker]  # the run's folder, its config, the step where it stands


class Metrics:
    """metrics.jsonl: one JSON object a line, each with its "step"; appended and flushed row by row."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for a run that stands at `step`: rows beyond it (written after the last checkpoint) are dropped."""
        self.path = path
        with self._errors():
            rows = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
            kept = [row for row in rows if _belongs(row, step)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept), "utf-8")
            os.replace(temporary, path)
            self.file = path.open("a")

    def __call__(self, row: Row) -> None:
        """Append a row; a number that is not finite becomes null, for which JSON has no other word."""
        text = json.dumps({k: _finite(v) for k, v in row.items()}, allow_nan=False)
        with self._errors():
            self.file.write(text + "\n")
            self.file.flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError("cannot write metrics", file=self.path, found=e.strerror or str(e)) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _belongs(row: str, step: int) -> bool:
    """Whether a line is whole and not beyond `step`; a crash of the machine may leave rubbish."""
    try:
        return row.endswith("\n") and json.loads(row)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(row: Row) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}


def picture_name(path: Path) -> str:
    """samples/step-00000100-ema.png is a picture of the series samples/ema; any other is one by itself."""
    kind = path.stem.rpartition("-")[2]
    return f"samples/{kind}" if path.parent.name == "samples" else path.stem


class TensorBoard:
    """Scalars and pictures into `folder`/tensorboard; those beyond `step`, of a run that was killed, are shown no more."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        need("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", json.dumps(config, indent=1))

    def log(self, row: Row) -> None:
        """The scalars of a row."""
        for k, v in _scalars(row).items():
            self.writer.add_scalar(k, v, row["step"])
        self.writer.flush()

    def image(self, path: Path, step: int) -> None:
        """A picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.writer.add_image(picture_name(path), pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self, reason: str) -> None:
        """Close the file."""
        self.writer.close()


STATUS = {"done": "FINISHED", "patience": "FINISHED", "time": "FINISHED", "signal": "KILLED"}
BATCH = 100  # params that MLflow takes at once
LONGEST = 500  # letters of one


class MLflow:
    """A run in the experiment "nanodiffusion" of MLFLOW_TRACKING_URI, else of `out`/mlflow.db, which all runs of `out` share.

    `folder`/mlflow.json says which, so that a run that is resumed goes on there. MLflow forgets no row: those that a killed
    run wrote after its last checkpoint are there twice, equal but for times.
    `mlflow server --backend-store-uri sqlite:///runs/mlflow.db` shows them.
    """

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        package, self.entities = need("mlflow", "mlflow"), need("mlflow.entities", "mlflow")
        home = Path(config["out"]).resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
        # A client of our own: mlflow's global run and URI would be the first run's for all of a sweep.
        self.client = package.MlflowClient(uri)
        artifacts = None if "MLFLOW_TRACKING_URI" in os.environ else (home / "mlflow-artifacts").as_uri()
        self.run = self._resumed(folder / "mlflow.json", uri) or self._new(config, artifacts)
        (folder / "mlflow.json").write_text(json.dumps({"uri": uri, "run": self.run}))
        self.client.log_artifact(self.run, str(folder / "config.json"))
        atexit.register(self.close, "signal")  # of a run that fails: no more comes

    def _resumed(self, known: Path, uri: str) -> str | None:
        """The run that this folder's rows went to before, if it is still there."""
        try:
            said = json.loads(known.read_text())
            run = self.client.get_run(said["run"]).info.run_id if said["uri"] == uri else None
        except Exception:  # no file, rubbish, or a store that knows no such run
            return None
        if run:
            self.client.update_run(run, status="RUNNING")
        return run

    def _new(self, config: dict[str, Any], artifacts: str | None) -> str:
        known = self.client.get_experiment_by_name("nanodiffusion")
        experiment = known.experiment_id if known else self.client.create_experiment("nanodiffusion", artifacts)
        run = self.client.create_run(experiment, run_name=config["name"]).info.run_id
        params = [self.entities.Param(k, str(v)[:LONGEST]) for k, v in flat(config)]
        for i in range(0, len(params), BATCH):
            self.client.log_batch(run, params=params[i : i + BATCH])
        return run

    def log(self, row: Row) -> None:
        """The scalars of a row."""
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(k, v, now, row["step"]) for k, v in _scalars(row).items()]
        self.client.log_batch(self.run, metrics)

    def image(self, path: Path, step: int) -> None:
        """A picture, as an artifact."""
        self.client.log_artifact(self.run, str(path), "samples")

    def close(self, reason: str) -> None:
        """The run's end and its status."""
        atexit.unregister(self.close)
        self.client.set_terminated(self.run, STATUS[reason])


def flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as (a.b.c, value) pairs."""
    if not isinstance(tree, Mapping) or (not tree and prefix):
        return [(prefix, tree)]
    return [pair for k, v in tree.items() for pair in flat(v, f"{prefix}.{k}" if prefix else str(k))]


class WandB:
    """A Weights & Biases run; WANDB_MODE=offline works without a network.

    `folder`/wandb.json says which, so that a run that is resumed goes on there; W&B ignores the rows it has already.
    """

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        self.package = need("wandb", "wandb")
        options = {"project": "nanodiffusion", "name": config["name"], "dir": str(folder)}
        options |= {"id": _wandb_id(folder / "wandb.json"), "resume": "allow"}
        self.run = self.package.init(**options, config=config, reinit=True)

    def log(self, row: Row) -> None:
        """The scalars of a row."""
        self.run.log(_scalars(row), step=row["step"])

    def image(self, path: Path, step: int) -> None:
        """A picture."""
        self.run.log({picture_name(path): self.package.Image(str(path))}, step=step)

    def close(self, reason: str) -> None:
        """The run's end."""
        self.run.finish(exit_code=int(reason == "signal"))


def _wandb_id(known: Path) -> str:
    """The run that this folder's rows went to before, or a new one."""
    try:
        return str(json.loads(known.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):  # no file, or rubbish
        new = uuid.uuid4().hex[:16]
        known.write_text(json.dumps({"id": new}))
        return new


TRACKERS: dict[str, Open] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class Forgiving:
    """A tracker that goes quiet, saying so once, when opening it or anything that it is told fails."""

    def __init__(self, name: str, opener: Open, folder: Path, config: dict[str, Any], step: int) -> None:
        self.name, self.tracker = name, None
        self._guarded(lambda: setattr(self, "tracker", opener(folder, config, step)))

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except UserError:
            raise
        except Exception as e:  # no login, no network: a tracker is never worth a run
            self.tracker = None
            print(f"tracker {self.name} failed and is off from here: {type(e).__name__}: {e}", file=sys.stderr)

    def log(self, row: Row) -> None:
        """A row."""
        if tracker := self.tracker:
            self._guarded(lambda: tracker.log(row))

    def image(self, path: Path, step: int) -> None:
        """A picture."""
        if tracker := self.tracker:
            self._guarded(lambda: tracker.image(path, step))

    def close(self, reason: str = "done") -> None:
        """The end; more is not heard."""
        tracker, self.tracker = self.tracker, None
        if tracker:
            self._guarded(lambda: tracker.close(reason))


def open_trackers(names: list[str], folder: Path, config: dict[str, Any], step: int = 0) -> list[Forgiving]:
    """The named trackers, each guarded, for a run that stands at `step`.

    UserError for an unknown name or a missing package, before training starts.
    """
    rows = [(n, lookup(TRACKERS, n, "trackers")) for n in names]
    return [Forgiving(n, row, folder, config, step) for n, row in rows]
