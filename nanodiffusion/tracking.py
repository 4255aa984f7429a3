"""Where numbers go while a run trains: metrics.jsonl always, and any of tensorboard, mlflow, wandb beside it.

A tracker's error is said once and never stops a run.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanodiffusion.errors import lookup, need

Row = Mapping[str, Any]
Log = Callable[[Row], None]


class Metrics:
    """metrics.jsonl: one JSON object a line, each with its "step"; appended and flushed row by row."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for a run that stands at `step`: rows beyond it (written after the last checkpoint) are dropped."""
        self.path = path
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = path.open("a")

    def __call__(self, row: Row) -> None:
        self.file.write(json.dumps(dict(row)) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


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
    client = need("mlflow", "mlflow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        client.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    client.set_experiment("nanodiffusion")
    client.start_run(run_name=config["name"])
    client.log_params({k: str(v)[:500] for k, v in config.items()})
    return lambda row: client.log_metrics(_scalars(row), step=row["step"])


def wandb(folder: Path, config: dict[str, Any]) -> Log:
    """A Weights & Biases run; WANDB_MODE=offline works without a network."""
    run = need("wandb", "wandb").init(project="nanodiffusion", name=config["name"], dir=str(folder), config=config)
    return lambda row: run.log(_scalars(row), step=row["step"])


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Log]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
}


def _forgiving(name: str, log: Log) -> Log:
    failed = False

    def wrapped(row: Row) -> None:
        nonlocal failed
        if failed:
            return
        try:
            log(row)
        except Exception as e:  # a tracker is never worth a run
            failed = True
            print(f"tracker {name} failed and is off from here: {type(e).__name__}: {e}", file=sys.stderr)

    return wrapped


def open_trackers(names: list[str], folder: Path, config: dict[str, Any]) -> list[Log]:
    """The named trackers, each guarded. UserError for an unknown name or a missing package, before training starts."""
    return [_forgiving(n, lookup(TRACKERS, n, "trackers")(folder, config)) for n in names]
