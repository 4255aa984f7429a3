"""Published weights from disk into a network: built on `meta`, memory-mapped, assigned, every name accounted for.

Nothing is copied that need not be: at the file's own dtype on the CPU the network's parameters *are* the mapped file.
Another dtype or device is reached one tensor at a time, so the peak is the result and a little.
"""

import difflib
import gc
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanodiffusion.errors import UserError, few
from nanodiffusion.pretrained.layouts import Piece
from nanodiffusion.tensors import load_meta, sync

Module = TypeVar("Module", bound=nn.Module)
Rename = Callable[[Iterable[str]], Mapping[str, Piece]]  # names in the file -> the network's name -> where it is read

STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call a component's weights
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # keep: the file's
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
JSON_LIMIT = 1 << 26  # bytes; the index of a hundred thousand tensors has a tenth of it
WINDOW = 1 << 24  # bytes copied from one mapping before it is dropped, at least

# -- where the tensors are -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: nothing of its content is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors says it: "F32", "F16", "BF16"


@dataclass(frozen=True)
class Source:
    """The safetensors files that hold one network's weights, in order; with an index, what it promises of them."""

    files: tuple[Path, ...]
    index: Path | None = None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Name -> Entry in the order of the files. UserError: damaged, missing or incomplete files, a name twice."""
        found: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in _header(file):
                if name in found:
                    raise UserError("two files hold this tensor", file=file, key=name, found=found[name].file)
                found[name] = entry
        if self.index:
            _check_promises(self.index, found)
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def shapes_of(self, pieces: Mapping[str, Piece]) -> dict[str, tuple[int, ...]]:
        """Name -> the shape that its piece of a file's tensor has."""
        return {
            name: shape if piece.how == "same" else piece.shape(shape)
            for name, piece in pieces.items()
            for shape in [self.entries[piece.source].shape]
        }

    @property
    def where(self) -> Path:
        """What to call the source in a message."""
        return self.index or self.files[0]

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Name -> the tensor, memory-mapped: all of them, or those named."""
        chosen = list(self.entries if names is None else names)
        return dict(zip(chosen, (tensor for _, tensor in _mapped(((n, self.entries[n]) for n in chosen), None))))


def source_of(path: str | Path, variant: str | None = None) -> Source:
    """The weights at `path`: a safetensors file, an index of shards, or a component's folder.

    variant: "fp16" reads model.fp16.safetensors. UserError: nothing there, only a pickle, no such variant.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path, variant)
    if path.name.endswith(".json"):
        return _sharded(path)
    if path.suffix in PICKLES:
        raise pickled(path)
    return Source((path,))


def pickled(path: Path) -> UserError:
    """What to say of a pickle."""
    fix = f"nanodiffusion convert {path} {path.with_suffix('.safetensors').name}"
    found = "a pickle, which can run code and is never opened here"
    return UserError("cannot load weights", file=path, expected="safetensors", found=found, fix=fix)


def _in_folder(folder: Path, variant: str | None) -> Source:
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        file, index = folder / f"{stem}{middle}.safetensors", folder / f"{stem}.safetensors.index{middle}.json"
        if file.is_file():
            return Source((file,))
        if index.is_file():
            return _sharded(index)
    alone = sorted(folder.glob("*.safetensors"))
    if len(alone) == 1 and not variant and not variants(folder):
        return Source((alone[0],))
    raise _no_weights(folder, variant)


def variants(folder: str | Path) -> list[str]:
    """The variants a component's folder holds, such as ["fp16"]; the plain one is not named."""
    shard = r"(?:-\d+-of-\d+)?"
    pattern = re.compile(rf"(?:{'|'.join(STEMS)})(?:\.(\w+){shard}\.safetensors|\.safetensors\.index\.(\w+)\.json)")
    names = [pattern.fullmatch(file.name) for file in Path(folder).iterdir()]
    return sorted({m[1] or m[2] for m in names if m})


def has_plain(folder: str | Path) -> bool:
    """Whether a component's folder holds weights of no variant."""
    names = [f"{stem}{end}" for stem in STEMS for end in (".safetensors", ".safetensors.index.json")]
    return any((Path(folder) / name).is_file() for name in names)


def _no_weights(folder: Path, variant: str | None) -> UserError:
    wanted = f"{STEMS[0]}{'.' * bool(variant)}{variant or ''}.safetensors or a like one"
    others = variants(folder)
    if others or variant:
        found = f"variants {', '.join(others)}" if others else "no variant but the plain one, or none at all"
        fix = f"variant={others[0]}" if others else "leave variant out"
        return UserError("no such variant of the weights", file=folder, expected=wanted, found=found, fix=fix)
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return pickled(pickles[0])
    names = sorted(file.name for file in folder.iterdir())
    found = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "an empty folder"
    return UserError("this folder holds no weights", file=folder, expected=wanted, found=found)


def _sharded(index: Path) -> Source:
    shards = sorted({_plain_name(index, name, shard) for name, shard in weight_map(index).items()})
    if not shards:
        raise UserError("this index names no tensors", file=index, key="weight_map")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        found = f"{len(shards) - len(missing)} of {len(shards)} shards"
        fix = "copy or download what is missing"
        raise UserError(f"a shard is missing{more}", file=index.parent / missing[0], found=found, fix=fix)
    return Source(tuple(index.parent / shard for shard in shards), index)


def weight_map(index: Path) -> dict[str, str]:
    """What an index of shards promises: tensor name -> file name."""
    promised = read_json(index).get("weight_map")
    if not isinstance(promised, dict):
        expected, found = "{tensor name: file name}", type(promised).__name__
        raise UserError("this is no index of shards", file=index, key="weight_map", expected=expected, found=found)
    return promised


def _plain_name(index: Path, name: str, shard: Any) -> str:
    if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
        expected = "the name of a safetensors file beside the index"
        raise UserError("this index points elsewhere", file=index, key=name, expected=expected, found=repr(shard))
    return shard


def _check_promises(index: Path, found: Mapping[str, Entry]) -> None:
    for name, shard in weight_map(index).items():
        if name not in found or found[name].file.name != shard:
            has = f"it is in {found[name].file.name}" if name in found else "it is in no shard"
            fix = "the shards and their index are of different models: copy or download them again"
            raise UserError("a shard lacks a tensor", file=index.parent / shard, key=name, found=has, fix=fix)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. UserError: missing, unreadable, too long or deep, or something else."""
    try:
        with open(path, "rb") as file:
            text = file.read(JSON_LIMIT + 1)
        value = json.loads(text) if len(text) <= JSON_LIMIT else None
    except OSError as e:
        raise UserError("this file cannot be read", file=path, found=e.strerror or str(e)) from None
    except (ValueError, RecursionError) as e:
        raise UserError(
            "this is no sound JSON", file=path, found=str(e)[:200], fix="copy or download it again"
        ) from None
    if not isinstance(value, dict):
        found = "more than 64 MiB" if value is None else type(value).__name__
        raise UserError("this file holds something else", file=path, expected="a JSON object", found=found)
    return value


def _header(file: Path) -> Iterator[tuple[str, Entry]]:
    load_meta(file)  # says in words what is wrong with a file that is missing, damaged or something else
    with safe_open(file, framework="pt") as opened:
        for name in opened.offset_keys():
            part = opened.get_slice(name)
            yield name, Entry(file, tuple(part.get_shape()), part.get_dtype())


# -- into a network ------------------------------------------------------------------------------------------------------


def load(
    build: Callable[[], Module],
    source: Source,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    rename: Rename | None = None,
) -> Module:
    """The network that `build` makes, with the weights of `source`: built on meta, no weight initialised in vain.

    dtype: of every floating-point weight; None keeps the file's. rename: where each weight is read when the file's names are
    not the network's. The result is in eval mode and wants no gradients. UserError: names or shapes that do not fit.
    """
    with _uncollected():
        return _load(build, source, dtype, torch.device(device), rename)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: thousands of new modules and tensors set it off again and again, for nothing.

    SDXL's U-Net in a fresh process: 0.19 s with it, 0.10 s without.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _load(
    build: Callable[[], Module], source: Source, dtype: torch.dtype | None, device: torch.device, rename: Rename | None
) -> Module:
    with _OnMeta():
        module = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    pieces = _pieces(wanted, source, rename)
    check_names(wanted, source.shapes_of(pieces), source)
    module.load_state_dict(dict(_moved(pieces, source, dtype, device)), strict=True, assign=True)
    for tensor in (*module.parameters(), *module.buffers()):  # buffers outside the state dict too
        if tensor.is_meta:
            raise _without_values(module)
        tensor.requires_grad_(False)
    return module.eval()


class _OnMeta(TorchFunctionMode):
    """Tensors are made on meta, as under torch.device("meta"), and initialisation, which has nothing to fill, is left out."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        if function in _MAKERS and (kwargs is None or kwargs.get("device") is None):
            return function(*args, **{**(kwargs or {}), "device": "meta"})
        return function(*args, **(kwargs or {}))


_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.tensor, torch.eye}
_MAKERS |= {torch.arange, torch.linspace, torch.logspace, torch.randint, torch.randperm, torch.empty_strided}
_FILLS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.ones_, nn.init.zeros_}
_FILLS |= {Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_}


def _pieces(wanted: Mapping[str, Any], source: Source, rename: Rename | None) -> Mapping[str, Piece]:
    if rename is None or wanted == source.shapes:
        return {name: Piece(name) for name in source.entries}
    return rename(source.entries)


def _moved(
    pieces: Mapping[str, Piece], source: Source, dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each weight at its dtype and device, in the order of the file."""
    place = {name: i for i, name in enumerate(source.entries)}
    order = sorted(pieces, key=lambda name: place[pieces[name].source])
    used = [source.entries[pieces[name].source] for name in order]
    stays = device.type == "cpu" and (dtype is None or {entry.dtype for entry in used} == {_NAMES.get(dtype)})
    size = sum(entry.file.stat().st_size for entry in {entry.file: entry for entry in used}.values())
    mapped = _mapped(((pieces[n].source, e) for n, e in zip(order, used)), None if stays else max(WINDOW, size // 64))
    for name, (_, tensor) in zip(order, mapped):
        part = pieces[name].read(tensor)
        yield name, part.to(device, dtype if part.is_floating_point() else None).contiguous()


_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def _mapped(entries: Iterable[tuple[str, Entry]], window: int | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a memory-mapped file, one by one.

    A page that was read counts as the process's memory for as long as its mapping lives; after `window` bytes the file is
    therefore mapped anew, and the old mapping goes with its last tensor.
    """
    file, opened, start, read = None, None, 0, 0
    for name, entry in entries:
        try:
            if opened is None or entry.file != file or (window and read > window):
                start = start + read if entry.file == file else 0
                file, opened, read = entry.file, safe_open(entry.file, framework="pt"), 0
                if window:
                    _read_ahead(file, start, 4 * window)
            tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise UserError("this tensor cannot be read", file=entry.file, key=name, found=str(e)) from e
        read += tensor.nbytes
        yield name, tensor


def _read_ahead(file: Path, start: int, length: int) -> None:
    """Ask the system to have this part of a file in memory soon; a mapping alone is read in small steps, as it is touched."""
    with suppress(OSError, AttributeError):  # not every system can be asked
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def check_names(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Source) -> None:
    """UserError unless both have the same names and shapes: all three kinds of misfit in one message."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} {found[name]} for {wanted[name]}" for name in wanted if name in found and wanted[name] != found[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(kinds.values()):
        listed = [f"{len(names)} {kind}: {few(names)}" for kind, names in kinds.items() if names]
        raise UserError(
            "these weights do not fit the network",
            file=source.where,
            expected=f"{len(wanted)} tensors",
            found="; ".join(listed),
            fix=_nearest_names(missing, unexpected),
        )


def _nearest_names(missing: list[str], unexpected: list[str]) -> str | None:
    close = ((name, difflib.get_close_matches(name, unexpected[:2000], n=1)) for name in missing[:3])
    pairs = [f"{match[0]} for {name}" for name, match in close if match]
    return "the nearest names in the file: " + ", ".join(pairs) if pairs else None


def _without_values(module: nn.Module) -> UserError:
    names = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    fix = "compute it in forward, or make it a persistent buffer"
    return UserError("a tensor of the network is in no file and has no values", key=few(names), fix=fix)


# -- back to disk --------------------------------------------------------------------------------------------------------


def save(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors as other libraries do, the mark `format: pt` in the header, into a file that is whole or not there.

    UserError: full or unwritable disk.
    """
    from safetensors.torch import save_file

    path = Path(path)
    beside = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.touch()
            mode = beside.stat().st_mode  # save_file makes its own, which others may not read
            save_file(_apart(tensors), beside, {"format": "pt"})
            beside.chmod(mode)
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    return path


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, and none of them the memory of another, as the format wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        again = tensor.data_ptr() in seen and tensor.numel() > 0
        seen.add(tensor.data_ptr())
        out[name] = tensor.clone() if again else tensor
    return out


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A disk's refusal as a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        found = getattr(e, "strerror", None) or str(e)
        fix = "free some space, or check that the folder is writable and its disk sound"
        raise UserError("cannot save: nothing was written", file=path, found=found, fix=fix) from e
