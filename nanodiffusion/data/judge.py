"""What makes a training sample: which picture, of what size, with what caption and what partner; and what is wrong with it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nanodiffusion.data.captions import TEMPLATE
from nanodiffusion.data.shards import (
    PICTURE,
    Fault,
    Group,
    choose_picture,
    decode_image,
    decode_json,
    decode_label,
    group_caption,
    is_choice,
    picture_size,
)
from nanodiffusion.errors import UserError, lookup

ORIGINAL = ("original_height", "original_width")
SHAPES_DIFFER = 0.02  # relative, of the aspects of a picture and its partner
MEASURES = {"full": lambda raw: decode_image(raw).size[::-1], "quick": picture_size}


class Row(NamedTuple):
    """Where a picture and its partner are, (number of the file, first byte, bytes), -1 for none; sides in pixels, upright."""

    file: int
    start: int
    bytes: int
    pair_file: int
    pair_start: int
    pair_bytes: int
    height: int
    width: int
    original_height: int
    original_width: int


SIDES, ORIGINALS = slice(6, 8), slice(8, 10)  # columns of a table of rows: (height, width)


@dataclass(frozen=True)
class Wanted:
    """What makes a sample: a caption, a partner "x.MEMBER" of every picture x; pictures decoded whole, or their headers."""

    captions: bool = True
    member: str = ""
    check: str = "full"
    template: str = TEMPLATE

    def __post_init__(self) -> None:
        lookup(MEASURES, self.check, "check")
        if self.member and not re.fullmatch(rf"[^./\\A-Z]+\.(?:{PICTURE})", self.member):
            expected = "as in control.png, which is 0007.control.png beside 0007.png"
            raise UserError("this names no picture", key="member", expected=expected, found=self.member)

    def also(self, ending: str) -> bool:
        """Which members of a shard are read besides the usual ones."""
        return ending == self.member or is_choice(ending)

    def measure(self, raw: bytes) -> tuple[int, int]:
        """(height, width) of a picture; Fault."""
        return MEASURES[self.check](raw)


def judge_group(group: Group, wanted: Wanted) -> tuple[str, str, Row]:
    """(key, caption, row) of a sample of a shard, the row's files 0; Fault where it is none."""
    if group.bad:
        raise Fault(group.bad)
    ending = choose_picture(group.parts)
    meta = decode_json(group.parts["json"]) if "json" in group.parts else {}
    caption = group_caption(group, meta, wanted.captions)
    if "cls" in group.parts:
        decode_label(group.parts["cls"])  # of no use here, but a broken one makes the sample doubtful
    height, width = wanted.measure(group.parts[ending])
    pair = (-1, -1)
    if wanted.member:
        if wanted.member not in group.parts:
            raise Fault(f"no {wanted.member}")
        check_pair((height, width), wanted.measure(group.parts[wanted.member]))
        pair = group.places[wanted.member]
    return group.key, caption, Row(0, *group.places[ending], 0, *pair, height, width, *original(meta, height, width))


def original(meta: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """(height, width) of the picture before anybody resized it: what the json says, else its own; Fault."""
    said = [meta.get(key) for key in ORIGINAL]
    if said == [None, None]:
        return height, width
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 2**31 for side in said):
        raise Fault("original_height and original_width are not two whole numbers")
    return said[0], said[1]  # type: ignore[return-value]


def check_pair(picture: Sequence[int] | np.ndarray, pair: Sequence[int] | np.ndarray) -> None:
    """Fault where two pictures (height, width) are not of one shape; their sizes may differ."""
    if abs(np.log(picture[0] * pair[1] / (picture[1] * pair[0]))) > SHAPES_DIFFER:
        raise Fault(f"the pair is of another shape: {pair[0]} x {pair[1]} beside {picture[0]} x {picture[1]}")
