"""A data set that lives in memory, the tools that relabel or cut it, and the order in which training visits it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.errors import UserError, lookup


@dataclass(frozen=True, eq=False)
class TensorData:
    """A resident data set of n samples with optional labels and a random flip and crop.

    x (n ...) is float32, unchanged, or uint8 images (n c h w), kept as bytes and gathered as x / 127.5 - 1 in [-1, 1].
    labels (n) int64 index `classes`, which are called "0", "1", ... without names. `skipped`: what a loader left out.
    `flip` mirrors an image with probability 1/2; `crop_padding` p pads each side by p pixels ("reflect", or "zero",
    which is black) and cuts the original size back out. UserError on tensors that are empty, non-finite or ill-shaped
    and on labels out of range.
    """

    x: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    flip: bool = False
    crop_padding: int = 0
    crop_fill: str = "reflect"
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_samples(self.x)
        if self.draws or self.crop_padding:
            _check_augmentation(self)
        if self.labels is not None:
            _check_labels(self.labels, len(self.x), self.classes)
            names = self.classes or map(str, range(int(self.labels.max()) + 1))
            object.__setattr__(self, "classes", tuple(names))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def draws(self) -> int:
        """How many uniform numbers `batch` takes per sample: one to flip, two to crop."""
        return int(self.flip) + 2 * (self.crop_padding > 0)

    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples `index` (b) as x0 (b ...) float32 and cond, {"label": (b) int64} or {}, on the data's device.

        The augmentation is a pure function of u (b draws) in [0, 1): u = (flip, row, column); without u there is none.
        """
        index = index.to(self.x.device)
        x = self.x.index_select(0, index)
        if u is not None and self.draws:
            x = self._augment(x, u.to(x.device))
        if x.dtype == torch.uint8:
            x = x.float().div_(127.5).sub_(1)
        return x, {} if self.labels is None else {"label": self.labels.index_select(0, index)}

    def to(self, device: torch.device | str) -> "TensorData":
        """The same set with its tensors on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, x=self.x.to(device), labels=labels)

    def take(self, index: Tensor) -> "TensorData":
        """The samples `index` (k), in that order, copied."""
        index = index.to(self.x.device)
        return replace(self, x=self.x[index], labels=None if self.labels is None else self.labels[index])

    def _augment(self, x: Tensor, u: Tensor) -> Tensor:
        """x (b c h w) with pixel (i, j) taken from (i + di, ±j + dj), where d = floor(u (2p + 1)) - p."""
        height, width = x.shape[-2:]
        p = self.crop_padding
        rows, columns = (torch.arange(n, device=x.device).expand(len(x), n) for n in (height, width))
        if self.flip:
            columns = torch.where(u[:, :1] < 0.5, width - 1 - columns, columns)
        if p:
            shift = (u[:, -2:] * (2 * p + 1)).long() - p
            rows, columns = rows + shift[:, :1], columns + shift[:, 1:]
        source = _mirror(rows, height)[:, :, None] * width + _mirror(columns, width)[:, None, :]
        pixels = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
        if p and self.crop_fill == "zero":
            inside = _within(rows, height)[:, None, :, None] & _within(columns, width)[:, None, None, :]
            pixels = pixels * inside
        return pixels


def _mirror(i: Tensor, n: int) -> Tensor:
    """Reflect indices in (-n, 2n - 1) into [0, n) about the first and the last entry."""
    return (n - 1) - (n - 1 - i.abs()).abs()


def _within(i: Tensor, n: int) -> Tensor:
    return (i >= 0) & (i < n)


def _check_samples(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.uint8) or x.ndim < 2 or not x.numel():
        raise UserError(
            "these tensors are not a data set",
            key="x",
            expected="at least one sample: float32 (n ...) or uint8 images (n c h w)",
            found=f"{x.dtype} {tuple(x.shape)}",
        )
    if x.dtype == torch.uint8 and x.ndim != 4:
        raise UserError("bytes are images", key="x", expected="uint8 (n c h w)", found=f"{tuple(x.shape)}")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = ~torch.isfinite(x.flatten(1)).all(1)
        raise UserError(
            f"{int(bad.sum())} of {len(x)} samples hold NaN or infinity",
            key="x",
            expected="finite numbers",
            found=f"the first bad sample is number {int(bad.nonzero()[0])}",
        )


def _check_augmentation(data: TensorData) -> None:
    lookup({"reflect": 1, "zero": 1}, data.crop_fill, "crop_fill")
    if len(data.shape) != 3:
        raise UserError("only images flip and crop", key="flip", expected="samples (c h w)", found=data.shape)
    if not 0 <= data.crop_padding < min(data.shape[1:]):
        raise UserError(
            "the padding must be smaller than the image",
            key="crop_padding",
            expected=f"0 to {min(data.shape[1:]) - 1}",
            found=data.crop_padding,
        )


def _check_labels(labels: Tensor, n: int, classes: tuple[str, ...]) -> None:
    if labels.dtype != torch.int64 or labels.shape != (n,):
        raise UserError(
            "there must be one integer label per sample",
            key="labels",
            expected=f"int64 ({n},)",
            found=f"{labels.dtype} {tuple(labels.shape)}",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes and high >= len(classes)):
        raise UserError(
            "a label is out of range",
            key="labels",
            expected=f"0 to {len(classes) - 1}" if classes else "0 or more",
            found=f"{low} to {high}",
        )


class Rows(Protocol):
    """What can be cut: `take` gives the samples (k) of some numbers, in that order; labels (n) where there are any."""

    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def take(self, index: Tensor) -> Self: ...


R = TypeVar("R", bound=Rows)


def at_least(value: int, least: int, key: str) -> int:
    """`value`, or a UserError when it is below `least`."""
    if value < least:
        raise UserError(f"{key} is too small", key=key, expected=f"{least} or more", found=value)
    return value


# ---- tools: each returns a new set and leaves the old one as it is


def subset(data: R, index: Tensor | np.ndarray | Sequence[int] | slice) -> R:
    """The samples `index` (k), in that order; a slice works too. UserError when one does not exist."""
    chosen = torch.arange(len(data))[index] if isinstance(index, slice) else torch.as_tensor(index).long()
    if len(chosen) and not bool(_within(chosen, len(data)).all()):
        raise UserError(
            "a sample does not exist",
            key="index",
            expected=f"0 to {len(data) - 1}",
            found=f"{int(chosen.min())} to {int(chosen.max())}",
        )
    return data.take(chosen)


def split(data: R, fraction: float = 0.2, seed: int = 0) -> tuple[R, R]:
    """Two disjoint sets, (the rest, a random `fraction`), both in the old order; stratified where there are labels.

    Of every class with k samples, the first round(fraction k) of `epoch_order(k, seed, class)` go to the second set.
    """
    if not 0 < fraction < 1:
        raise UserError("a split needs a part", key="fraction", expected="between 0 and 1", found=fraction)
    labels = torch.zeros(len(data), dtype=torch.int64) if data.labels is None else data.labels.cpu()
    second = torch.zeros(len(data), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        chosen = epoch_order(len(members), seed, label)[: round(fraction * len(members))]
        second[members[chosen]] = True
    if second.all() or not second.any():
        raise UserError(f"{len(data)} samples are too few to split", key="fraction", found=fraction)
    return subset(data, (~second).nonzero().flatten()), subset(data, second.nonzero().flatten())


def without_labels(data: TensorData) -> TensorData:
    """The same samples, unconditional."""
    return replace(data, labels=None, classes=())


def map_labels(data: TensorData, new: Callable[[int], int] | Mapping[int, int]) -> TensorData:
    """Give old class i the number new(i) or new[i]; a class made of several is named "a+b"."""
    labels = _labels(data)
    numbers = range(len(data.classes))
    table = [lookup(cast(Any, new), i, "label") if isinstance(new, Mapping) else new(i) for i in numbers]
    at_least(min(table), 0, "label")
    names = ["+".join(data.classes[i] for i in numbers if table[i] == k) for k in range(max(table) + 1)]
    classes = tuple(name or str(k) for k, name in enumerate(names))
    return replace(data, labels=torch.tensor(table, device=labels.device)[labels], classes=classes)


def only_classes(data: TensorData, *kept: int | str) -> TensorData:
    """The samples of the classes `kept` (numbers or names), renumbered 0, 1, ... in the order given."""
    labels = _labels(data)
    at_least(len(kept), 1, "classes")
    numbers: dict[Any, int] = {k: i for i, name in enumerate(data.classes) for k in (i, name)}
    old = [lookup(numbers, k, "class") for k in kept]
    table = torch.full((len(data.classes),), -1, device=labels.device)
    table[torch.tensor(old, device=labels.device)] = torch.arange(len(old), device=labels.device)
    index = (table[labels] >= 0).nonzero().flatten()
    classes = tuple(data.classes[i] for i in old)
    return replace(data.take(index), labels=table[labels[index]], classes=classes)


def _labels(data: TensorData) -> Tensor:
    if data.labels is None:
        raise UserError("this data set has no labels", key="labels", fix="choose a labelled data set")
    return data.labels


# ---- order: which samples a training step sees


@lru_cache(maxsize=2)  # the epoch that ends in a batch and the one that starts in it
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    """Philox is keyed by two 64-bit words: (seed, epoch) itself is the key, so no two epochs share a stream."""
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch]))
    return torch.from_numpy(random.permutation(n))


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of epoch `epoch`: a permutation (n) int64 of 0 .. n-1, a pure function of its arguments."""
    return _permutation(at_least(n, 1, "n"), seed, epoch).clone()


def order(n: int, batch: int, seed: int, step: int) -> Tensor:
    """The samples (batch) int64 of global batch `step` in an endless stream of epochs; batch may exceed n.

    Position p = step batch + i of the stream is sample epoch_order(n, seed, p // n)[p % n].
    """
    at_least(n, 1, "n")
    first, skip = divmod(step * batch, n)
    last = (step * batch + batch - 1) // n
    stream = [_permutation(n, seed, epoch) for epoch in range(first, last + 1)]
    return torch.cat(stream)[skip : skip + batch] if len(stream) > 1 else stream[0][skip : skip + batch].clone()
