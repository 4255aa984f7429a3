"""The small published image sets: digits, MNIST, Fashion-MNIST and CIFAR-10, as resident bytes (n c h w)."""

import io
import math
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.data.download import Published, content, read
from nanodiffusion.data.tensors import TensorData, at_least
from nanodiffusion.data.tensors import split as split_data
from nanodiffusion.errors import UserError, lookup, need

DEBIAN = Path("/usr/share/datasets")  # where the package dataset-fashion-mnist puts its files
DIGITS = tuple("0123456789")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _idx_files(site: str, *hashes: str) -> dict[str, tuple[Published, Published]]:
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = [Published(site + name, sha256, unpack=True) for name, sha256 in zip(names, hashes, strict=True)]
    return {"train": (files[0], files[1]), "test": (files[2], files[3])}


# SHA-256 of the IDX files inside the gzips: Debian's gzips differ from the publishers', their content does not.
IDX_SETS = {
    "mnist": _idx_files(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion-mnist": _idx_files(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
CIFAR10_FILE = Published(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CIFAR10_MEMBERS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


def digits(split: str = "train", pad: int = 0, size: int = 0, flip: bool = False, crop_padding: int = 0) -> TensorData:
    """scikit-learn's 1,797 handwritten digits, (1 8 8), levels 0..16 scaled to 0..255.

    The test set is the second part of `split(all, fraction=0.2, seed=0)`, which is stratified.
    `pad` adds a black border, then `size` resizes; 0 leaves as is. The same holds for every set below.
    """
    raw = need("sklearn.datasets", extra="data").load_digits()
    x = torch.from_numpy(raw.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(raw.target).long()
    train, test = split_data(TensorData(_fit(x, pad, size), labels, DIGITS, flip, crop_padding), 0.2, seed=0)
    return lookup({"train": train, "test": test}, split, "split")


def mnist(split: str = "train", pad: int = 0, size: int = 0, flip: bool = False, crop_padding: int = 0) -> TensorData:
    """MNIST, 60,000 train and 10,000 test digits (1 28 28) (LeCun et al. 1998); options as in `digits`."""
    x, labels = _idx_set("mnist", split)
    return TensorData(_fit(x, pad, size), labels, DIGITS, flip, crop_padding)


def fashion_mnist(
    split: str = "train", pad: int = 0, size: int = 0, flip: bool = False, crop_padding: int = 0
) -> TensorData:
    """Fashion-MNIST, 60,000 train and 10,000 test garments (1 28 28) (Xiao et al. 2017); options as in `digits`."""
    x, labels = _idx_set("fashion-mnist", split)
    return TensorData(_fit(x, pad, size), labels, FASHION, flip, crop_padding)


def cifar10(split: str = "train", pad: int = 0, size: int = 0, flip: bool = False, crop_padding: int = 0) -> TensorData:
    """CIFAR-10, 50,000 train and 10,000 test photographs (3 32 32) (Krizhevsky 2009); options as in `digits`."""
    members = lookup(CIFAR10_MEMBERS, split, "split")
    x, labels = parse_cifar(content(CIFAR10_FILE, "cifar10"), members, CIFAR10_FILE.name)
    return TensorData(_fit(x, pad, size), labels, CIFAR10, flip, crop_padding)


def _idx_set(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Images (n 1 28 28) uint8 and labels (n) int64 of one part of an IDX set."""
    x, labels = (
        parse_idx(content(file, name, DEBIAN / name / file.name), file.name)
        for file in lookup(IDX_SETS[name], split, "split")
    )
    return x[:, None], labels.long()


def read_idx(path: str | Path) -> Tensor:
    """The unsigned bytes in an IDX file, plain or gzip, as uint8 of the shape it states."""
    return parse_idx(read(Path(path)), path)


def parse_idx(raw: bytes, name: object) -> Tensor:
    """IDX: 00 00 08 rank, then `rank` big-endian 32-bit sizes, then the bytes (LeCun et al. 1998)."""
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\0\0\x08" or not rank or len(raw) < 4 + 4 * rank:
        raise UserError("this is no IDX file of bytes", file=name, expected="00 00 08 rank", found=raw[:4].hex(" "))
    shape = np.frombuffer(raw, ">u4", rank, offset=4).tolist()
    start, count = 4 + 4 * rank, math.prod(shape)
    if len(raw) - start != count:
        raise UserError(
            "the IDX file has the wrong length",
            file=name,
            expected=f"{count} bytes for shape {tuple(shape)}",
            found=f"{len(raw) - start} bytes",
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start, count=count).view(shape)


def parse_cifar(raw: bytes, members: list[str], name: object) -> tuple[Tensor, Tensor]:
    """Images (n 3 32 32) uint8, labels (n) int64 from `members` of a .tar.gz: records of a label and R, G, B planes."""
    records = torch.cat([_records(member, name) for member in _tar_members(raw, members, name)])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _tar_members(raw: bytes, members: list[str], name: object) -> list[bytes]:
    """Read the members by base name, in memory: nothing is unpacked to a path the archive chose."""
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as archive:
            inside = {Path(m.name).name: m for m in archive if m.isfile()}
            found = [inside[member] for member in members]
            return [archive.extractfile(m).read() for m in found]  # type: ignore[union-attr]  # they are files
    except KeyError as e:
        raise UserError("the archive lacks a file", file=name, expected=e.args[0], found=sorted(inside)[:8]) from e
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise UserError("the archive is damaged", file=name, expected="a whole .tar.gz", found=e) from e


def _records(raw: bytes, name: object) -> Tensor:
    if not raw or len(raw) % 3073:
        expected = "records of 3073 bytes"
        raise UserError("the archive holds a damaged batch", file=name, expected=expected, found=f"{len(raw)} bytes")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3073)


def _fit(x: Tensor, pad: int, size: int) -> Tensor:
    """Add a black border of `pad` pixels, then resize to size x size (bicubic, antialiased): uint8 (n c h w)."""
    x = torch.nn.functional.pad(x, [at_least(pad, 0, "pad")] * 4)
    if not at_least(size, 0, "size") or x.shape[-2:] == (size, size):
        return x
    return torch.cat(
        [_resize(part, size) for part in x.split(1024)]
    )  # as floats a whole set would be four times as large


def _resize(x: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(x.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
