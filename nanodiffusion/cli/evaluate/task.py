"""What `evaluate` was asked for: its words, checked, as a Task; and how many images are enough."""

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanodiffusion.cli.runs import refuse_several
from nanodiffusion.cli.sample.conditions import Asked
from nanodiffusion.cli.words import read_options, take_first
from nanodiffusion.distributed import pick_device
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.evaluate.images import Images
from nanodiffusion.evaluate.resize import RESIZES
from nanodiffusion.evaluate.scores import METRICS

LEAST = 2048  # images: below, a covariance of 2048 features has no full rank, and the bias of a distance is large
OF_A_RUN = (*typing.get_type_hints(Asked), "weights", "seed", "curve", "values")


class Options(Asked, total=False):
    """The keys of the command; those of SampleConfig come on top, for a RUN."""

    reference: str
    split: str
    features: str
    resize: str
    n: int
    metrics: list | str
    force: bool
    device: str
    batch: int
    size: int
    save: str
    out: str
    weights: str
    seed: int
    curve: str
    values: list


class Task(NamedTuple):
    """What the command line asks for, checked."""

    where: str
    options: Mapping[str, Any]
    changes: Mapping[str, Any]
    metrics: tuple[str, ...]
    device: torch.device

    def get(self, key: str, default: Any) -> Any:
        """An option, or a default."""
        return self.options.get(key, default)

    @property
    def is_run(self) -> bool:
        """Whether images are drawn rather than read."""
        path = Path(self.where)
        return (path / "state.json").is_file() or (path / "checkpoint").is_dir()


def read_task(words: Sequence[str]) -> Task:
    """The words of the command. UserError: no SAMPLES, unknown keys, metrics, resizes, or numbers that cannot be."""
    expected = "nanodiffusion evaluate SAMPLES reference=REFERENCE key=value ..."
    missing = UserError("evaluate what?", expected=expected, fix="an .npz, a folder of images, or a run")
    where, words = take_first(words, missing)
    options, changes = read_options(words, typing.get_type_hints(Options))
    for key, least in (("n", 1), ("batch", 1), ("size", 0), ("seed", 0)):
        if options.get(key, least) < least:
            raise UserError(f"must be at least {least}", key=key, found=options[key])
    lookup(RESIZES, options.get("resize", "clean"), "resize")
    asked = options.get("metrics", [])
    metrics = tuple(asked if isinstance(asked, list) else [asked])
    for name in metrics:
        lookup(METRICS, name, "metrics")
    task = Task(where, options, changes, metrics, torch.device("cpu"))
    if not task.is_run:
        refuse_several(task.where, "evaluate")
        if odd := [k for k in (*changes, *OF_A_RUN) if k in changes or k in options]:
            raise UserError(f"{odd[0]} is for a run, which draws its images", file=where, key=odd[0])
    return task._replace(device=pick_device(options.get("device", "auto")))


def limited(images: Images, task: Task) -> Images:
    """The first n of them. UserError: fewer than there must be."""
    n = task.get("n", images.n)
    if n > images.n:
        raise UserError(
            "there are not so many images", file=images.name, key="n", expected=f"{images.n} or less", found=n
        )
    enough(images.n and n, images.name, task)
    return images.first(n)


def enough(n: int, name: object, task: Task) -> None:
    """UserError where n images are too few to be measured, unless that is wanted."""
    least = 2 if task.get("force", False) else LEAST
    if n < least:
        fix = "force=true measures them all the same: distances of so few are larger, and not comparable"
        raise UserError("too few images", file=name, expected=f"{least} or more", found=n, fix=None if n < 2 else fix)
