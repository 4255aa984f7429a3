"""What there is to train on: every captioned picture of shards or of a folder by its place, size and caption, and every fault.

A census reads everything once. What it found is kept in the cache and holds as long as a file's size and time of change do.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nanodiffusion.data.captions import Captioned, judge_captioned, picture_bytes
from nanodiffusion.data.judge import Row, Wanted, check_pair, judge_group, original
from nanodiffusion.data.kept import alone, keep, kept_file, local_shard, recall
from nanodiffusion.data.shards import (
    MAX_TEXT,
    Fault,
    Group,
    ahead,
    decode_image,
    decode_json,
    expand_shards,
    groups,
    is_remote,
    is_url,
    plain,
    shard_names,
)
from nanodiffusion.errors import UserError

FORMAT = 1  # of the files that keep a census
SILENT = {"no caption", "an empty caption", "the txt is empty"}


@dataclass(frozen=True, eq=False, repr=False)
class Census:
    """The sound samples, in the order of shards or names, and the faults, "shard.tar:key: reason"."""

    files: tuple[str, ...]
    names: tuple[str, ...]  # (n) what messages call a sample
    captions: tuple[str, ...]  # (n)
    rows: np.ndarray  # (n 10) int64, the columns of Row
    faults: tuple[str, ...]
    reasons: Mapping[str, int] = field(default_factory=dict)  # how many faults each

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """One line."""
        said = f"{len(self):,} pictures of {len(self.files):,} files"
        why = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.items())
        return f"{said}; {len(self.faults):,} left out: {why}" if self.faults else said

    def row(self, i: int) -> Row:
        """Sample i."""
        return Row(*self.rows[i].tolist())


def take_census(path: str, wanted: Wanted, pipes: bool = False, workers: int = 0) -> Census:
    """The census of shards (as `expand_shards` takes them, and commands with `pipes`) or of a folder (as `judge_captioned`).

    The same for any number of `workers`, which are threads; 0 = as many as processors.
    UserError: nothing there, no sound sample, no caption anywhere, a command without `pipes` or that fails.
    """
    if not pipes and any(part.startswith("pipe:") for part in path.split("::")):
        expected = "files or addresses; a command only with pipes=true"
        raise UserError("a recipe may not start a command here", key="path", expected=expected, found=path)
    workers = workers or os.cpu_count() or 1
    in_shards = not os.path.isdir(path) or any(Path(path).glob("*.tar"))
    census = _of_shards(expand_shards(path, pipes), wanted, workers) if in_shards else _of_folder(path, wanted, workers)
    if not len(census):
        silent = bool(census.reasons) and census.reasons.keys() <= SILENT
        fix = "captions=false, where none is needed" if silent else None
        found = f"{len(census.faults)} faults, first: {', '.join(census.faults[:1])}"
        raise UserError(
            "no picture has a caption" if silent else "there is no sound sample", file=path, found=found, fix=fix
        )
    return census


def census_of(files: Sequence[str], captions: Sequence[str]) -> Census:
    """Pictures that are named one by one, each its own partner too: files and addresses. UserError: one cannot be used."""
    found = [str(local_shard(file) if is_url(file) else file) for file in files]
    rows = []
    for i, (name, file) in enumerate(zip(files, found)):
        try:
            raw = picture_bytes(Path(file))
            height, width = decode_image(raw).size[::-1]
        except Fault as e:
            raise UserError("this picture cannot be used", file=name, expected="a PNG, JPEG or WEBP", found=e) from None
        rows.append(Row(i, 0, len(raw), i, 0, len(raw), height, width, height, width))
    return Census(tuple(found), tuple(files), tuple(captions), np.array(rows, np.int64), ())


def reasons(whys: Iterable[str]) -> dict[str, int]:
    """How many faults are alike, but for numbers, names and details, the most first."""
    alike: Counter[str] = Counter()
    for why in whys:
        why = re.sub(r"^.*\.(\w+) (is|has) ", r"the \1 \2 ", why.partition(": ")[0])
        alike[re.sub(r"\d[\d.,]*", "n", re.sub(r"(inside) .*", r"\1 a member", why))] += 1
    return dict(alike.most_common())


# ---- shards


def _of_shards(shards: Sequence[str], wanted: Wanted, workers: int) -> Census:
    parts, faults, files = [], [], []
    names: list[str] = []
    captions: list[str] = []
    shown = shard_names(shards)
    for number, shard in enumerate(tqdm(shards, "census", disable=None, leave=False)):
        found = _shard(shard, wanted, workers)
        rows = np.array(found["rows"], np.int64).reshape(-1, len(Row._fields))
        rows[:, Row._fields.index("file")] = number
        rows[:, Row._fields.index("pair_file")] = number
        parts.append(rows)
        files.append(found["file"])
        names += [f"{shown[number]}:{key}" for key in found["keys"]]
        captions += found["captions"]
        faults += [(f"{shown[number]}{where}", why) for where, why in found["faults"]]
    said, alike = tuple(f"{where}: {why}" for where, why in faults), reasons(why for _, why in faults)
    return Census(tuple(files), tuple(names), tuple(captions), np.concatenate(parts), said, alike)


def _shard(shard: str, wanted: Wanted, workers: int) -> dict[str, Any]:
    """What one shard holds, from the cache or by reading it, which others of this machine wait for."""
    key = shard if is_remote(shard) else os.path.abspath(shard)
    kept = kept_file([FORMAT, "shard", key, wanted.captions, wanted.member, wanted.check])
    with alone(kept):
        file = local_shard(shard) if is_remote(shard) else Path(key)
        try:
            state = file.stat()
        except OSError as e:
            raise UserError("a shard cannot be read", file=shard, found=e.strerror) from e
        known = {"format": FORMAT, "file": str(file), "size": state.st_size, "time": state.st_mtime_ns}
        found = recall(kept)
        if {k: found.get(k) for k in known} != known:
            found = known | _read(file, wanted, workers)
            keep(kept, found)
    return found


def _read(file: Path, wanted: Wanted, workers: int) -> dict[str, Any]:
    keys, captions, rows, faults = [], [], [], []
    for item in ahead(lambda item: _judge(item, wanted), groups(str(file), "", wanted.also), workers):
        if isinstance(item, _Fault):
            faults.append(item)
        else:
            key, caption, row = item
            keys.append(key)
            captions.append(caption)
            rows.append(row)
    return {"keys": keys, "captions": captions, "rows": rows, "faults": faults}


class _Fault(NamedTuple):
    where: str  # after the shard's name
    why: str


def _judge(item: Group | str, wanted: Wanted) -> tuple[str, str, Row] | _Fault:
    if isinstance(item, str):  # ": why" or ":name: why"
        where, _, why = item.partition(": ")
        return _Fault(where, why)
    try:
        return judge_group(item, wanted)
    except Fault as e:
        return _Fault(f":{plain(item.key)}", str(e))


# ---- a folder


def _of_folder(path: str, wanted: Wanted, workers: int) -> Census:
    """x.png with its caption; where a partner is wanted, x.MEMBER beside it is no picture of its own."""
    root = Path(path)
    judged, _ = judge_captioned(root, wanted.template, wanted.captions)
    tail = f".{wanted.member}"
    judged = {name: row for name, row in judged.items() if not wanted.member or not name.lower().endswith(tail)}
    pairs = {name: name.rpartition(".")[0] + tail for name in judged} if wanted.member else {}
    sizes = _sizes(root, [name for name, row in judged.items() if isinstance(row, Captioned)], pairs, wanted, workers)
    files, names, captions, rows, faults = [], [], [], [], []
    for name, row in judged.items():
        try:
            if isinstance(row, Fault):
                raise row
            rows.append(_folder_row(root, name, pairs.get(name), sizes, len(files)))
        except Fault as e:
            faults.append((name, str(e)))
            continue
        files += [str(root / part) for part in (name, pairs.get(name)) if part]
        names.append(name)
        captions.append(row.caption)
    said = tuple(f"{where}: {why}" for where, why in faults)
    table = np.array(rows, np.int64).reshape(-1, len(Row._fields))
    return Census(tuple(files), tuple(names), tuple(captions), table, said, reasons(why for _, why in faults))


def _folder_row(root: Path, name: str, pair: str | None, sizes: Mapping[str, Any], file: int) -> Row:
    height, width = _found(sizes[name])
    size = (root / name).stat().st_size
    beside: tuple[int, int, int] = (-1, -1, -1)
    if pair is not None:
        if pair not in sizes:
            raise Fault(f"no {Path(pair).name}")
        check_pair((height, width), _found(sizes[pair]))
        beside = (file + 1, 0, (root / pair).stat().st_size)
    return Row(file, 0, size, *beside, height, width, *original(json_beside(root / name), height, width))


def json_beside(picture: Path) -> dict[str, Any]:
    """What the json beside a picture says, {} where there is none; Fault where it is no object."""
    file = picture.with_suffix(".json")
    return decode_json(_small(file)) if file.is_file() else {}


def _found(size: list[int] | str) -> tuple[int, int]:
    if isinstance(size, str):
        raise Fault(size)
    return size[0], size[1]


def _small(file: Path) -> bytes:
    with open(file, "rb") as f:
        return f.read(MAX_TEXT)


def _sizes(
    root: Path, names: Sequence[str], pairs: Mapping[str, str], wanted: Wanted, workers: int
) -> dict[str, list[int] | str]:
    """[height, width] of every picture by name, or what is wrong with it; sizes hold while their files do not change."""
    kept = kept_file([FORMAT, "folder", os.path.abspath(root), wanted.check])
    partners = [pairs[name] for name in names if name in pairs and (root / pairs[name]).is_file()]
    stamps = {name: stamp(root / name) for name in (*names, *partners)}
    with alone(kept):
        old = recall(kept).get("sizes", {})  # a fault may have been of the moment: it is looked at again
        new = [n for n, now in stamps.items() if n not in old or old[n][0] != now or isinstance(old[n][1], str)]
        measured = ahead(lambda name: _measure(root / name, wanted), iter(new), workers)
        told = dict(zip(new, tqdm(measured, "census", len(new), disable=None, leave=False)))
        sizes = {name: told[name] if name in told else old[name][1] for name in stamps}
        if new:
            keep(kept, {"sizes": {name: [now, sizes[name]] for name, now in stamps.items()}})
    return sizes


def stamp(file: Path) -> list[int]:
    """A file's bytes and time of change; zeros where nothing can be known of it."""
    try:
        state = file.stat()
        return [state.st_size, state.st_mtime_ns]
    except OSError:
        return [0, 0]


def _measure(file: Path, wanted: Wanted) -> list[int] | str:
    try:
        return list(wanted.measure(picture_bytes(file)))
    except Fault as e:
        return str(e)
