"""Aspect buckets: every picture is trained on at the size, of some of about the same area, that fits its shape best.

A batch is of one bucket (Podell et al. 2023, section 2.3), and which one it is, is a function of (seed, step).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.errors import UserError

STEP = 64  # pixels: sides are multiples of it
AREA = 0.9  # of size**2 at least, and size**2 at most
ASPECT = 2.0  # of the sides, at most


def bucket_table(size: int) -> tuple[tuple[int, int], ...]:
    """The buckets (height, width) around size x size, tall ones last: sides of 64 k pixels, at most twice the other.

    Of 1024 they are those of Podell et al. 2023, appendix I, between 1:2 and 2:1, and 1344 x 704. UserError: there are none.
    """
    most = int(size * ASPECT**0.5)
    sides = range(STEP, most + 1, STEP)
    table = tuple((h, w) for h in sides for w in reversed(sides) if _fits(h, w, size))
    if not table:
        fix = "buckets=[[HEIGHT, WIDTH], ...]"
        raise UserError("no bucket is of this size", key="size", expected=f"a multiple of {STEP}", found=size, fix=fix)
    return table


def _fits(height: int, width: int, size: int) -> bool:
    return AREA * size**2 <= height * width <= size**2 and max(height, width) <= ASPECT * min(height, width)


def check_buckets(buckets: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """The user's own buckets. UserError: none, one twice, or not [height, width] in multiples of 8."""
    table = tuple(tuple(bucket) if isinstance(bucket, (list, tuple)) else (bucket,) for bucket in buckets)
    sound = all(len(b) == 2 and all(type(s) is int and s >= 8 and s % 8 == 0 for s in b) for b in table)
    if not table or not sound or len(set(table)) < len(table):
        expected = "[[height, width], ...], multiples of 8, each once"
        raise UserError("these are no buckets", key="buckets", expected=expected, found=list(buckets))
    return table  # type: ignore[return-value]


def nearest_bucket(height: np.ndarray, width: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket (n) int64 whose log aspect is nearest to each picture's, the first of equals: (n), (n) -> (n)."""
    aspects = np.log([h / w for h, w in buckets])
    return np.abs(np.log(height / width)[:, None] - aspects).argmin(1)


class BucketOrder:
    """Which samples of n, in buckets (n), make up global batch `step`: a pure function of (seed, step).

    Each bucket is an endless stream of its own epochs, cut into batches, so that every sample comes equally often: what
    does not fill a batch starts the next one. In epoch e of the whole set, bucket k with n_k samples gives the batches
    floor(e n_k / batch) to floor((e + 1) n_k / batch) of its stream; their order is drawn anew in every epoch.
    """

    def __init__(self, bucket: np.ndarray) -> None:
        self.members = [np.flatnonzero(bucket == k) for k in np.unique(bucket)]

    def __call__(self, batch: int, seed: int, step: int) -> Tensor:
        """The samples (batch) int64."""
        epoch = step * batch // sum(map(len, self.members))  # this one has begun, as batches are rounded down
        while self._begun(epoch + 1, batch) <= step:
            epoch += 1
        turns = self._turns(epoch, batch)
        k, j = turns[_permutation(len(turns), seed, epoch, 0)[step - self._begun(epoch, batch)]]
        members = self.members[k]
        first, skip = divmod(j * batch, len(members))
        last = (j * batch + batch - 1) // len(members)
        stream = np.concatenate([_permutation(len(members), seed, e, k + 1) for e in range(first, last + 1)])
        return torch.from_numpy(members[stream[skip : skip + batch]])

    def _begun(self, epoch: int, batch: int) -> int:
        """How many batches there are before an epoch."""
        return sum(epoch * len(members) // batch for members in self.members)

    def _turns(self, epoch: int, batch: int) -> list[tuple[int, int]]:
        """(bucket, number in its stream) of every batch of an epoch."""
        counts = map(len, self.members)
        return [(k, j) for k, n in enumerate(counts) for j in range(epoch * n // batch, (epoch + 1) * n // batch)]


@lru_cache(maxsize=128)
def _permutation(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Philox is keyed by (seed, epoch), and the streams lie 2**192 numbers apart."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch], counter=[0, 0, 0, stream])).permutation(n)
