"""Checkpoints that outlive kill -9, full disks and bit rot: written beside, synced, hashed, renamed into place.

runs/x/checkpoint/
  step-00001000/   model.safetensors ... state.json, and manifest.json: size and SHA-256 of each
  best/            the same
  .tmp-NAME/       a save under way, or killed: the next save removes it
  .old-NAME/       what a save of the same name replaces: readable until the new one stands in its place

One process saves into a folder, or all of one run do together: then a file is in parts, model.part-0-of-2 and so on, which
together are read as one. Any number of processes may read.
"""

import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError

Tensors = Mapping[str, Tensor]

META_KEY = "nanodiffusion"
MANIFEST, STATE, SUFFIX = "manifest.json", "state.json", ".safetensors"
MANIFEST_LIMIT = 1 << 20  # bytes: an honest manifest has some 100 per file, a hostile one must not fill the memory

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# ---- one file of tensors -------------------------------------------------------------------------


def save_tensors(path: str | Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file that is either whole or not there.

    Shared and non-contiguous tensors are written out in full. UserError: full or unwritable disk, unsupported
    dtype or layout.
    """
    path = Path(path)
    write_whole(path, _safetensors(tensors, meta), path.with_name(f".tmp-{path.name}"))


def write_whole(path: Path, chunks: Iterable[bytes | memoryview], beside: Path) -> dict[str, Any]:
    """Write one file that is either whole or not there, by way of `beside`; its size and SHA-256.

    UserError: full or unwritable disk.
    """
    with _write_errors(path):
        _make_folder(path.parent)
        try:
            entry = _write(beside, chunks)
            os.replace(beside, path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
    return entry


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file and its `meta` ({} in a file that others wrote).

    UserError: missing, truncated, damaged, or another format (a pickle is recognised and never opened).
    """
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _meta(file, path)  # noqa: SIM118


def load_meta(path: str | Path) -> dict[str, Any]:
    """The `meta` of a safetensors file, reading nothing but its header. UserError: as load_tensors."""
    with _opened(path, "cpu") as file:
        return _meta(file, path)


def content_hash(tensors: Tensors) -> str:
    """SHA-256 of names, shapes, kinds and numbers, whatever order they are in."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safetensors(tensors: Tensors, meta: dict[str, Any]) -> Iterator[bytes | memoryview]:
    """The bytes of the file, tensor by tensor, so that saving never holds a second copy of the model.

    Header length (u64), JSON header padded with spaces to 8 bytes, data: https://huggingface.co/docs/safetensors
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    # the widest first, so that each tensor lies aligned in a memory-mapped file
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {META_KEY: _json(meta, "meta")}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _chain(text, (tensors[name] for name in order))


def _chain(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_storable(name: str, tensor: Tensor) -> None:
    if name == "__metadata__":
        raise UserError("safetensors keeps this name for itself", key=name, fix="rename the tensor")
    if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
        found = f"{tensor.dtype}, {tensor.layout}"
        raise UserError("safetensors cannot hold this tensor", key=name, expected="a dense tensor", found=found)


@contextmanager
def _opened(path: str | Path, device: str | torch.device) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (OSError, SafetensorError) as e:
        raise _unreadable(Path(path), e) from e


def _unreadable(path: Path, error: Exception) -> UserError:
    expected = "a safetensors file"
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        return UserError("cannot load tensors", file=path, expected=expected, found=found, fix="check the path")
    found, fix = _resembles(path)
    return UserError("cannot load tensors", file=path, expected=expected, found=f"{found} ({error})", fix=fix)


def _resembles(path: Path) -> tuple[str, str]:
    """What a file that is no sound safetensors looks like, and what to do about it."""
    try:
        with open(path, "rb") as f:
            head = f.read(32)
    except OSError:
        return "a file that cannot be read", "check its permissions"
    if head[8:9] == b"{":  # the JSON header is there, so what follows it must be short or damaged
        return "a truncated or damaged one", "copy or download it again, or take an older checkpoint"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a pickle, which can run code and is never opened", "ask for, or convert to, safetensors"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "run `git lfs pull`"
    return f"{path.stat().st_size} bytes of something else", "copy or download it again"


def _meta(file: Any, path: str | Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(META_KEY, "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError("the header of this file is damaged", file=path, key=META_KEY, found=str(e)) from e


# ---- a folder of them: one checkpoint ------------------------------------------------------------


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
        contents[_plain(stem) + mine + SUFFIX] = _safetensors(tensors, meta)
    if world.first:
        contents[STATE] = [_json({"step": step, "state": state}, "state").encode()]
    try:
        with _agreed(world), _write_errors(target):
            if world.first:
                _make_folder(root)
                _tidy(root)
                beside.mkdir()
        with _agreed(world), _write_errors(target):
            entries = {file: _write(beside / file, chunks) for file, chunks in contents.items()}
        entries = {file: entry for part in world.told(entries) for file, entry in part.items()}
        with _agreed(world), _write_errors(target):
            if world.first:
                _write(beside / MANIFEST, [_manifest(entries)])
                _sync(beside)
                if target.exists():
                    os.replace(target, root / f".old-{name}")
                os.replace(beside, target)
                _sync(root)
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


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write one file through to the disk, hashing on the way; its manifest entry."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for chunk in chunks:
            f.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        f.flush()
        os.fsync(f.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def _make_folder(folder: Path) -> None:
    """`mkdir -p` that puts each new name through to the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space" if full else "check that the folder is writable and its disk sound"
        raise UserError(
            "cannot save: what was saved before is intact", file=path, found=e.strerror or str(e), fix=fix
        ) from e


def _json(value: Any, key: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError("this cannot be written as JSON", key=key, found=str(e)) from e


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


# ---- optimizer, scheduler and scaler states ------------------------------------------------------

_MAPPINGS = {"dict": dict, "ordered": OrderedDict, "counter": Counter}


def pack_state(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split any torch state_dict into its tensors and a JSON-able structure: what save_checkpoint takes as a file.

    Types, order, inf and nan come back exactly. UserError: a leaf that is neither tensor, number, text nor None,
    naming its key.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(state_dict, "", tensors)


def unpack_state(tensors: Tensors, structure: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that pack_state split. UserError: tensors and structure do not belong together."""
    try:
        return _unpack(structure, tensors)
    except (KeyError, ValueError, TypeError, RecursionError) as e:
        raise UserError("this saved state is damaged", found=repr(e), fix="take an older checkpoint") from e


def _pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        while key in tensors or not key:  # {"a.b": ...} and {"a": {"b": ...}} spell the same path
            key += "'"
        tensors[key] = value.detach()
        return {"tensor": key}
    if kind is float and not math.isfinite(value):  # JSON has no word for it
        return {"float": repr(value)}
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        items = [_pack(item, _join(key, i), tensors) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    for name, mapping in _MAPPINGS.items():
        if kind is mapping and all(type(k) in (int, str) for k in value):
            return {name: [[k, _pack(item, _join(key, k), tensors)] for k, item in value.items()]}
    raise UserError(
        "this state cannot be saved without pickle",
        key=key,
        expected="tensors, numbers, text, None, and lists, tuples or dicts (int or str keys) of them",
        found=f"{kind.__module__}.{kind.__qualname__}",
    )


def _join(key: str, part: int | str) -> str:
    return f"{key}.{part}" if key else str(part)


def _unpack(node: Any, tensors: Tensors) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, body),) = node.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "float":
        return float(body)
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in body)
    return _MAPPINGS[kind]({key: _unpack(item, tensors) for key, item in body})


# ---- weights into a net --------------------------------------------------------------------------


def load_weights(net: nn.Module, tensors: Tensors, file: object = None) -> None:
    """Copy `tensors` into `net`, every one and no other. UserError: names or shapes that do not fit."""
    check_fit(net.state_dict(), tensors, file)
    net.load_state_dict(dict(tensors), strict=True)


def check_fit(expected: Tensors, found: Tensors, file: object = None) -> None:
    """UserError unless both have the same names and shapes: says the first few and the nearest names."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        raise UserError(
            "these weights belong to another network",
            file=file,
            expected=f"{len(expected)} tensors, {len(missing)} of them missing{_few(missing)}",
            found=f"{len(found)} tensors, {len(unexpected)} of them unexpected{_few(unexpected)}",
            fix=_renames(missing, unexpected) or "build the net from the config in the file's own header",
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            want, have = tuple(tensor.shape), tuple(found[name].shape)
            raise UserError("this weight has the wrong shape", file=file, key=name, expected=want, found=have)


def _few(names: list[str]) -> str:
    return (": " if names else "") + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _renames(missing: list[str], unexpected: list[str]) -> str:
    nearest = ((name, difflib.get_close_matches(name, unexpected, n=1)) for name in missing[:3])
    pairs = [f"{close[0]} -> {name}" for name, close in nearest if close]
    return "the nearest names: " + ", ".join(pairs) if pairs else ""
