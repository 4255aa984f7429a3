"""Data sets by name. Each has `shape`, `classes`, `draws`, a length, `to(device)`, `batch(index, u)` -> (x0, cond)."""

from collections.abc import Callable
from typing import Any

from nanodiffusion.config import make
from nanodiffusion.data.encoded import EncodedData, dequantise, encoded, latents, quantise
from nanodiffusion.data.files import SPLITS, array, folder
from nanodiffusion.data.images import cifar10, digits, fashion_mnist, mnist
from nanodiffusion.data.pictures import Pictures, pictures
from nanodiffusion.data.tensors import (
    TensorData,
    epoch_order,
    map_labels,
    only_classes,
    order,
    split,
    subset,
    without_labels,
)
from nanodiffusion.data.toy import (
    checkerboard,
    circles,
    datasaurus,
    gaussians,
    pinwheel,
    swiss_roll,
    tree,
    two_moons,
)
from nanodiffusion.errors import lookup

__all__ = [
    "DATASETS",
    "EncodedData",
    "Pictures",
    "TensorData",
    "array",
    "checkerboard",
    "cifar10",
    "circles",
    "datasaurus",
    "dequantise",
    "digits",
    "encoded",
    "epoch_order",
    "fashion_mnist",
    "folder",
    "gaussians",
    "latents",
    "load_data",
    "map_labels",
    "mnist",
    "only_classes",
    "order",
    "pictures",
    "pinwheel",
    "quantise",
    "split",
    "subset",
    "swiss_roll",
    "tree",
    "two_moons",
    "without_labels",
]

DATASETS: dict[str, Callable[..., TensorData | EncodedData | Pictures]] = {
    "swiss-roll": swiss_roll,
    "tree": tree,
    "two-moons": two_moons,
    "circles": circles,
    "checkerboard": checkerboard,
    "gaussians": gaussians,
    "pinwheel": pinwheel,
    "datasaurus": datasaurus,
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "folder": folder,
    "array": array,
    "encoded": encoded,
    "latents": latents,
    "pictures": pictures,
}


def load_data(name: str, split: str = "train", **options: Any) -> Any:
    """The data set `name` of DATASETS, its "train" or "test" split; UserError on an unknown name or a wrong option.

    A toy set is its whole population, so every split is the same; another seed gives fresh points.
    """
    lookup(SPLITS, split, "split")
    return make(DATASETS, {"name": name, **options}, "data", split=split)()
