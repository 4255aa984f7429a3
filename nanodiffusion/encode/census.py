"""What there is to encode: every sound sample is counted before any is encoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from nanodiffusion.data.pictures import resized
from nanodiffusion.encode.sources import Found, Source
from nanodiffusion.errors import UserError

MAX_CLASSES = 100_000  # that are named one by one


class Record(NamedTuple):
    """What the census remembers of a sample; its original sides are those before any preparation."""

    key: str
    caption: str
    label: int | None
    width: int
    height: int
    name: str = ""
    original_height: int = 0
    original_width: int = 0


@dataclass(frozen=True)
class Census:
    """All sound samples in order, where each unit's begin, and what is wrong with the others."""

    records: list[Record]
    starts: list[int]  # of the units, and the end
    faults: list[str]

    @property
    def captioned(self) -> int:
        """How many have a caption."""
        return sum(bool(r.caption.strip()) for r in self.records)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return all(r.label is not None for r in self.records)

    @property
    def classes(self) -> list[str]:
        """The name of every class, its number where it has no sample; [] unless each has one name and no other's."""
        named = {r.label: r.name for r in self.records if r.label is not None}
        one = all(r.label is not None and r.name and named[r.label] == r.name for r in self.records)
        if not one or max(named) >= MAX_CLASSES:
            return []
        names = [named.get(i, str(i)) for i in range(max(named) + 1)]
        return names if len(set(names)) == len(names) else []

    def sizes(self, size: int) -> np.ndarray:
        """What SDXL is told of central squares of `size`: (n 6) int64, as `Pictures.batch` has it."""
        sides = [(r.height, r.width, r.original_height, r.original_width) for r in self.records]
        height, width, *before = np.array(sides, np.int64).T
        high, wide = resized(height, width, size, size)
        square = np.full_like(height, size)
        return np.stack([*before, (high - size) // 2, (wide - size) // 2, square, square], 1)

    def summary(self, size: int) -> dict[str, Any]:
        """The counts, as the manifest has them; smaller: how many were enlarged to `size`."""
        return {
            "samples": len(self.records),
            "faults": len(self.faults),
            "without_caption": len(self.records) - self.captioned,
            "without_label": sum(r.label is None for r in self.records),
            "widths": [f(r.width for r in self.records) for f in (min, max)],
            "heights": [f(r.height for r in self.records) for f in (min, max)],
            "smaller": sum(min(r.width, r.height) < size for r in self.records),
        }


def count_unit(source: Source, unit: int, n: int) -> dict[str, Any]:
    """The census of a unit, JSON-able; with n, of its first n samples."""
    faults: list[str] = []
    found = islice(source.read(unit, faults), n or None)
    return {"records": [_record(f) for f in found], "faults": faults}


def _record(found: Found) -> Record:
    image = found.image
    width, height = image.shape[:0:-1] if isinstance(image, np.ndarray) else image.size
    return Record(*found[:3], width, height, found.name, *(found.original or (height, width)))


def join_census(counts: Iterator[dict[str, Any]], n: int, where: str) -> Census:
    """One census of the units' in order, of the first n samples."""
    records: list[Record] = []
    starts, faults = [0], []
    for count in counts:
        records += [Record(*row) for row in count["records"]]
        faults += count["faults"]
        starts.append(len(records))
        if n and len(records) >= n:
            break
    if not records:
        found = f"{len(faults)} faults, first {faults[0]}" if faults else "nothing"
        raise UserError("there is no sound sample here", file=where, found=found)
    return Census(records[: n or None], starts, faults)
