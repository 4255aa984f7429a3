"""Images to evaluate, batch by batch: from an array file, a folder, a data set by name, or whatever can draw them."""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanodiffusion.data import DATASETS, TensorData, load_data
from nanodiffusion.data.files import FORMATS, SUFFIXES, load_image, open_image
from nanodiffusion.errors import UserError, nearest
from nanodiffusion.metadata import read_settings
from nanodiffusion.show import to_uint8

CHUNK = 1 << 20  # bytes read at a time for a hash
MOST = 1 << 31  # classes
ARRAYS = {"arr_0": 3, "x": 1}  # where files keep their images, and which axis is the channels


@dataclass(frozen=True, eq=False)
class Images:
    """n images of one shape (c h w), c = 1 or 3, labels (n) where they are known, and a hash of what they come from."""

    name: str
    n: int
    shape: tuple[int, int, int]
    read: Callable[[int], Iterator[Tensor]]  # batch size -> uint8 (b c h w), in order
    digest: Callable[[], str]
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)  # how they were drawn, where that is known

    @cached_property
    def sha256(self) -> str:
        """Of the file, the files, or the tensors."""
        return self.digest()

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (b c h w), n images in all."""
        left = self.n
        for x in self.read(size):
            if left <= 0:
                return
            yield x[:left]
            left -= len(x)

    def first(self, n: int) -> "Images":
        """The first n of them."""
        digest = lambda: hashlib.sha256(f"{self.sha256} first {n}".encode()).hexdigest()
        labels = None if self.labels is None else self.labels[:n]
        return self if n >= self.n else replace(self, n=n, labels=labels, digest=digest)

    def in_colour(self, like: "Images | None") -> "Images":
        """Grey ones as RGB, three channels alike, where those they are held against have three."""
        if like is None or self.shape[0] == like.shape[0] or self.shape[0] == 3:
            return self
        digest = lambda: hashlib.sha256(f"{self.sha256} rgb".encode()).hexdigest()
        read = lambda size: (x.expand(-1, 3, -1, -1) for x in self.read(size))
        return replace(self, shape=(3, *self.shape[1:]), read=read, digest=digest)


def open_images(where: str, split: str = "train", size: int = 0) -> Images:
    """A data set of DATASETS, an .npz, or a folder of images. UserError: none of these, or no images.

    size: cut the images of a folder to squares of so many pixels, as training does; 0 = they are all alike.
    """
    path = Path(where)
    if where in DATASETS:
        return of_data(load_data(where, split), where)
    if path.suffix == ".npz":
        return of_npz(path)
    if (path / "latents.npy").is_file():
        fix = "the pictures that were encoded, or a RUN, which decodes what it draws"
        raise UserError("latents are no images", file=where, expected="an .npz or a folder of images", fix=fix)
    if path.is_dir():
        return of_folder(path, size)
    if path.suffix == ".tar" or "{" in where:
        fix = "nanodiffusion prepare makes a folder of them, nanodiffusion encode an array"
        raise UserError("shards are not read here", file=where, expected="an .npz or a folder of images", fix=fix)
    names = {*DATASETS}
    raise UserError("there are no images", file=where, expected="an .npz, a folder, a name", fix=nearest(where, names))


# -- data sets ---------------------------------------------------------------------------------------------------------


def of_data(data: TensorData, name: str) -> Images:
    """The images of a data set, unflipped and uncut."""
    shape = _image_shape(data.shape, name)
    index = torch.arange(len(data))
    read = lambda size: (_levels(data.batch(part)[0], name) for part in index.split(size))

    def digest() -> str:
        found = hashlib.sha256(str(tuple(data.x.shape)).encode())
        for tensor in (data.x, data.labels):
            found.update(b"" if tensor is None else tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()

    return Images(name, len(data), shape, read, digest, data.labels, data.classes)


def _image_shape(shape: Sequence[int], name: object) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[0] not in (1, 3):
        fix = "latents: decode them, `nanodiffusion sample` does; points have no such distance"
        raise UserError("these are no images", file=name, expected="(c h w), c = 1 or 3", found=tuple(shape), fix=fix)
    return cast(tuple[int, int, int], tuple(map(int, shape)))


def _levels(x: Tensor, name: object) -> Tensor:
    """Floats (b c h w) in [-1, 1] as uint8; bytes as they are. UserError: NaN, or numbers of another range."""
    if x.dtype == torch.uint8:
        return x
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x.flatten(1)).all(1)).sum())
        raise UserError("images hold NaN or infinity", file=name, expected="finite numbers", found=f"{bad} in a batch")
    if float(x.abs().max()) > 1.001:
        found = f"{float(x.min()):.3g} to {float(x.max()):.3g}"
        fix = "store them as uint8"
        raise UserError("images of an unknown range", file=name, expected="floats in [-1, 1]", found=found, fix=fix)
    return to_uint8(x).permute(0, 3, 1, 2)


# -- array files -------------------------------------------------------------------------------------------------------


@contextmanager
def npz_errors(file: Path) -> Iterator[None]:
    """What a damaged archive raises, as a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        raise UserError(
            "the file cannot be read", file=file, expected="a whole .npz of numbers", found=reason
        ) from None


def of_npz(file: Path) -> Images:
    """arr_0 (n h w c), uint8 or floats in [-1, 1], with labels (n) if there are, as `sample npz=` writes; or x (n c h w)."""
    with npz_errors(file), zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        key = next((name for name in ARRAYS if name in names), None)
        if key is None:
            fix = "reference=FILE takes statistics" if "mu" in names else None
            raise UserError("this file holds no images", file=file, expected="arr_0", found=names[:6], fix=fix)
        with archive.open(f"{key}.npy") as member:
            shape, dtype = _npy_header(member)
        labels = _npz_labels(archive, names)
    if len(shape) != 4 or dtype.kind not in "uf" or (dtype.kind == "u" and dtype.itemsize > 1) or not shape[0]:
        expected, found = "(n h w c) in arr_0 or (n c h w) in x, uint8 or floats", f"{dtype} {shape}"
        raise UserError("these are no images", file=file, key=key, expected=expected, found=found)
    if labels is not None and len(labels) != shape[0]:
        raise UserError("there must be one label per image", file=file, expected=shape[0], found=len(labels))
    known = _image_shape(_channels_first(shape[1:], key), file)
    return Images(
        str(file), shape[0], known, lambda size: _npz_batches(file, key, size), lambda: file_hash(file), labels
    )


def _channels_first(shape: tuple[int, ...], key: str) -> tuple[int, ...]:
    return shape if ARRAYS[key] == 1 else (shape[2], *shape[:2])


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(member)
    if fortran or dtype.hasobject:
        raise ValueError("an array in an order, or of objects, that is not read here")
    return shape, dtype


def _npz_labels(archive: zipfile.ZipFile, names: list[str]) -> Tensor | None:
    key = next((name for name in ("labels", "label") if name in names), None)
    if key is None:
        return None
    with archive.open(f"{key}.npy") as member:
        values = np.lib.format.read_array(member, allow_pickle=False)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{key} is {values.dtype} {values.shape}, not integers (n)")
    return torch.from_numpy(values.astype(np.int64))


def _npz_batches(file: Path, key: str, size: int) -> Iterator[Tensor]:
    """The array is read as it is needed, never whole."""
    with npz_errors(file), zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as member:
        shape, dtype = _npy_header(member)
        row = dtype.itemsize * int(np.prod(shape[1:]))
        for start in range(0, shape[0], size):
            count = min(size, shape[0] - start)
            raw = member.read(count * row)
            if len(raw) != count * row:
                raise EOFError("the array ends early")
            values = np.frombuffer(bytearray(raw), dtype).reshape(count, *shape[1:])
            values = values if dtype.kind == "u" else values.astype(np.float32)
            x = torch.from_numpy(values)
            yield _levels(x if ARRAYS[key] == 1 else x.permute(0, 3, 1, 2), file)


def file_hash(*files: Path, root: Path | None = None) -> str:
    """SHA-256 of a file, or of the names below `root` and the contents of many."""
    found = hashlib.sha256()
    for file in files:
        found.update(b"" if root is None else f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            for part in iter(lambda: stream.read(CHUNK), b""):
                found.update(part)
    return found.hexdigest()


# -- folders -----------------------------------------------------------------------------------------------------------


def of_folder(folder: Path, size: int = 0) -> Images:
    """The PNG, JPEG and WEBP files below a folder, by name.

    Sub-folders are classes where no image lies beside them; else the labels are those that `sample out=` wrote into each.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    if not files:
        raise UserError("there is no image here", file=folder, expected=" ".join(SUFFIXES), found="none of them")
    open_image(files[0])  # says what is wrong with it, where it is no image
    grey = _is_grey(files[0])
    load = lambda file: _pixels(file, grey, size)
    shape = load(files[0]).shape

    def read(batch: int) -> Iterator[Tensor]:
        stream = iter(files)
        with ThreadPoolExecutor() as pool:
            while some := list(islice(stream, batch)):
                yield torch.from_numpy(np.stack(list(pool.map(lambda f: _alike(load(f), shape, f, files[0]), some))))

    labels, classes = _labels_of(files, folder)
    digest = lambda: hashlib.sha256(f"{file_hash(*files, root=folder)} {size}".encode()).hexdigest()
    return Images(str(folder), len(files), cast(Any, shape), read, digest, labels, classes)


def _is_grey(file: Path) -> bool:
    with Image.open(file, formats=FORMATS) as image:
        return image.mode in ("1", "L") or image.mode.startswith("I")


def _pixels(file: Path, grey: bool, size: int) -> np.ndarray:
    """One image as uint8 (c h w)."""
    mode, image = "L" if grey else "RGB", open_image(file)
    if grey and not _is_grey(file):
        raise UserError("grey and coloured images are mixed", file=file, expected="grey, as the first is")
    if size:
        return np.array(load_image(file, size, mode))
    return np.atleast_3d(np.array(image.convert(mode))).transpose(2, 0, 1)


def _alike(x: np.ndarray, shape: Sequence[int], file: Path, first: Path) -> np.ndarray:
    if x.shape != tuple(shape):
        expected, found = (f"{w} x {h}" for _, h, w in (shape, x.shape))
        fix = "size=N cuts them all to squares of N pixels"
        raise UserError(
            "images of several sizes", file=file, expected=f"{expected}, as {first.name}", found=found, fix=fix
        )
    return x


def _labels_of(files: list[Path], folder: Path) -> tuple[Tensor | None, tuple[str, ...]]:
    parts = [file.relative_to(folder).parts for file in files]
    if any(len(p) == 1 for p in parts):
        return _labels_inside(files), ()
    classes = tuple(sorted({p[0] for p in parts}))
    return torch.tensor([classes.index(p[0]) for p in parts]), classes


def _labels_inside(files: Sequence[Path]) -> Tensor | None:
    """The labels (n) in the settings of pictures that `sample out=` made; None unless each of them has one."""
    labels: list[int] = []
    for file in files:
        try:
            label = read_settings(file).get("label")
        except UserError:
            return None
        if not isinstance(label, int) or label not in range(MOST):
            return None
        labels.append(label)
    return torch.tensor(labels)
