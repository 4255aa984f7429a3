"""Captioned pictures for training: found by a census, decoded when they are asked for, cropped and controlled as numbers say."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanodiffusion.data.buckets import BucketOrder, bucket_table, check_buckets, nearest_bucket
from nanodiffusion.data.captions import TEMPLATE
from nanodiffusion.data.census import Census, census_of, take_census
from nanodiffusion.data.conditioning import to_mask
from nanodiffusion.data.controls import Control, check_hole, draw_hole, make_control, pair_member
from nanodiffusion.data.files import SPLITS
from nanodiffusion.data.judge import ORIGINALS, SIDES, Wanted, check_pair
from nanodiffusion.data.shards import Fault, decode_image
from nanodiffusion.data.tensors import at_least, order
from nanodiffusion.data.tensors import split as split_data
from nanodiffusion.errors import UserError, lookup

RESAMPLES = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROPS = {"random": True, "center": False}
DRAWS = 4  # uniform numbers a sample: top, left, flip, hole
AHEAD = 2  # batches that are decoded before they are asked for, at most


def pictures(
    path: str,
    split: str = "train",
    size: int = 512,
    test_path: str = "",
    captions: bool = True,
    template: str = TEMPLATE,
    pipes: bool = False,
    resample: str = "bilinear",
    crop: str = "random",
    flip: bool = False,
    control: dict[str, Any] | None = None,
    hole: dict[str, Any] | None = None,
    buckets: bool | list[list[int]] = False,
    check: str = "full",
    workers: int = 0,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> "Pictures":
    """Pictures with captions of webdataset shards or of a folder, size x size or, with `buckets`, of about that area.

    path: a folder of .tar, names with braces, http(s) addresses (kept in the cache), "pipe:COMMAND" with `pipes`; or a
    folder of pictures as `read_captioned` takes it. A sample of shards that has clip_scores.txt ("0.31,0.27") beside
    0.png, 1.png, ... is its best picture. original_height and original_width of its json are its size before preparation.
    control: a row of CONTROLS with its options; hole: {"name": "random"} or a row of MASKS; buckets: true, or sizes.
    check: "full" decodes every picture in the census, "quick" reads their headers. workers: threads that decode ahead.
    The test set is test_path, else path/test beside path/train, else the `test_fraction` that tensors.split sets aside.
    UserError: nothing there, no sound sample, no caption anywhere, an unknown option of any of these, no test set.
    """
    side = lookup(SPLITS, split, "split")
    table = _buckets(buckets, size)
    wanted = Wanted(captions, pair_member(control) if control else "", check, template)
    parted = not test_path and all((Path(path) / part).is_dir() for part in SPLITS)
    where = test_path if side and test_path else str(Path(path) / split) if parted else path
    cropping = Cropping(
        at_least(size, 8, "size"), lookup(RESAMPLES, resample, "resample"), lookup(CROPS, crop, "crop"), flip
    )
    if size % 8:
        raise UserError("the codec halves a picture three times", key="size", expected="a multiple of 8", found=size)
    kind = check_hole(hole) if hole else None
    made = make_control(control, bool(hole)) if control else None
    if made:  # once, so that what cannot work fails before the census
        made(*(np.zeros((size, size, *c), np.uint8) for c in ((3,), (), (3,))))
    found = take_census(where, wanted, pipes, at_least(workers, 0, "workers"))
    data = Pictures(found, cropping, table, made, bool(hole), kind, Decoder(workers))
    if test_path or parted:
        return data
    if test_fraction:
        return split_data(data, test_fraction, seed)[side]
    if side:
        fix = "test_path=..., or test_fraction=0.1 sets one aside"
        raise UserError("this set has no test part", key="split", found=split, fix=fix)
    return data


def _buckets(buckets: bool | list[list[int]], size: int) -> tuple[tuple[int, int], ...]:
    return check_buckets(buckets) if isinstance(buckets, (list, tuple)) else bucket_table(size) if buckets else ()


# ---- where a crop lies


@dataclass(frozen=True)
class Cropping:
    """How a picture becomes a crop: its size, the filter, whether the place and the mirroring are drawn."""

    size: int = 512
    resample: int = Image.Resampling.BILINEAR
    random: bool = True
    flip: bool = False


def resized(height: Any, width: Any, to_height: Any, to_width: Any) -> tuple[Any, Any]:
    """The smallest (height, width) of a picture's shape that covers a crop: whole numbers, one side exact, one rounded down."""
    broad = to_height * width >= to_width * height  # broader than the crop: then its height decides
    return (
        np.where(broad, to_height, height * to_width // width),
        np.where(broad, width * to_height // height, to_width),
    )


def place(free_rows: Any, free_columns: Any, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The crop's top and left, whole numbers of 0 to free_rows and 0 to free_columns alike often: u (b 2 or more) in [0, 1)."""
    top, left = (np.floor(u[:, k].astype(np.float64) * (free + 1)) for k, free in enumerate((free_rows, free_columns)))
    return np.minimum(top, free_rows).astype(np.int64), np.minimum(left, free_columns).astype(np.int64)


class Crop(NamedTuple):
    """One sample, planned: resize to (full_height, full_width), mirror, cut (height, width) at (top, left)."""

    full_height: int
    full_width: int
    top: int
    left: int
    height: int
    width: int
    mirrored: bool


# ---- decoding


class Decoder:
    """Threads that decode, made when they are first needed and gone with whoever uses them; without any, the caller decodes."""

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """What gives the function's result, or raises its error."""
        if not self.workers:
            return partial(function, *arguments)
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(self.workers, thread_name_prefix="pictures")
            future: Future[Any] = self._pool.submit(function, *arguments)
        return future.result

    def close(self) -> None:
        """End the threads, once they have done what they were given; new work starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


class Decoded(NamedTuple):
    """One sample as arrays: uint8 (h w 3), float32 (3 h w) and uint8 (h w)."""

    crop: np.ndarray
    control: np.ndarray | None
    hole: np.ndarray | None


def read_picture(census: Census, row: int, pair: bool = False) -> Image.Image:
    """Picture `row` of a census, or its partner, upright, RGB. UserError: it is not what it was at the census."""
    at, name = census.row(row), census.names[row]
    number, start, count = (at.pair_file, at.pair_start, at.pair_bytes) if pair else (at.file, at.start, at.bytes)
    file = census.files[number]
    try:
        with open(file, "rb") as f:
            f.seek(start)
            raw = f.read(count)
        if len(raw) < count:
            raise Fault(f"{len(raw)} of {count} bytes are left")
        image = decode_image(raw)
        if not pair and image.size != (at.width, at.height):
            raise Fault(f"{image.height} x {image.width} pixels, not {at.height} x {at.width}")
        return image
    except (OSError, Fault) as e:
        found = e.strerror if isinstance(e, OSError) else e
        fix = "leave files alone while they are trained on; a new run takes a new census"
        raise UserError(f"{name} is not what it was at the census", file=file, found=found, fix=fix) from None


def cut(image: Image.Image, crop: Crop, resample: int) -> np.ndarray:
    """A picture resized, mirrored and cropped: uint8 (h w 3)."""
    image = image.resize((crop.full_width, crop.full_height), Image.Resampling(resample))
    left = crop.full_width - crop.width - crop.left if crop.mirrored else crop.left
    pixels = np.asarray(image.crop((left, crop.top, left + crop.width, crop.top + crop.height)))
    return pixels[:, ::-1] if crop.mirrored else pixels


# ---- the data set


@dataclass(frozen=True, eq=False)
class Pictures:
    """Captioned pictures by number; what `batch` gives is a pure function of (index, u), whoever decodes.

    rows: which of the census's samples, in what order, make up this set; None for all. `control` and the holes' `kind` as in
    `pictures`; masks: pictures of the holes, where they are not drawn. Shared by all that are made from one: the decoder's
    threads.
    """

    census: Census
    cropping: Cropping = Cropping()
    buckets: tuple[tuple[int, int], ...] = ()
    control: Control | None = None
    holes: bool = False
    kind: str | None = None
    decoder: Decoder = field(default_factory=Decoder)
    rows: np.ndarray | None = None
    device: torch.device = torch.device("cpu")
    classes: tuple[str, ...] = ()
    labels: Tensor | None = None
    masks: Census | None = None
    _ahead: dict[Any, list[Callable[[], Decoded]]] = field(default_factory=dict, init=False, repr=False)

    draws = DRAWS

    def __len__(self) -> int:
        return len(self.census if self.rows is None else self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3 size size); with buckets a batch's is `shape_of`."""
        return 3, self.cropping.size, self.cropping.size

    @property
    def faults(self) -> list[str]:
        """What the census left out, "shard.tar:key: reason"."""
        return list(self.census.faults)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The caption of every sample, "" where it has none."""
        said = self.census.captions
        return said if self.rows is None else tuple(said[i] for i in self.rows.tolist())

    @cached_property
    def _table(self) -> np.ndarray:
        """(n 10), the columns of Row."""
        return self.census.rows if self.rows is None else self.census.rows[self.rows]

    @cached_property
    def bucket(self) -> np.ndarray:
        """The number of every sample's bucket: (n)."""
        height, width = self._table[:, SIDES].T
        return nearest_bucket(height, width, self.buckets) if self.buckets else np.zeros(len(self), np.int64)

    @cached_property
    def _order(self) -> BucketOrder:
        return BucketOrder(self.bucket)

    def order(self, batch: int, seed: int, step: int) -> Tensor:
        """The samples (batch) int64 of global batch `step`, all of one bucket: a pure function of its arguments."""
        return self._order(batch, seed, step) if self.buckets else order(len(self), batch, seed, step)

    def shape_of(self, index: Tensor) -> tuple[int, int, int]:
        """(3 h w) of the batch of samples `index` (b). UserError: they are of several buckets."""
        if not self.buckets:
            return self.shape
        found = np.unique(self.bucket[index.cpu().numpy()])
        if len(found) != 1:
            sizes = ", ".join("{} x {}".format(*self.buckets[k]) for k in found)
            fix = "take batches as `order` gives them, or `square()`"
            raise UserError("a batch is of one bucket", key="index", found=sizes or "nothing", fix=fix)
        return 3, *self.buckets[found[0]]

    def plan(self, index: Tensor, u: Tensor | None = None) -> tuple[list[Crop], np.ndarray]:
        """Every sample's crop and its six numbers, (b 6) int64, without a picture being read; as `batch`."""
        numbers = index.cpu().numpy()
        _, height, width = self.shape_of(index)
        table = self._table[numbers]
        own = table[:, SIDES]
        high, wide = resized(own[:, 0], own[:, 1], height, width)
        top, left = (high - height) // 2, (wide - width) // 2
        mirrored = np.zeros(len(numbers), bool)
        if u is not None:
            drawn = u.detach().cpu().numpy()
            if self.cropping.random:
                top, left = place(high - height, wide - width, drawn)
            mirrored = (drawn[:, 2] < 0.5) & self.cropping.flip
        wanted = np.broadcast_to([height, width], (len(numbers), 2))
        sizes = np.concatenate([table[:, ORIGINALS], np.stack([top, left], 1), wanted], 1)
        columns = zip(high.tolist(), wide.tolist(), top.tolist(), left.tolist(), mirrored.tolist())
        return [Crop(h, w, y, x, height, width, m) for h, w, y, x, m in columns], sizes

    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples `index` (b) as x0 (b 3 h w) float32 in [-1, 1] and cond, on the data's device.

        cond: sizes (b 6) int64, height and width before any preparation, top and left of the crop in pixels of the resized
        picture (of its mirror image, where it is mirrored), height and width of the crop (Podell et al. 2023, section 2.2);
        row (b) int64, the caption's number; control (b 3 h w) and hole (b 1 h w), 1 = to be painted anew, where asked for.
        u (b 4) in [0, 1): top, left, flip, hole; without it the crop is central, not mirrored, and the hole the sample's
        own. UserError: a picture that is not what it was at the census, a batch of several buckets.
        """
        _, sizes = self.plan(index, u)
        parts = [result() for result in self._ahead.pop(_key(index, u), None) or self._begin(index, u)]
        x0 = self._sent(np.stack([part.crop for part in parts])).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        cond = {"sizes": torch.from_numpy(sizes).to(self.device), "row": index.to(self.device)}
        if self.control is not None:
            cond["control"] = self._sent(np.stack([part.control for part in parts]))  # type: ignore[misc]
        if self.holes:
            cond["hole"] = self._sent(np.stack([part.hole for part in parts]))[:, None].float()  # type: ignore[misc]
        return x0.contiguous(), cond

    def prefetch(self, index: Tensor, u: Tensor | None = None) -> None:
        """Begin to decode what `batch(index, u)` will ask for; nothing without workers. Two batches wait at most."""
        key = _key(index, u)
        if self.decoder.workers and key not in self._ahead:
            while len(self._ahead) >= AHEAD:
                self._ahead.pop(next(iter(self._ahead)))
            self._ahead[key] = self._begin(index, u)

    def _begin(self, index: Tensor, u: Tensor | None) -> list[Callable[[], Decoded]]:
        rows = index.cpu().numpy() if self.rows is None else self.rows[index.cpu().numpy()]
        seeds = [None] * len(rows) if u is None else u[:, 3].tolist()
        crops, _ = self.plan(index, u)
        return [self.decoder.submit(self._decode, *each) for each in zip(rows.tolist(), crops, seeds)]

    def _decode(self, row: int, crop: Crop, seed: float | None) -> Decoded:
        pixels = cut(read_picture(self.census, row), crop, self.cropping.resample)
        hole = self._hole(row, crop, seed) if self.holes else None
        if self.control is None:
            return Decoded(pixels, None, hole)
        paired = self.census.row(row).pair_bytes > 0
        pair = cut(read_picture(self.census, row, True), crop, self.cropping.resample) if paired else None
        return Decoded(pixels, self.control(np.ascontiguousarray(pixels), hole, pair), hole)

    def _hole(self, row: int, crop: Crop, seed: float | None) -> np.ndarray:
        if self.masks is None:
            return draw_hole(seed, row, crop.height, crop.width, self.kind)
        mask = cut(read_picture(self.masks, row), crop, self.cropping.resample)
        return to_mask(mask)[0, 0].to(torch.uint8).numpy()

    def _sent(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )

    def to(self, device: torch.device | str) -> "Pictures":
        """The same set, its batches on `device`."""
        return replace(self, device=torch.device(device))

    def take(self, index: Tensor) -> "Pictures":
        """The samples `index` (k), in that order; nothing is read."""
        chosen = index.cpu().numpy()
        return replace(self, rows=chosen if self.rows is None else self.rows[chosen])

    def own(self, files: Sequence[str], masks: Sequence[str], captions: Sequence[str]) -> "Pictures":
        """A set (n) of other pictures, made into samples as this one's are; for a paired control a picture is its own partner.

        masks: one each, white = to be painted anew; none: the holes are drawn. UserError: a picture or mask that cannot be
        read, a mask of another shape than its picture, masks where there are no holes.
        """
        if masks and not self.holes:
            fix = "data.hole={name: random}, or leave sample.masks out"
            raise UserError("nothing here has a hole", key="sample.masks", found=masks[0], fix=fix)
        found = census_of(files, captions)
        holes = census_of(masks, captions) if masks else None
        for file, picture, mask in zip(masks, found.rows, holes.rows if holes else ()):
            try:
                check_pair(picture[SIDES], mask[SIDES])
            except Fault as e:
                raise UserError("the mask does not fit its picture", file=file, found=e) from None
        return replace(self, census=found, masks=holes, rows=None, buckets=())

    def square(self) -> "Pictures":
        """The same set without buckets."""
        return replace(self, buckets=())

    def close(self) -> None:
        """End the threads that decode."""
        self._ahead.clear()
        self.decoder.close()


def _key(index: Tensor, u: Tensor | None) -> tuple[Any, ...]:
    return index.cpu().numpy().tobytes(), None if u is None else u.detach().cpu().numpy().tobytes()
