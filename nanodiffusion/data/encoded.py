"""Samples encoded once and for all: latents, pooled texts, labels and captions in a folder, mapped and never unpickled.

PATH/  manifest.json   what is here: format, counts, where it is from, the hashes of codec and text encoder, and the size
                       and SHA-256 of every file
       latents.npy     (n c h w): bytes of a quantised range, or float16 or float32; flipped.npy: of the mirrored images
       pooled.npy      (n d) float16;  labels.npy (n) int64;  captions.jsonl: {"key", "caption"} a line
       context.npy     (n 77 d) float16 or float32: what a checkpoint's U-Net is told of the captions, of SDXL with pooled.npy
                       and sizes.npy (n 6); empty-context.npy (77 d), empty-pooled.npy: of no caption
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.data.files import SPLITS
from nanodiffusion.data.tensors import split as split_data
from nanodiffusion.errors import UserError, few, lookup, need
from nanodiffusion.tensors import file_sha256

FORMAT = "nanodiffusion encoded 1"
MANIFEST = "manifest.json"
CODING = ("factor", "scale", "shift")  # what a manifest says of its codec
LIMIT = 1 << 24  # bytes of a manifest
DTYPES = {torch.uint8, torch.float16, torch.float32}
TOLD = ("pooled", "context", "sizes")  # what is encoded beside a latent, as a condition is called
SIDES = 4  # the half that outpainting leaves open: left, right, top, bottom

# -- bytes for latents -------------------------------------------------------------------------------------------------


def quantise(x0: Tensor, limit: float) -> Tensor:
    """The nearest of 256 levels, evenly from -limit to limit, beyond which values are cut: (...) -> (...) uint8.

    |error| <= limit/255 inside the range and no bias; cutting fractions off instead would shift all by as much.
    """
    return ((x0.float() / limit + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def dequantise(levels: Tensor, limit: float) -> Tensor:
    """The values of levels: (...) uint8 -> (...) float32 in [-limit, limit]."""
    return levels.float().sub_(127.5).mul_(limit / 127.5)


# -- the data set ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Captions:
    """The captions of a file, or those of its `lines`, in that order; read when they are wanted."""

    path: Path
    lines: Tensor | None = None

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """One per sample. UserError: the file is damaged."""
        texts = read_captions(self.path)
        lines = range(len(texts)) if self.lines is None else self.lines.tolist()
        if lines and max(lines) >= len(texts):
            raise UserError("captions are missing", file=self.path, expected=max(lines) + 1, found=len(texts))
        return tuple(texts[i] for i in lines)

    def take(self, index: Tensor) -> "Captions":
        """Those of the samples `index` (k)."""
        index = index.cpu()
        return Captions(self.path, index if self.lines is None else self.lines[index])


@dataclass(frozen=True, eq=False)
class EncodedData:
    """A data set of latents with what was encoded beside them.

    x: (n c h w) float16, float32 or, with `limit`, bytes as `quantise` makes them. x0 is what they say times `scale`.
    flipped: the same of the mirrored images, of which `batch` takes one with probability 1/2: the mirror image of a
    latent is not the latent of a mirror image.
    labels (n) int64 index `classes`; pooled (n d) floats; texts: the captions; prompts (k d): texts' vectors to
    draw pictures for, where there are any.
    context (n m d), with pooled: what a checkpoint's U-Net is told; sizes (n 6): see `Pictures.batch`; empty: what it is told
    of no caption, by name, (1 ...) each. A set with contexts stays where it is, mapped, and sends its batches to `device`.
    rows: which rows of all these but the labels, in what order, make up this set; None for all. codec, text: what made them.
    outpaint: the share of draws of which a half, left, right, top or bottom alike often, is to be drawn anew while the
    other is known.
    """

    x: Tensor
    limit: float | None = None
    scale: float = 1.0
    flipped: Tensor | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    pooled: Tensor | None = None
    prompts: Tensor | None = None
    texts: Captions | None = None
    rows: Tensor | None = None
    codec: str = ""
    text: str = ""
    outpaint: float = 0.0
    context: Tensor | None = None
    sizes: Tensor | None = None
    empty: Mapping[str, Tensor] = field(default_factory=dict)
    coding: Mapping[str, float] = field(
        default_factory=dict
    )  # factor, scale and shift of the codec, where they are known
    device: torch.device | None = None

    def __post_init__(self) -> None:
        _check_latents(self.x, self.limit)
        _check_rows(self)
        if not 0 <= self.outpaint <= 1:
            raise UserError("this is no share of the draws", key="outpaint", expected="0 to 1", found=self.outpaint)
        if self.labels is not None and not self.labels.is_meta:
            object.__setattr__(self, "classes", _classes(self.labels, self.classes))

    def __len__(self) -> int:
        return len(self.x if self.rows is None else self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(c h w) of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def draws(self) -> int:
        """How many uniform numbers `batch` takes per sample: one to flip, one to outpaint."""
        return int(self.flipped is not None) + int(self.outpaint > 0)

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption of every sample, "" where it has none; () where none were encoded."""
        return () if self.texts is None else self.texts.texts

    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples `index` (b) as x0 (b c h w) float32 and cond, on the data's device; a pure function of index and u.

        cond: label (b), pooled (b d), context (b m d) and sizes (b 6) where there are any. With `outpaint`, concat (b c h w)
        is x0 where it is known and 0 elsewhere, and mask (b 1 h w) is 1 where it is not known, which is where the loss
        counts; where nothing is known concat is 0 and mask 1 throughout. u (b draws) in [0, 1): (flip, outpaint); without
        it, neither is done.
        """
        index = index.to(self.x.device)
        cond = {} if self.labels is None else {"label": self.labels.index_select(0, index)}
        if self.rows is not None:
            index = self.rows.index_select(0, index)
        u = None if u is None else u.to(self.x.device)
        x0 = self._values(self._latents(index, u))
        told = {name: rows for name in TOLD if (rows := getattr(self, name)) is not None}
        cond |= {name: rows.index_select(0, index) for name, rows in told.items()}
        if self.outpaint:
            mask = open_half(x0, torch.ones(len(x0), device=x0.device) if u is None else u[:, -1], self.outpaint)
            cond |= {"concat": x0 * (1 - mask), "mask": mask}
        return self._sent(x0), {name: self._sent(v) for name, v in cond.items()}

    def _sent(self, x: Tensor) -> Tensor:
        """Where the batch goes; numbers in float32, which are widened there."""
        x = x if self.device is None else x.to(self.device)
        return x.float() if x.is_floating_point() else x

    def _latents(self, index: Tensor, u: Tensor | None) -> Tensor:
        x = self.x.index_select(0, index)
        if self.flipped is None or u is None:
            return x
        mirrored = (u[:, 0] < 0.5)[:, None, None, None]
        return torch.where(mirrored, self.flipped.index_select(0, index), x)  # without a wait for the device

    def _values(self, x: Tensor) -> Tensor:
        x0 = x.float() if self.limit is None else dequantise(x, self.limit)
        return x0 if self.scale == 1 else x0.mul_(self.scale)

    def to(self, device: torch.device | str) -> "EncodedData":
        """The same set with its tensors on `device`, its own samples only; on the CPU the files stay mapped.

        One with contexts keeps them all mapped, a text's being larger than a picture's latent, and sends its batches there.
        """
        if self.context is not None:
            return replace(self, device=torch.device(device))
        if self.x.device == torch.device(device):
            return self
        rows = lambda t: (t if self.rows is None else t[self.rows]).to(device)
        moved = {k: rows(v) for k in ("x", "flipped", "pooled") if (v := getattr(self, k)) is not None}
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, **moved, labels=labels, rows=None)

    def square(self) -> "EncodedData":
        """The same set, whose latents are of one size."""
        return self

    def take(self, index: Tensor) -> "EncodedData":
        """The samples `index` (k), in that order; no latent is copied."""
        index = index.to(self.x.device)
        labels = None if self.labels is None else self.labels[index]
        texts = None if self.texts is None else self.texts.take(index)
        return replace(self, labels=labels, texts=texts, rows=index if self.rows is None else self.rows[index])


def open_half(x0: Tensor, u: Tensor, share: float) -> Tensor:
    """Masks of outpainting: u (b) in [0, 1) -> (b 1 h w) float32, 1 on what is to be drawn.

    Where u < share it is the half number floor(4 u / share): left, right, top, bottom; elsewhere everything. Of an odd
    side the half is the smaller part.
    """
    h, w = x0.shape[-2:]
    rows, columns = (torch.arange(n, device=x0.device) for n in (h, w))
    across, down = torch.ones(h, 1, device=x0.device), torch.ones(1, w, device=x0.device)
    left, right = across * (columns < w // 2), across * (columns >= w - w // 2)
    top, bottom = (rows < h // 2)[:, None] * down, (rows >= h - h // 2)[:, None] * down
    masks = torch.stack([left, right, top, bottom, across * down])[:, None]
    side = torch.where(u < share, (u * (SIDES / share)).long().clamp(max=SIDES - 1), SIDES)
    return masks.index_select(0, side)


def _check_latents(x: Tensor, limit: float | None) -> None:
    if x.dtype not in DTYPES or x.ndim != 4 or not x.numel():
        found = f"{x.dtype} {tuple(x.shape)}"
        raise UserError("these are no latents", key="x", expected="uint8, float16 or float32 (n c h w)", found=found)
    if (limit is None) == (x.dtype == torch.uint8):
        what = "bytes need the limit of their range, and nothing else has one"
        raise UserError(what, key="limit", expected="limit=20 or the like, for bytes", found=f"{x.dtype}, {limit}")
    if limit is not None and not 0 < limit < float("inf"):
        raise UserError("the range must be positive", key="limit", found=limit)


def _check_rows(data: EncodedData) -> None:
    for name, count in {**dict.fromkeys(("flipped", *TOLD), len(data.x)), "labels": len(data)}.items():
        part = getattr(data, name)
        if part is not None and len(part) != count:
            raise UserError("this does not belong to the latents", key=name, expected=count, found=len(part))
    if data.flipped is not None and (data.flipped.shape, data.flipped.dtype) != (data.x.shape, data.x.dtype):
        found = f"{data.flipped.dtype} {tuple(data.flipped.shape)}"
        raise UserError("the mirrored latents are of another kind", key="flipped", found=found)


def _classes(labels: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
    low, high = int(labels.min()), int(labels.max())
    if labels.dtype != torch.int64 or labels.ndim != 1 or low < 0 or (names and high >= len(names)):
        expected = f"int64 from 0 to {len(names) - 1}" if names else "int64 from 0"
        raise UserError("these are no labels", key="labels", expected=expected, found=f"{labels.dtype} {low} to {high}")
    return names or tuple(map(str, range(high + 1)))


# -- a folder ----------------------------------------------------------------------------------------------------------


def encoded(
    path: str,
    split: str = "train",
    flip: bool = False,
    outpaint: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    verify: bool = False,
) -> EncodedData:
    """What `nanodiffusion encode` wrote into `path`; the test set is path/test beside path/train, or a `test_fraction`.

    verify reads every file once and compares its SHA-256. UserError: no such folder, one edited, cut short or from
    another program, flip where the mirrored images were not encoded, and no test set.
    """
    lookup(SPLITS, split, "split")
    root = Path(path)
    parted = all((root / part / MANIFEST).is_file() for part in SPLITS)
    data = open_encoded(root / split if parted else root, flip, outpaint, verify)
    return data if parted else _side(data, split, test_fraction, seed)


def open_encoded(folder: Path, flip: bool = False, outpaint: float = 0.0, verify: bool = False) -> EncodedData:
    """One encoded folder whole, its files mapped. UserError: as `encoded`."""
    manifest = read_manifest(folder)
    check_files(folder, manifest, verify)
    if flip and not manifest["flipped"]:
        raise UserError("the mirrored images were not encoded", file=folder, key="flip", fix="encode with flip=true")
    try:
        latents, pooled, context = manifest["latents"], manifest["pooled"], manifest.get("context")
        arrays = {
            "x": latents["file"],
            "flipped": manifest["flipped"] if flip else None,
            "labels": manifest["labels"],
            "pooled": pooled["file"] if pooled else None,
            "context": context["file"] if context else None,
            "sizes": manifest.get("sizes"),
        }
        data = EncodedData(
            **{key: None if name is None else map_array(folder / name) for key, name in arrays.items()},  # type: ignore[arg-type]
            limit=latents["limit"],
            classes=tuple(manifest["classes"]),
            texts=Captions(folder / manifest["captions"]) if manifest["captions"] else None,
            codec=manifest["codec"]["where"],
            text=manifest["text"]["where"] if manifest["text"] else "",
            outpaint=outpaint,
            empty={name: map_array(folder / file)[None].float() for name, file in manifest.get("empty", {}).items()},
            coding={name: manifest["codec"][name] for name in CODING if name in manifest["codec"]},
        )
        _check_count(folder, data, manifest)
    except (KeyError, TypeError, AttributeError) as e:
        raise _damaged(folder / MANIFEST, f"no sound {e}") from None
    return data


def _check_count(folder: Path, data: EncodedData, manifest: Mapping[str, Any]) -> None:
    expected, found = [manifest["count"], *manifest["shape"]], list(data.x.shape)
    if expected != found:
        raise UserError("the latents are not those of the manifest", file=folder, expected=expected, found=found)


def _side(data: EncodedData, split: str, fraction: float, seed: int) -> EncodedData:
    if fraction:
        return split_data(data, fraction, seed)[SPLITS[split]]
    if SPLITS[split]:
        fix = "test_fraction=0.1 sets one aside; or encode it too, into PATH/train and PATH/test"
        raise UserError("this set has no test part", key="split", found=split, fix=fix)
    return data


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of an encoded folder. UserError: there is none, or it is not as it was written."""
    path = Path(folder) / MANIFEST
    try:
        with open(path, "rb") as file:
            text = file.read(LIMIT)
        manifest = json.loads(text)
        good = isinstance(manifest, dict) and manifest.get("format") == FORMAT and text == manifest_bytes(manifest)
    except FileNotFoundError:
        fix = "nanodiffusion encode SOURCE out=FOLDER makes one"
        raise UserError("nothing is encoded here", file=folder, expected=MANIFEST, fix=fix) from None
    except (OSError, ValueError, RecursionError) as e:
        raise _damaged(path, str(e)) from None
    if not good:
        raise _damaged(path, "another format, or edited")
    return manifest


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest, with a SHA-256 over everything else in it, so that no edit goes unseen."""
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True).encode()


def _damaged(path: Path, found: str) -> UserError:
    return UserError(
        "this manifest is damaged",
        file=path,
        expected=f"{FORMAT!r}, as it was written",
        found=found[:200],
        fix="encode again",
    )


def check_files(folder: Path, manifest: Mapping[str, Any], verify: bool = False) -> None:
    """UserError unless every file has the size, and with `verify` the SHA-256, that the manifest says."""
    for name, entry in manifest["files"].items():
        if Path(name).name != name:
            raise UserError("this manifest names a file outside its folder", file=folder / MANIFEST, found=repr(name))
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            found = "no such file" if size is None else f"{size} bytes"
            fix = "copy it again, or encode again"
            raise UserError(
                "this file is not as it was", file=path, expected=f"{entry['size']} bytes", found=found, fix=fix
            )
        if verify and (found := file_sha256(path)) != entry["sha256"]:
            expected, fix = f"SHA-256 {entry['sha256'][:16]}...", "copy it again, or encode again"
            raise UserError(
                "this file is not as it was", file=path, expected=expected, found=f"{found[:16]}...", fix=fix
            )


def read_captions(path: Path) -> list[str]:
    """The captions in a captions.jsonl, line by line. UserError: damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return [str(json.loads(line)["caption"]) for line in file]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError("the captions cannot be read", file=path, found=str(e)[:200]) from None


def map_array(path: Path) -> Tensor:
    """A .npy of numbers as a tensor that is mapped, so that its pages are read when they are used; writes stay private.

    UserError: no such file, cut short, a pickle inside, or numbers of a kind that torch does not have.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="c")  # maps numbers only: never unpickles
        return torch.from_numpy(np.ascontiguousarray(array))  # a copy where the columns come first, else the map itself
    except (OSError, ValueError, TypeError, EOFError) as e:
        raise UserError(
            "the file cannot be read", file=path, expected="numbers, whole and unpickled", found=str(e)
        ) from None


# -- arrays of others --------------------------------------------------------------------------------------------------


def latents(
    path: str,
    text_path: str = "",
    label_path: str = "",
    val_path: str = "",
    split: str = "train",
    limit: float = 20.0,
    scale: float = 0.125,
    outpaint: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    codec: str = "",
    text: str = "",
) -> EncodedData:
    """Latents z (n c h w) and pooled texts (n d) from .npy or .hdf5 files of other programs; x0 = scale z.

    Bytes are 256 levels from -limit to limit, floats as they are. The defaults are those of transformer_latent_diffusion,
    which divides an unscaled VAE's by 8; with scale=1 they are x0 already. label_path: integers (n).
    val_path: vectors (k d) to draw pictures for, the set's `prompts`.
    UserError: no such file, a pickle inside, lengths that differ, and no test set.
    """
    lookup(SPLITS, split, "split")
    files = {"x": path, "pooled": text_path, "labels": label_path, "prompts": val_path}
    arrays = {key: _named(key, file) for key, file in files.items() if file}
    bytes_ = arrays["x"].dtype == torch.uint8
    made: dict[str, Any] = {"limit": limit if bytes_ else None, "scale": scale, "codec": codec, "text": text}
    return _side(EncodedData(**arrays, **made, outpaint=outpaint), split, test_fraction, seed)


def _named(key: str, file: str) -> Tensor:
    """One array of a set, of the kind that its place wants."""
    array = read_array(Path(file))
    if array.is_floating_point() and not all(bool(part.isfinite().all()) for part in array.split(4096)):
        raise UserError("the array holds NaN or infinity", file=file, key=key, expected="finite numbers")
    if key == "labels" and not array.is_floating_point():
        return array.long()
    if key in ("pooled", "prompts") and (array.ndim != 2 or not array.is_floating_point()):
        found = f"{array.dtype} {tuple(array.shape)}"
        raise UserError("these are no texts' vectors", file=file, key=key, expected="floats (n d)", found=found)
    return array.float() if key == "prompts" else array


def read_array(path: Path) -> Tensor:
    """A .npy, mapped, or the only array (or the first, by name) of an .hdf5, read. UserError: as `map_array`."""
    readers: dict[str, Callable[[Path], Tensor]] = {".npy": map_array, ".hdf5": _read_hdf5, ".h5": _read_hdf5}
    return lookup(readers, path.suffix, "file type")(path)


def _read_hdf5(path: Path) -> Tensor:
    """The first data set of an HDF5 file, by name."""
    h5py = need("h5py", "data")
    try:
        with h5py.File(path, "r") as file:
            names = [name for name in file if isinstance(file[name], h5py.Dataset)]
            if not names:
                raise ValueError(f"no array at its top: {few(file)}")
            return torch.from_numpy(file[names[0]][...])
    except (OSError, ValueError, TypeError, RuntimeError) as e:
        raise UserError("the file cannot be read", file=path, expected="HDF5 with an array", found=str(e)) from None
