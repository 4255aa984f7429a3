"""Where numbers go while a run trains: metrics.jsonl always, and any of tensorboard, mlflow, wandb beside it.

A tracker's error is said once and never stops a run.
"""

import atexit
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nanodiffusion.errors import UserError, lookup, need

Row = Mapping[str, Any]
Log = Callable[[Row], None]


class Metrics:
    """metrics.jsonl: one JSON object a line, each with its "step"; appended and flushed row by row."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for a run that stands at `step`: rows beyond it (written after the last checkpoint) are dropped."""
        self.path = path
        with self._errors():
            rows = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [row for row in rows if _belongs(row, step)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
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


def tensorboard(folder: Path, config: dict[str, Any]) -> Log:
    """Scalars into `folder`/tensorboard."""
    need("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", json.dumps(config, indent=1))

    def log(row: Row) -> None:
        for k, v in _scalars(row).items():
            writer.add_scalar(k, v, row["step"])
        writer.flush()

    return log


def mlflow(folder: Path, config: dict[str, Any]) -> Log:
    """Metrics to MLFLOW_TRACKING_URI, else to the explicit sqlite store `folder`/mlflow.db."""
    package = need("mlflow", "mlflow")
    # A client of our own: mlflow's global run and URI would be the first run's for all of a sweep.
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    client = package.MlflowClient(uri)
    known = client.get_experiment_by_name("nanodiffusion")
    experiment = known.experiment_id if known else client.create_experiment("nanodiffusion")
    run = client.create_run(experiment, run_name=config["name"]).info.run_id
    atexit.register(client.set_terminated, run)
    entities = need("mlflow.entities", "mlflow")
    client.log_batch(run, params=[entities.Param(k, str(v)[:500]) for k, v in config.items()])

    def log(row: Row) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, [entities.Metric(k, v, now, row["step"]) for k, v in _scalars(row).items()])

    return log


def wandb(folder: Path, config: dict[str, Any]) -> Log:
    """A Weights & Biases run; WANDB_MODE=offline works without a network."""
    wandb = need("wandb", "wandb")
    run = wandb.init(project="nanodiffusion", name=config["name"], dir=str(folder), config=config, reinit=True)
    return lambda row: run.log(_scalars(row), step=row["step"])


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Log]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
}


def _forgiving(name: str, open_log: Callable[[], Log]) -> Log:
    """A tracker that goes quiet, saying so once, when opening it or logging to it fails."""
    log: Log | None = None

    def off(error: Exception) -> None:
        print(f"tracker {name} failed and is off from here: {type(error).__name__}: {error}", file=sys.stderr)

    def wrapped(row: Row) -> None:
        nonlocal log
        try:
            if log is not None:
                log(row)
        except Exception as e:  # a tracker is never worth a run
            log = None
            off(e)

    try:
        log = open_log()
    except UserError:
        raise
    except Exception as e:  # no login, no network
        off(e)
    return wrapped


def open_trackers(names: list[str], folder: Path, config: dict[str, Any]) -> list[Log]:
    """The named trackers, each guarded. UserError for an unknown name or a missing package, before training starts."""
    rows = [(n, lookup(TRACKERS, n, "trackers")) for n in names]
    return [_forgiving(n, partial(row, folder, config)) for n, row in rows]
