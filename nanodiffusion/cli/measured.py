"""One evaluation: its keys, the features both sides are seen by, the reference, and every measure of it."""

import platform
import tempfile
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import PIL
import torch

from nanodiffusion import __version__
from nanodiffusion.checkpoint import load_tensors
from nanodiffusion.cli.convert import Order, unpickle
from nanodiffusion.cli.words import parse_value, read_pairs
from nanodiffusion.config import SampleConfig, check_options
from nanodiffusion.data import DATASETS, load_data
from nanodiffusion.data.download import cache_dir, content
from nanodiffusion.distributed import pick_device
from nanodiffusion.errors import UserError, lookup, nearest
from nanodiffusion.evaluate import statistics as stats
from nanodiffusion.evaluate.features import (
    INCEPTION,
    OWN,
    Features,
    converted,
    file_features,
    inception_features,
    load_small,
    small_features,
)
from nanodiffusion.evaluate.images import Images, file_hash, of_data, open_images
from nanodiffusion.evaluate.resize import RESIZES
from nanodiffusion.evaluate.scores import METRICS, Score, Sides, called, scores
from nanodiffusion.evaluate.statistics import Statistics
from nanodiffusion.run import Run

LEAST = 2048  # images: below, a covariance of 2048 features has no full rank, and the bias of a distance is large


class Options(TypedDict, total=False):
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


# -- words -------------------------------------------------------------------------------------------------------------


def read_task(words: Sequence[str]) -> Task:
    """The words of the command. UserError: no SAMPLES, unknown keys, metrics, resizes, or numbers that cannot be."""
    if not words or "=" in words[0]:
        expected = "nanodiffusion evaluate SAMPLES reference=REFERENCE key=value ..."
        raise UserError("evaluate what?", expected=expected, fix="an .npz, a folder of images, or a run")
    kinds = typing.get_type_hints(Options)
    ours = {k: v for k, v in typing.get_type_hints(SampleConfig).items() if k not in kinds}
    pairs = read_pairs(words[1:], {**kinds, **ours})
    given = {key: text if kinds.get(key) is str else parse_value(text) for key, text in pairs.items()}
    options = {k: v for k, v in given.items() if k in kinds}
    check_options(options, kinds, "")
    for key, least in (("n", 1), ("batch", 1), ("size", 0), ("seed", 0)):
        if int(given.get(key, least)) < least:
            raise UserError(f"must be at least {least}", key=key, found=given[key])
    lookup(RESIZES, options.get("resize", "clean"), "resize")
    asked = options.get("metrics", [])
    metrics = tuple(asked if isinstance(asked, list) else [asked])
    for name in metrics:
        lookup(METRICS, name, "metrics")
    task = Task(words[0], options, {k: v for k, v in given.items() if k not in kinds}, metrics, torch.device("cpu"))
    if not task.is_run and (odd := [k for k in (*task.changes, "weights", "seed", "curve", "values") if k in given]):
        raise UserError(f"{odd[0]} is for a run, which draws its images", file=words[0], key=odd[0])
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


# -- features ----------------------------------------------------------------------------------------------------------


def open_features(task: Task, images: Images | None, sha256: str | None, shape_of: Images) -> Features:
    """What `features=` names. images: of the reference, None where it is statistics, of features with this SHA-256."""
    name, resize = task.get("features", "inception"), task.get("resize", "clean")
    if name == "inception":
        return inception_features(published_inception(), resize, task.device)
    if name == "small" and images is None:
        return _small_of(sha256, task.device)
    if name in OWN:
        return OWN[name](images or shape_of, task.device)
    path = Path(name)
    if not path.is_file():
        expected = "a name, or a file of weights"
        fix = nearest(name, {"inception", *OWN})
        raise UserError("unknown features", key="features", expected=expected, found=name, fix=fix)
    if path.suffix == ".safetensors":
        return file_features(path, resize, task.device)
    if file_hash(path) != INCEPTION.sha256:
        fix = f"nanodiffusion convert {path.name} {path.stem}.safetensors"
        raise UserError("not the published weights", file=path, expected=INCEPTION.sha256, fix=fix)
    return inception_features(_convert(path), resize, task.device)


def _small_of(sha256: str | None, device: torch.device) -> Features:
    """The small net whose file has that hash, among those that were trained on this machine."""
    for file in sorted((cache_dir() / "evaluate").glob("small-*.safetensors")):
        if file_hash(file) == sha256:
            return small_features("small", load_small(file), file_hash(file), device)
    fix = "features=FILE, or the reference's images"
    raise UserError("the small net of these statistics is not here", key="features", expected=sha256, fix=fix)


def published_inception() -> Path:
    """The published weights as safetensors: from the cache, or downloaded, verified and converted once."""
    file = cache_dir() / "inception" / f"{Path(INCEPTION.name).stem}.safetensors"
    if file.is_file():
        return file
    try:
        content(INCEPTION, "inception")
    except UserError as e:
        fix = "features=small: a net of your own; its distance is no FID. Or put the file there by hand"
        place = cache_dir() / "inception" / INCEPTION.name
        raise UserError(
            "there are no weights of Inception here",
            file=INCEPTION.url,
            expected=place,
            found=e.details["found"],
            fix=fix,
        ) from e
    return _convert(cache_dir() / "inception" / INCEPTION.name)


def _convert(pickle: Path) -> Path:
    """The published pickle, whose hash is known to be right, as safetensors in the cache."""
    file = cache_dir() / "inception" / f"{Path(INCEPTION.name).stem}.safetensors"
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / file.name
        for line in unpickle(Order(pickle, plain), [(pickle, plain)]):
            print(line)
        converted(load_tensors(plain)[0], file)
    return file


# -- the reference -----------------------------------------------------------------------------------------------------


class Reference:
    """What samples are held against: images, or their statistics; and the features of both sides."""

    def __init__(self, task: Task, samples: Images, run: Run | None = None) -> None:
        self.task, self.notes = task, []
        given, split = task.get("reference", None), task.get("split", "train")
        file = Path(given or "")
        self.file = file if file.suffix == ".npz" and file.is_file() and stats.is_statistics(file) else None
        known = stats.load(self.file) if self.file else None
        self.images: Images | None = None
        if known is None:
            images = open_images(given, split, task.get("size", 0)) if given else _of_run(run, split)
            self.images = images.in_colour(samples)
            enough(self.images.n, self.images.name, task)
        sha256 = known.about.get("features_sha256") if known else None
        self.features = open_features(task, self.images, sha256, samples)
        if not self.features.resize and "resize" in task.options:
            self.notes.append("resize is not used by these features")
        self.name = self.images.name if self.images else str(self.file)
        self.statistics = self._statistics(known)

    def _statistics(self, known: Statistics | None) -> Statistics:
        if known is None:
            assert self.images is not None
            return stats.cached(self.images, self.features, self.task.get("batch", 64))
        self.notes += stats.check_same(known, self.features, self.file)
        return known

    @property
    def told(self) -> dict[str, Any]:
        """Its hash, and which part of a data set it is."""
        part = {"split": self.task.get("split", "train")} if self.name in DATASETS else {}
        return {"sha256": self.statistics.about.get("data_sha256"), **part}


def _of_run(run: Run | None, split: str) -> Images:
    """The data that a run was trained on."""
    assert run is not None
    return of_data(load_data(**{**run.config.data, "split": split}), run.config.data["name"])


# -- measuring ---------------------------------------------------------------------------------------------------------


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
