"""Where pictures and captions are from: sets by name, folders, shards."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from nanodiffusion.data import load_data
from nanodiffusion.data.files import MODES
from nanodiffusion.data.judge import original
from nanodiffusion.encode.files import as_json
from nanodiffusion.errors import UserError

SETS = ("digits", "mnist", "fashion-mnist", "cifar10")  # sources by name
FILES, SAMPLES = 1000, 4096  # of a folder, and of a set by name, that are counted at a time


class Found(NamedTuple):
    """A sound sample: a PIL image or uint8 (c h w), "" without a caption, None without a label; name: of its class, or "".

    original: its (height, width) before any preparation, None where nobody says.
    """

    key: str
    caption: str
    label: int | None
    image: Any
    name: str = ""
    original: tuple[int, int] | None = None


@dataclass(frozen=True)
class Source:
    """Samples in units that can be read on their own, each in the same order every time."""

    units: tuple[str, ...]
    read: Callable[
        [int, list[str]], Iterator[Found]
    ]  # the samples of a unit; what is wrong with others goes to the list
    classes: tuple[str, ...] = ()
    size: int = 0  # pixels; 0: nothing says
    channels: int = 3
    identity: str = ""  # another where the samples are others, as far as names, sizes, times and captions tell


def open_source(where: str, split: str = "train") -> Source:
    """The samples of a set by name, of a folder of captioned pictures, or of shards (a folder of them or a pattern).

    UserError: nothing there, or a `split` of what has no parts.
    """
    if where in SETS:
        return _by_name(where, split)
    if split != "train":
        fix = "give the folder or the shards of that part alone, without split="
        raise UserError("only sets by name have parts", file=where, key="split", found=split, fix=fix)
    folder = Path(where)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return _folder(folder)
    from nanodiffusion.data.shards import Fault, expand_shards, read_shards, shard_names

    shards = tuple(expand_shards(where))
    names = shard_names(shards)

    def read(unit: int, faults: list[str]) -> Iterator[Found]:
        for s in read_shards([shards[unit]], faults, need_caption=False, workers=2, names=[names[unit]]):
            name = s.meta.get("class")  # as `prepare` writes it
            name = name if isinstance(name, str) and name.isprintable() else ""
            try:
                size = original(s.meta, s.image.height, s.image.width)
            except Fault as e:
                faults.append(f"{s.where}: {e}")
                continue
            yield Found(s.key, s.caption, s.label, s.image, name, size)

    known = [[s, os.path.getsize(s) if os.path.isfile(s) else None] for s in shards]
    return Source(shards, read, identity=_digest(known))


def _by_name(name: str, split: str) -> Source:
    """A set of DATASETS; the name of its class is a sample's caption."""
    data = load_data(name, split)
    labels = data.labels.tolist()

    def read(unit: int, faults: list[str]) -> Iterator[Found]:
        for i in range(unit * SAMPLES, min(len(data), (unit + 1) * SAMPLES)):
            yield Found(f"{i:08d}", data.classes[labels[i]], labels[i], data.x[i].numpy())

    units = tuple(str(i) for i in range(0, len(data), SAMPLES))
    known = [[unit, None] for unit in units]
    return Source(units, read, data.classes, data.shape[1], data.shape[0], _digest(known))


def _folder(folder: Path) -> Source:
    """The pictures below a folder, by path, those without a caption too; the class folders are the classes."""
    from nanodiffusion.data.captions import judge_captioned, picture_bytes
    from nanodiffusion.data.census import json_beside, stamp
    from nanodiffusion.data.shards import Fault, decode_image, plain

    judged, classes = judge_captioned(folder, need_caption=False)

    def read(unit: int, faults: list[str]) -> Iterator[Found]:
        for name, row in islice(judged.items(), unit * FILES, (unit + 1) * FILES):
            try:
                if isinstance(row, Fault):
                    raise row
                image = decode_image(picture_bytes(row.file))
                size = original(json_beside(row.file), image.height, image.width)
            except Fault as e:
                faults.append(f"{plain(name)}: {e}")
                continue
            yield Found(name, row.caption, row.label, image, original=size)

    known = [
        [name, str(row)]
        if isinstance(row, Fault)
        else [name, row.caption, stamp(row.file), stamp(row.file.with_suffix(".json"))]
        for name, row in judged.items()
    ]
    return Source(tuple(str(i) for i in range(0, len(judged), FILES)), read, classes, identity=_digest(known))


def _digest(value: Any) -> str:
    return hashlib.sha256(as_json(value)).hexdigest()


def square(image: Any, size: int, channels: int) -> np.ndarray:
    """The central square of an image (PIL, or uint8 (c h w)) at `size` pixels: -> uint8 (channels size size)."""
    if isinstance(image, np.ndarray) and image.shape == (channels, size, size):
        return image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    fitted = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(fitted)).transpose(2, 0, 1)
