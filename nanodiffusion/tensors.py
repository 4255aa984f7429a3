"""Tensors on the disk: one safetensors file, whole or not there; any state as tensors and JSON; weights into a net."""

import difflib
import errno
import hashlib
import json
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanodiffusion.errors import UserError

Tensors = Mapping[str, Tensor]

META_KEY, SUFFIX = "nanodiffusion", ".safetensors"
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


# -- one file ------------------------------------------------------------------------------------------------------------


def save_tensors(path: str | Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file that is either whole or not there.

    Shared and non-contiguous tensors are written out in full. UserError: full or unwritable disk, unsupported
    dtype or layout.
    """
    path = Path(path)
    write_whole(path, file_chunks(tensors, meta), path.with_name(f".tmp-{path.name}"))


def write_whole(path: Path, chunks: Iterable[bytes | memoryview], beside: Path) -> dict[str, Any]:
    """Write one file that is either whole or not there, by way of `beside`; its size and SHA-256.

    UserError: full or unwritable disk.
    """
    with write_errors(path):
        make_folder(path.parent)
        try:
            entry = write_file(beside, chunks)
            os.replace(beside, path)
            sync(path.parent)
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


def file_chunks(tensors: Tensors, meta: dict[str, Any]) -> Iterator[bytes | memoryview]:
    """The bytes of the file, tensor by tensor, so that saving never holds a second copy of the model.

    Header length (u64), JSON header padded with spaces to 8 bytes, data: https://huggingface.co/docs/safetensors
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    # the widest first, so that each tensor lies aligned in a memory-mapped file
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {META_KEY: as_json(meta, "meta")}}
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


# -- written through to the disk -----------------------------------------------------------------------------------------


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
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


def make_folder(folder: Path) -> None:
    """`mkdir -p` that puts each new name through to the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """A disk's refusal as a UserError that names `path`."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space" if full else "check that the folder is writable and its disk sound"
        raise UserError(
            "cannot save: what was saved before is intact", file=path, found=e.strerror or str(e), fix=fix
        ) from e


def as_json(value: Any, key: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError("this cannot be written as JSON", key=key, found=str(e)) from e


# -- optimizer, scheduler and scaler states ------------------------------------------------------------------------------

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


# -- weights into a net --------------------------------------------------------------------------------------------------


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
