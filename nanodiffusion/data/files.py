"""The user's own data: a folder of images, or an array file."""

import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanodiffusion.data.tensors import TensorData, at_least
from nanodiffusion.data.tensors import split as split_data
from nanodiffusion.errors import UserError, lookup

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SIDECARS = (".txt", ".caption", ".json")  # what may lie beside x.png and says something of it
FORMATS = ("PNG", "JPEG", "WEBP")
MODES: dict[Any, str] = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
MAX_PIXELS = 64_000_000
SPLITS = {"train": 0, "test": 1}


def folder(
    path: str,
    size: int,
    split: str = "train",
    channels: int = 3,
    flip: bool = False,
    crop_padding: int = 0,
    skip_bad: bool = False,
    test_fraction: float = 0.0,
    seed: int = 0,
    max_gib: float = 8.0,
) -> TensorData:
    """The PNG, JPEG and WEBP images below `path` as `load_image` reads them: uint8 (n c size size), channels c 1 or 3.

    Where a folder itself holds no image, its sub-folders are the classes. The test set is path/test beside path/train,
    else the `test_fraction` that `tensors.split(all, test_fraction, seed)` sets aside. `skipped` names the files left
    out: those that are not images and, with `skip_bad`, those that cannot be read.
    UserError on an empty folder, an image that is damaged or above 64 megapixels, and a set above `max_gib` GiB.
    """
    root, mode = Path(path), lookup(MODES, channels, "channels")
    lookup(SPLITS, split, "split")
    parted = all((root / part).is_dir() for part in SPLITS)
    home, train = (root / split, root / "train") if parted else (root, root)
    files, others = _listing(home)
    x, bad = _read_images(files, at_least(size, 1, "size"), mode, max_gib)
    if bad and not skip_bad:
        _refuse(bad, len(files))
    good = [i for i, file in enumerate(files) if file not in bad]
    if not good:
        found = f"{len(others)} other files, {len(bad)} damaged images"
        raise UserError("there is no image here", file=home, expected=" ".join(SUFFIXES), found=found)
    labels, classes = _folder_labels([files[i] for i in good], home, train)
    skipped = (*(f"{file}: not an image" for file in others), *(f"{file}: {why}" for file, why in bad.items()))
    if skipped:
        warnings.warn(f"{len(skipped)} files left out, first {skipped[0]}", stacklevel=2)
    data = TensorData(x[good] if bad else x, labels, classes, flip, crop_padding, skipped=skipped)
    return data if parted else _side(data, split, test_fraction, seed)


def array(
    path: str,
    split: str = "train",
    key: str = "x",
    label_key: str = "label",
    flip: bool = False,
    crop_padding: int = 0,
    test_fraction: float = 0.0,
    seed: int = 0,
    max_gib: float = 8.0,
) -> TensorData:
    """Samples from .npy, .npz or .safetensors: floats (n ...) as they are or uint8 images (n c h w), labels if present.

    The test set is the `test_fraction` that `tensors.split(all, test_fraction, seed)` sets aside.
    UserError on a damaged or pickled file, a missing key, NaN, and a file above `max_gib` GiB.
    """
    file = Path(path)
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    with _naming(file):
        tensors = lookup(readers, file.suffix, "file type")(file, (key, label_key), max_gib)
        x = _samples(lookup(tensors, key, "key"))
        data = TensorData(x, _whole(tensors.get(label_key), label_key), (), flip, crop_padding)
        return _side(data, split, test_fraction, seed)


def _side(data: TensorData, split: str, test_fraction: float, seed: int) -> TensorData:
    """The part of `data` that `split` names."""
    side = lookup(SPLITS, split, "split")
    if test_fraction:
        return split_data(data, test_fraction, seed)[side]
    if side:
        raise UserError("this set has no test part", key="split", found=split, fix="test_fraction=0.1 sets one aside")
    return data


def _check_memory(needed: int, max_gib: float) -> None:
    if needed > max_gib * 2**30:
        raise UserError(
            "the set does not fit in memory",
            key="max_gib",
            expected=f"at most {max_gib:g} GiB",
            found=f"{needed / 2**30:.2f} GiB",
            fix="a smaller size, or a larger max_gib",
        )


# ---- images


def load_image(file: str | Path, size: int, mode: str = "RGB") -> np.ndarray:
    """One image, upright, on white where transparent, its central square resized to `size`: uint8 (c size size).

    Bicubic over the area each new pixel covers. The header is read first: nothing above 64 megapixels is decoded.
    """
    with Image.open(file, formats=FORMATS) as image:
        _check_size(image)
        image.draft(mode, (2 * size, 2 * size))  # a JPEG decodes at a fraction of its size where that is enough
        square = ImageOps.fit(opaque(ImageOps.exif_transpose(image)), (size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(square.convert(mode))).transpose(2, 0, 1)


def open_image(file: str | Path) -> Image.Image:
    """One image whole, upright, on white where transparent: RGB or 8-bit grey. UserError, which names the file.

    The header is read first: nothing above 64 megapixels is decoded, and nothing but PNG, JPEG and WEBP.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's, on what is above our own limit
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image)
                return opaque(ImageOps.exif_transpose(image))
    except Exception as e:  # a damaged file makes Pillow raise nearly anything
        expected = f"a sound PNG, JPEG or WEBP of at most {MAX_PIXELS / 1e6:g} megapixels"
        raise UserError("the picture cannot be read", file=file, expected=expected, found=_reason(e)) from None


def _reason(e: Exception) -> str:
    return e.strerror or str(e) if isinstance(e, OSError) else str(e) or type(e).__name__


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, above {MAX_PIXELS / 1e6:g} megapixels")


def opaque(image: Image.Image) -> Image.Image:
    """RGB or 8-bit grey: 16-bit grey loses its low byte (Pillow would clip it), transparency goes on white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _read_images(files: list[Path], size: int, mode: str, max_gib: float) -> tuple[Tensor, dict[Path, str]]:
    """Every image that can be read, (n c size size), and why the others cannot."""
    _check_memory(len(files) * len(mode) * size**2, max_gib)
    x = np.zeros((len(files), len(mode), size, size), np.uint8)
    bad: dict[Path, str] = {}

    def load(i: int) -> None:
        try:
            x[i] = load_image(files[i], size, mode)
        except Exception as e:  # a damaged file makes Pillow raise nearly anything
            bad[files[i]] = str(e) or type(e).__name__

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, range(len(files))))
    return torch.from_numpy(x), {file: bad[file] for file in files if file in bad}


def _refuse(bad: dict[Path, str], total: int) -> None:
    file, why = next(iter(bad.items()))
    fix = "mend or remove them, or skip_bad=true leaves them out"
    raise UserError(f"{len(bad)} of {total} images cannot be read, first:", file=file, found=why, fix=fix)


def _listing(root: Path) -> tuple[list[Path], list[Path]]:
    """The images and the other files below `root`, sorted; hidden files and captions beside images are neither."""
    if not root.is_dir():
        raise UserError("there is no such folder", file=root, fix="path=FOLDER, a folder of images")
    try:
        files = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p, root))
    except OSError as e:
        raise UserError("the folder cannot be read", file=root, found=e.strerror) from e
    images = [p for p in files if p.suffix.lower() in SUFFIXES]
    captioned = {p.with_suffix(end) for p in images for end in SIDECARS}
    return images, [p for p in files if p.suffix.lower() not in SUFFIXES and p not in captioned]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _folder_labels(files: list[Path], home: Path, train: Path) -> tuple[Tensor | None, tuple[str, ...]]:
    """The label (n) of each file in `home`, the number of its class folder in `train`, and the classes; or None, ()."""
    known = [p.relative_to(train).parts for p in _listing(train)[0]]
    if any(len(parts) == 1 for parts in known):
        return None, ()
    classes = tuple(sorted({parts[0] for parts in known}))
    numbers = {name: i for i, name in enumerate(classes)}
    return torch.tensor([lookup(numbers, p.relative_to(home).parts[0], "class") for p in files]), classes


# ---- arrays


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Every failure inside becomes a UserError that names the file."""
    try:
        yield
    except UserError as e:
        raise UserError(e.what, **cast(Any, e.details | {"file": file})) from e
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, SafetensorError) as e:
        raise UserError("the file cannot be read", file=file, expected="numbers, whole and unpickled", found=e) from e


def _read_npy(file: Path, keys: tuple[str, ...], max_gib: float) -> dict[str, Tensor]:
    """A .npy holds one array, the samples."""
    mapped = np.lib.format.open_memmap(file, mode="r")  # maps numbers only: never unpickles
    _check_memory(mapped.nbytes, max_gib)
    return {keys[0]: _tensor(mapped)}


def _read_npz(file: Path, keys: tuple[str, ...], max_gib: float) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        _check_memory(sum(m.file_size for m in archive.infolist()), max_gib)
    with np.load(file, allow_pickle=False) as arrays:
        return {name: _tensor(arrays[name]) for name in keys if name in arrays}


def _read_safetensors(file: Path, keys: tuple[str, ...], max_gib: float) -> dict[str, Tensor]:
    _check_memory(file.stat().st_size, max_gib)
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        return {name: tensors.get_tensor(name) for name in keys if name in names}


def _tensor(values: np.ndarray) -> Tensor:
    """A copy of an array as a tensor: uint8 stays, other whole numbers become int64, fractions float32."""
    if values.dtype.kind not in "biuf":
        raise UserError("the array does not hold numbers", found=values.dtype)
    kind = np.float32 if values.dtype.kind == "f" else np.uint8 if values.dtype == np.uint8 else np.int64
    return torch.from_numpy(np.array(values, dtype=kind))


def _samples(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x.float()
    if x.ndim == 4 and x.shape[1] > 4 >= x.shape[3]:
        fix = "x.transpose(0, 3, 1, 2)"
        raise UserError("images have their channels first", expected="(n c h w)", found=tuple(x.shape), fix=fix)
    return x


def _whole(labels: Tensor | None, key: str) -> Tensor | None:
    if labels is None:
        return None
    if labels.is_floating_point():
        raise UserError("labels are whole numbers", key=key, expected="integers (n)", found=labels.dtype)
    return labels.long()
