"""Checkpoints that outlive kill -9, full disks and bit rot: written beside, synced, hashed, renamed into place.

runs/x/checkpoint/
  step-00001000/   model.safetensors ... state.json, and manifest.json: size and SHA-256 of each
  best/            the same
  .tmp-NAME/       a save under way, or killed: the next save removes it
  .old-NAME/       what a save of the same name replaces: readable until the new one stands in its place

One process saves into a folder, or all of one run do together: then a file is in parts, model.part-0-of-2 and so on, which
together are read as one. Any number of processes may read.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError
from nanodiffusion.tensors import (
    SUFFIX,
    Tensors,
    as_json,
    file_chunks,
    file_sha256,
    load_meta,
    load_tensors,
    make_folder,
    sync,
    write_errors,
    write_file,
)

MANIFEST, STATE = "manifest.json", "state.json"
MANIFEST_LIMIT = 1 << 20  # bytes: an honest manifest has some 100 per file, a hostile one must not fill the memory


class TensorFiles(Mapping[str, dict[str, Tensor]]):
    """File name without suffix -> its tensors, read at each access.

    Of a file in parts, those of a name are put together along their first axis, so that there are never parts to be seen.
    """

    def __init__(self, folder: Path, names: Iterable[str], device: str | torch.device = "cpu") -> None:
        self.folder, self.device = folder, device
        self.stems: dict[str, list[str]] = {}
        for stem in sorted(names, key=_part_number):
            self.stems.setdefault(_PART.sub("", stem), []).append(stem)
        self.names = tuple(self.stems)

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name not in self.names:
            raise KeyError(name)
        parts: dict[str, list[Tensor]] = {}
        for stem in self.stems[name]:
            for key, tensor in load_tensors(self.folder / f"{stem}{SUFFIX}", self.device)[0].items():
                parts.setdefault(key, []).append(tensor)
        return {key: found[0] if len(found) == 1 else torch.cat(found) for key, found in parts.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `files["model"]` reads tensors, `meta["model"]` is what their file says of them."""

    folder: Path
    step: int
    files: TensorFiles
    meta: dict[str, dict[str, Any]]
    state: dict[str, Any]


Files = Mapping[str, tuple[Tensors, dict[str, Any]]]


def save_checkpoint(
    root: str | Path, step: int, files: Files, state: dict[str, Any], keep: int = 3, world: World | None = None
) -> Path:
    """Save `files`, name -> (tensors, meta), and the JSON-able `state` of a step; on return they are on the disk.

    Of the older checkpoints the newest `keep` - 1 stay. world: of processes that all call this, each with its parts of the
    tensors, see `shard.parts`, which are written at the same time. UserError, of every process, where one meets a full or
    unwritable disk, with all older ones intact.
    """
    if step < 0 or keep < 1:
        raise UserError(
            "cannot save this checkpoint", expected="step >= 0, keep >= 1", found=f"step {step}, keep {keep}"
        )
    folder = _save_folder(Path(root), f"step-{step:08d}", step, files, state, world or World())
    if world is None or world.first:
        _prune(Path(root), step, keep)
    return folder


def save_best(root: str | Path, step: int, files: Files, state: dict[str, Any], world: World | None = None) -> Path:
    """Save as save_checkpoint does, into the folder `best`, which is replaced and never pruned."""
    return _save_folder(Path(root), "best", step, files, state, world or World())


def checkpoints(root: str | Path) -> list[Path]:
    """The folders of all checkpoints under `root`, newest first, unverified."""
    root = Path(root)
    folders = [f for f in root.iterdir() if _STEP.fullmatch(f.name)] if root.is_dir() else []
    return sorted(folders, key=lambda f: (_step(f), f.name), reverse=True)  # "step-" before its ".old-step-"


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint, in words: each file against the manifest's size and SHA-256; [] if sound."""
    folder = Path(folder)
    try:
        entries = _read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        missing = isinstance(e, FileNotFoundError)
        return [f"{MANIFEST}: missing" if missing else f"{MANIFEST}: damaged ({e})"]
    return [f"{name}: {wrong}" for name, entry in entries.items() if (wrong := _differs(folder / name, entry))]


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The checkpoint in `folder`, after verifying it. UserError: damaged or none, saying what is wrong."""
    if problems := verify(folder):
        raise UserError(
            "not a sound checkpoint",
            file=folder,
            found="; ".join(problems[:3]),
            fix="take another step-* folder beside it",
        )
    return _read_checkpoint(Path(folder), device)


def latest(root: str | Path, device: str | torch.device = "cpu") -> Checkpoint | None:
    """The newest sound checkpoint under `root`, warning of each damaged one passed over; None if there are none.

    UserError: there are some and none is sound.
    """
    return _first_sound(checkpoints(root), root, device)


def load_best(root: str | Path, device: str | torch.device = "cpu") -> Checkpoint | None:
    """The checkpoint that save_best wrote last; None when there is none. UserError: damaged."""
    candidates = [Path(root) / name for name in ("best", ".old-best")]
    return _first_sound([f for f in candidates if f.is_dir()], root, device)


_STEP = re.compile(r"(?:\.old-)?step-(\d{8,})")


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


_PART = re.compile(r"\.part-(\d+)-of-\d+$")


def _part_number(stem: str) -> tuple[str, int]:
    found = _PART.search(stem)
    return _PART.sub("", stem), int(found[1]) if found else 0


def _save_folder(root: Path, name: str, step: int, files: Files, state: dict[str, Any], world: World) -> Path:
    """Made, named and tidied by the first process; every process writes its own files, and none goes on alone."""
    target, beside = root / name, root / f".tmp-{name}"
    mine = f".part-{world.rank}-of-{world.size}" if world.size > 1 else ""
    contents: dict[str, Iterable[bytes | memoryview]] = {}
    for stem, (tensors, meta) in files.items():
        contents[_plain(stem) + mine + SUFFIX] = file_chunks(tensors, meta)
    if world.first:
        contents[STATE] = [as_json({"step": step, "state": state}, "state").encode()]
    try:
        with _agreed(world), write_errors(target):
            if world.first:
                make_folder(root)
                _tidy(root)
                beside.mkdir()
        with _agreed(world), write_errors(target):
            entries = {file: write_file(beside / file, chunks) for file, chunks in contents.items()}
        entries = {file: entry for part in world.told(entries) for file, entry in part.items()}
        with _agreed(world), write_errors(target):
            if world.first:
                write_file(beside / MANIFEST, [_manifest(entries)])
                sync(beside)
                if target.exists():
                    os.replace(target, root / f".old-{name}")
                os.replace(beside, target)
                sync(root)
    finally:
        if world.first:
            _tidy(root)
    return target


@contextmanager
def _agreed(world: World) -> Iterator[None]:
    """What one process cannot do here, none has done: its error is everybody's."""
    own: UserError | None = None
    try:
        yield
    except UserError as e:
        own = e
    told = world.told(own and (own.what, {key: value and str(value) for key, value in own.details.items()}))
    if own:
        raise own
    for what, details in filter(None, told):
        raise UserError(what, **details)


def _plain(stem: str) -> str:
    if re.fullmatch(r"\w[\w.=+-]*", stem) is None or stem.endswith(SUFFIX):
        raise UserError(
            "not a name for a file of a checkpoint",
            found=repr(stem),
            expected="such as 'model' or 'ema-0.999'",
        )
    return stem


def _tidy(root: Path) -> None:
    """Undo a killed or failed save: a folder moved aside without a successor comes back, all else goes."""
    for old in root.glob(".old-*"):
        target = old.with_name(old.name.removeprefix(".old-"))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            with suppress(OSError):
                os.replace(old, target)
    for tmp in root.glob(".tmp-*"):
        shutil.rmtree(tmp, ignore_errors=True)


def _prune(root: Path, step: int, keep: int) -> None:
    older = [f for f in checkpoints(root) if _step(f) < step]
    for folder in older[keep - 1 :]:
        with suppress(OSError):  # a checkpoint too many is no reason to fail a save that is already on the disk
            os.replace(folder, root / f".tmp-{folder.name}")  # at once out of sight: a kill leaves no half checkpoint
    _tidy(root)


def _manifest(entries: dict[str, Any]) -> bytes:
    return json.dumps({"files": entries}, indent=1, sort_keys=True).encode()


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    with open(folder / MANIFEST, "rb") as f:
        data = f.read(MANIFEST_LIMIT)
    entries = dict(json.loads(data)["files"])
    # One text per content: a flipped bit is in an entry, which then matches no file, or in the text around them.
    if data != _manifest(entries) or STATE not in entries:
        raise ValueError("not as it was written")
    if foreign := [name for name in entries if Path(name).name != name]:
        raise ValueError(f"names {foreign[0]!r}, outside the folder")
    return entries


def _differs(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return "missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{size} bytes instead of {entry['size']}"
        return None if file_sha256(path) == entry["sha256"] else "its SHA-256 differs from the manifest"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"cannot be checked ({e})"


def _read_checkpoint(folder: Path, device: str | torch.device) -> Checkpoint:
    stems = sorted(name.removesuffix(SUFFIX) for name in _read_manifest(folder) if name.endswith(SUFFIX))
    files = TensorFiles(folder, stems, device)
    meta = {name: load_meta(folder / f"{parts[0]}{SUFFIX}") for name, parts in files.stems.items()}
    saved = json.loads((folder / STATE).read_bytes())
    return Checkpoint(folder, saved["step"], files, meta, saved["state"])


def _first_sound(folders: list[Path], root: str | Path, device: str | torch.device) -> Checkpoint | None:
    problems: list[str] = []
    for folder in folders:
        problems = verify(folder)
        if not problems:
            return _read_checkpoint(folder, device)
        warnings.warn(f"skipping damaged checkpoint {folder}: {'; '.join(problems)}", stacklevel=3)
    if folders:
        raise UserError(
            "every checkpoint here is damaged",
            file=root,
            found=f"{len(folders)}, the oldest: {problems[0]}",
            fix="restore one",
        )
    return None
