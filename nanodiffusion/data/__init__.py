"""Data sets by name. Each has `shape`, `classes`, `draws`, a length, `to(device)`, `batch(index, u)` -> (x0, cond)."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from nanodiffusion.data.files import SPLITS, array, folder
from nanodiffusion.data.images import cifar10, digits, fashion_mnist, mnist
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
from nanodiffusion.errors import UserError, lookup, nearest

__all__ = [
    "DATASETS",
    "TensorData",
    "array",
    "checkerboard",
    "cifar10",
    "circles",
    "datasaurus",
    "digits",
    "epoch_order",
    "fashion_mnist",
    "folder",
    "gaussians",
    "load_data",
    "map_labels",
    "mnist",
    "only_classes",
    "order",
    "pinwheel",
    "split",
    "subset",
    "swiss_roll",
    "tree",
    "two_moons",
    "without_labels",
]

Loader = Callable[..., TensorData]


def options_of(load: Loader) -> type:
    """The keyword arguments of a loader but `split`, as a frozen dataclass: the signature is the one list of them."""
    hints = get_type_hints(load)
    rows: list[tuple[str, Any, Any]] = [
        (p.name, hints[p.name], field(default=MISSING if p.default is p.empty else p.default))
        for p in inspect.signature(load).parameters.values()
        if p.name != "split"
    ]
    return make_dataclass(f"{load.__name__}_options", rows, frozen=True)


def _any_split(make: Loader) -> Loader:
    """A toy set is its whole population, so every split is the same; another seed gives fresh points."""
    return lambda split="train", **options: make(**options)


_TOYS: dict[str, Loader] = {
    "swiss-roll": swiss_roll,
    "tree": tree,
    "two-moons": two_moons,
    "circles": circles,
    "checkerboard": checkerboard,
    "gaussians": gaussians,
    "pinwheel": pinwheel,
    "datasaurus": datasaurus,
}
_IMAGES: dict[str, Loader] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "folder": folder,
    "array": array,
}
# name -> (dataclass of options, loader(split=..., **options))
DATASETS: dict[str, tuple[type, Loader]] = {
    **{name: (options_of(make), _any_split(make)) for name, make in _TOYS.items()},
    **{name: (options_of(load), load) for name, load in _IMAGES.items()},
}


def load_data(name: str, split: str = "train", **options: Any) -> TensorData:
    """The data set `name` of DATASETS, its "train" or "test" split; UserError on an unknown name or a wrong option."""
    kind, load = lookup(DATASETS, name, "data")
    lookup(SPLITS, split, "split")
    _check_options(name, kind, options)
    return load(split=split, **options)


_ACCEPTED: dict[Any, Any] = {int: int, float: (int, float), str: (str, os.PathLike), bool: bool}


def _check_options(name: str, kind: type, options: dict[str, Any]) -> None:
    known: dict[str, Field] = {f.name: f for f in fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{name} has no option {key!r}", key=key, fix=nearest(key, known))
        if not _conforms(value, known[key].type):
            wanted = inspect.formatannotation(known[key].type)
            raise UserError(f"{name}.{key} has the wrong type", key=key, expected=wanted, found=repr(value))
    for key, option in known.items():
        if option.default is MISSING and key not in options:
            raise UserError(f"{name} needs {key!r}", key=key, fix=f"{key}=...")


def _conforms(value: Any, wanted: Any) -> bool:
    """Whether a value fits an annotation: an int is a float too, a bool is no number, any sequence is a tuple."""
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        return isinstance(value, Sequence) and len(value) == len(kinds) and all(map(_conforms, value, kinds))
    return isinstance(value, _ACCEPTED[wanted]) and isinstance(value, bool) == (wanted is bool)
