"""Every measure of an evaluation with all that a reader must know to compare it: as a dict, a table and a file."""

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from nanodiffusion import __version__, show
from nanodiffusion.cli.evaluate.reference import Reference
from nanodiffusion.cli.evaluate.task import LEAST, Task
from nanodiffusion.evaluate import statistics as stats
from nanodiffusion.evaluate.images import Images
from nanodiffusion.evaluate.scores import Score, Sides, called, scores
from nanodiffusion.evaluate.statistics import Statistics


def measure(task: Task, samples: Images, reference: Reference, metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Every measure, and all that a reader must know to compare it."""
    start = time.perf_counter()
    features, samples = reference.features, samples.in_colour(reference.images)
    if "save" in task.options:
        stats.save(Path(task.options["save"]), reference.statistics)
    x = features(samples, task.get("batch", 64))
    sides = Sides(x, samples.labels, reference.statistics, samples.classes)
    found = scores(sides, task.metrics or metrics)
    return {
        "metrics": {called(k, features.name, features.published): as_dict(v) for k, v in found.items()},
        "samples": {
            **{"name": samples.name, "n": samples.n, "sha256": samples.sha256, "shape": list(samples.shape)},
            **samples.about,
        },
        "reference": {"name": reference.name, "n": reference.statistics.n, **reference.told},
        "features": {"name": features.name, "sha256": features.sha256, "resize": features.resize, "dim": features.dim},
        "pairwise": pairwise(len(x), reference.statistics),
        "notes": _notes(task, samples, reference),
        "versions": {
            "nanodiffusion": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "device": str(task.device),
        "seconds": round(time.perf_counter() - start, 2),
    }


def pairwise(n: int, reference: Statistics) -> dict[str, int]:
    """How many features of each side kernel, precision, recall, density and coverage compare, and what chooses them of n."""
    held = 0 if reference.examples is None else len(reference.examples)
    return {"samples": min(n, stats.EXAMPLES), "reference": held, "seed": stats.SEED}


def as_dict(score: Score) -> dict[str, Any]:
    """A score without what it has not."""
    return {k: v for k, v in score._asdict().items() if v not in (None, "")}


def _notes(task: Task, samples: Images, reference: Reference) -> list[str]:
    notes = list(reference.notes)
    n = reference.statistics.n
    if min(samples.n, n or LEAST) < LEAST:
        notes.append(f"fewer than {LEAST} images: not comparable")
    if not reference.features.published:
        notes.append("these features are not the published Inception's: this is no FID")
    if reference.images and reference.images.shape != samples.shape:
        notes.append(f"samples are {samples.shape}, the reference is {reference.images.shape}")
    return notes


def table(row: Mapping[str, Any]) -> Iterator[str]:
    """What a person reads."""
    samples, reference, features = row["samples"], row["reference"], row["features"]
    yield f"samples     {samples['name']}, {samples['n']} images"
    yield f"reference   {reference['name']}, {reference['n'] or 'unknown number of'} images"
    how = f", resize {features['resize']}" if features["resize"] else ""
    yield f"features    {features['name']}{how}, {features['dim']} numbers, weights {features['sha256'][:16] or 'none'}"
    width = max(map(len, row["metrics"]))
    for name, score in row["metrics"].items():
        limits = f"[{score['low']:.5g}, {score['high']:.5g}]  {score['interval']}" if "low" in score else ""
        yield f"  {name:{width}}  {score['value']:<10.5g} {limits}"
    for note in row["notes"]:
        yield f"note: {note}"


def write(task: Task, row: Mapping[str, Any], suffix: str = "") -> Path:
    """The JSON beside what was evaluated, or where out= says."""
    where = Path(task.where)
    where = where.resolve() if where.name in ("", "..") else where  # "." has a name too
    own = where / f"evaluation{suffix}.json" if task.is_run else where.with_name(f"{where.name}.evaluation.json")
    path = Path(task.options["out"]) if "out" in task.options else own
    with show.atomic(path) as part:
        part.write_text(json.dumps(row, indent=1, allow_nan=False) + "\n")
    return path
