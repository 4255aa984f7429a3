"""What samples are held against, and the features by which both sides are seen."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from nanodiffusion.cli.convert import Order, unpickle
from nanodiffusion.cli.evaluate.task import Task, enough
from nanodiffusion.data import DATASETS, load_data
from nanodiffusion.data.download import cache_dir, content
from nanodiffusion.errors import UserError, nearest
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
from nanodiffusion.evaluate.statistics import Statistics
from nanodiffusion.run import Run
from nanodiffusion.tensors import load_tensors

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
