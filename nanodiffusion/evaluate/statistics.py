"""What is kept of a reference: its moments, and some of its features; as a file that other tools read too, and in a cache."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodiffusion import show
from nanodiffusion.data.download import cache_dir
from nanodiffusion.data.tensors import epoch_order
from nanodiffusion.errors import UserError
from nanodiffusion.evaluate.distances import Moments, from_covariance, moments
from nanodiffusion.evaluate.features import Features
from nanodiffusion.evaluate.images import Images, npz_errors

ARRAYS = ("mu", "sigma", "factor", "examples", "labels")  # of a file; of another program's, the others are not read
EXAMPLES, SEED = 10_000, 0  # features of each side that pairwise measures use, at most; what chooses them


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of all features, and the features (r d) and labels (r) of up to EXAMPLES of them, chosen by a fixed seed."""

    moments: Moments
    examples: Tensor | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)  # data, data_sha256, features, features_sha256, resize

    @property
    def n(self) -> int:
        """How many images; 0 where a file does not say."""
        return self.moments.n


def describe(images: Images, features: Features) -> dict[str, Any]:
    """What statistics are of, and what they may be compared with."""
    return {
        "data": images.name,
        "data_sha256": images.sha256,
        "features": features.name,
        "features_sha256": features.sha256,
        "resize": features.resize,
    }


def chosen(n: int) -> Tensor:
    """Which of n features pairwise measures use: (<= EXAMPLES) int64."""
    return epoch_order(n, SEED, 0)[:EXAMPLES]


def summarise(x: Tensor, images: Images, features: Features) -> Statistics:
    """Of the features x (n d) of images."""
    index = chosen(len(x))
    labels = None if images.labels is None else images.labels[index]
    return Statistics(moments(x), x[index], labels, images.classes, describe(images, features))


def cached(images: Images, features: Features, batch: int = 64) -> Statistics:
    """The statistics of a reference, computed once for its data, features and resizing."""
    about = describe(images, features)
    key = hashlib.sha256(json.dumps({**about, "data": ""}, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_dir() / "evaluate" / f"statistics-{key}.npz"
    if not file.is_file():
        save(file, summarise(features(images, batch), images, features))
    return load(file)


def save(file: Path, found: Statistics) -> None:
    """As .npz: mu and sigma under the names that other tools use, and the rest beside them."""
    m = found.moments
    arrays = {
        "mu": m.mean,
        "sigma": m.covariance,
        "factor": m.factor,
        "examples": found.examples,
        "labels": found.labels,
    }
    numbers = {key: value.numpy() for key, value in arrays.items() if value is not None}
    about = json.dumps({**found.about, "n": m.n, "classes": found.classes})
    with show.atomic(file) as part, open(part, "wb") as out:
        np.savez(out, about=np.array(about), **numbers)


def load(file: Path) -> Statistics:
    """What `save` or another tool wrote. UserError: damaged, no statistics, or numbers that cannot be."""
    with npz_errors(file), np.load(file, allow_pickle=False) as arrays:
        if not {"mu", "sigma"} <= set(arrays.files):
            raise UserError("these are no statistics", file=file, expected="mu, sigma", found=arrays.files[:6])
        about = dict(json.loads(str(arrays["about"]))) if "about" in arrays.files else {}
        tensors = {key: _tensor(arrays[key], key) for key in ARRAYS if key in arrays.files}
    _check_moments(tensors["mu"], tensors["sigma"], file)
    n, classes = int(about.pop("n", 0)), tuple(about.pop("classes", ()))
    factor = tensors.get("factor")
    m = (
        from_covariance(tensors["mu"], tensors["sigma"], n)
        if factor is None
        else Moments(tensors["mu"].double(), factor.double(), n)
    )
    return Statistics(m, tensors.get("examples"), tensors.get("labels"), classes, about)


def _tensor(array: np.ndarray, key: str) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError:  # texts, dates, numbers that torch does not know
        raise ValueError(f"{key} of {array.dtype}") from None


def is_statistics(file: Path) -> bool:
    """Whether an .npz holds moments rather than images."""
    with npz_errors(file), zipfile.ZipFile(file) as archive:
        return "mu.npy" in archive.namelist()


def _check_moments(mu: Tensor, sigma: Tensor, file: Path) -> None:
    expected = "mu (d), sigma (d d), finite"
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        found = f"{tuple(mu.shape)}, {tuple(sigma.shape)}"
        raise UserError("these moments do not fit together", file=file, expected=expected, found=found)
    if not bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise UserError("these moments hold NaN or infinity", file=file, expected=expected)


def check_same(known: Statistics, features: Features, file: object) -> list[str]:
    """What to note where the statistics do not say of which features they are. UserError: they are of other features."""
    dim = len(known.moments.mean)
    about = known.about
    for key, ours in (("features", features.name), ("features_sha256", features.sha256), ("resize", features.resize)):
        if key in about and about[key] != ours and not (key == "features" and about.get("features_sha256")):
            fix = " ".join(f"{name}={about[name]}" for name in ("features", "resize") if about.get(name))
            raise UserError(
                "these are statistics of other features", file=file, key=key, expected=ours, found=about[key], fix=fix
            )
    if dim != features.dim:
        raise UserError("these are statistics of other features", file=file, expected=f"{features.dim}", found=f"{dim}")
    return [] if "features_sha256" in about else ["the reference does not say of which features and resizing it is"]
