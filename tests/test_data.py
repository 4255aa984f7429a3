"""Data sets: toy points against their references, files well and badly made, augmentation against numpy, the order."""

import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

from nanodiffusion import data as nd
from nanodiffusion.data import TensorData, download, files, images, load_data
from nanodiffusion.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def everything(data, u=None):
    return data.batch(torch.arange(len(data)), u)


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def all_files(folder):
    return [p for p in Path(folder).rglob("*") if p.is_file()]


# ---- toy sets


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 7}, {"n": 200, "tmin": 1.0, "tmax": 9.0, "center": (0.5, -2.0), "scale": 3.0}],
)
def test_swiss_roll_is_smalldiffusions_point_by_point(options):
    o = {"n": 1000, "tmin": np.pi / 2, "tmax": 5 * np.pi, "center": (0.0, 0.0), "scale": 1.0} | options
    expected = reference.smalldiffusion().Swissroll(o["tmin"], o["tmax"], o["n"], o["center"], o["scale"]).vals
    assert_close(load_data("swiss-roll", **options).x, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("branching", "depth", "per_path"), [(4, 3, 30), (2, 4, 17), (3, 1, 2), (1, 2, 5)])
def test_tree_is_smalldiffusions_point_by_point(branching, depth, per_path):
    points, labels = zip(*reference.smalldiffusion().TreeDataset(branching, depth, per_path).data, strict=True)
    x, cond = everything(load_data("tree", branching=branching, depth=depth, per_path=per_path))
    assert_close(x, torch.stack(points), rtol=0, atol=1e-7)
    assert cond["label"].tolist() == list(labels)
    assert_close(x[per_path - 1 :: per_path].norm(dim=1), torch.ones(branching**depth))  # the leaves


@pytest.mark.parametrize("n", [2000, 31])
def test_two_moons_and_circles_are_scikit_learns(n):
    make = pytest.importorskip("sklearn.datasets")
    for name, make_set in (("two-moons", make.make_moons), ("circles", make.make_circles)):
        extra = {"factor": 0.5} if name == "circles" else {}
        points, labels = make_set(n, shuffle=False, **extra)
        x, cond = everything(load_data(name, n=n, noise=0.0, **extra))
        assert_close(x, torch.from_numpy(points).float(), rtol=0, atol=1e-6)
        assert cond["label"].tolist() == labels.tolist()
    noise = load_data("two-moons", n=20000, noise=0.1).x - load_data("two-moons", n=20000, noise=0.0).x
    assert_close(noise.std(0), torch.full((2,), 0.1), rtol=0.03, atol=0)


@pytest.mark.parametrize("cells", [1, 3, 4])
def test_checkerboard_covers_exactly_the_black_squares(cells):
    data = load_data("checkerboard", n=2000, cells=cells)
    column, row = ((data.x + 1) * cells / 2).floor().long().T
    assert bool(((row + column) % 2 == 0).all()) and bool((data.x.abs() <= 1).all())
    squares = {(r, c, k) for r, c, k in zip(row.tolist(), column.tolist(), data.labels.tolist(), strict=True)}
    assert len(squares) == len(data.classes) == (cells**2 + 1) // 2


def test_gaussians_have_the_means_and_the_deviation_they_state():
    data = load_data("gaussians", n=40000, modes=5, std=0.2, radius=2.0)
    for k in range(5):
        mode = data.x[data.labels == k]
        angle = torch.tensor(2 * np.pi * k / 5)
        assert_close(mode.mean(0), 2 * torch.stack([angle.cos(), angle.sin()]), rtol=0, atol=0.01)
        assert_close(mode.T.cov(), 0.04 * torch.eye(2), rtol=0, atol=0.002)


def test_pinwheel_arms_unwind_to_one_gaussian():
    data = load_data("pinwheel", n=50000, arms=5, radial=0.2, tangential=0.1, rate=0.25)
    z = torch.complex(*data.x.double().T)
    # the turn depends on the radius coordinate, which is |z| up to tangential^2
    unwound = z * torch.exp(-1j * (data.labels * (2 * np.pi / 5) + 0.25 * z.abs().exp()))
    assert_close(unwound.real.mean().item(), 1.0, rtol=0, atol=0.01)
    assert_close(unwound.imag.mean().item(), 0.0, rtol=0, atol=0.01)
    assert_close(unwound.real.std().item(), 0.2, rtol=0, atol=0.01)
    assert_close(unwound.imag.std().item(), 0.1, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["two-moons", "circles", "checkerboard", "gaussians", "pinwheel"])
def test_random_toys_are_functions_of_their_seed(name):
    a, b, c = (load_data(name, n=50, seed=s).x for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_datasaurus_is_smalldiffusions(tmp_path):
    table = tmp_path / "dozen.tsv"
    points = np.random.default_rng(0).uniform(0, 100, (6, 2)).round(4)
    names = ["dino", "star"] * 3
    rows = [f"{name}\t{x}\t{y}\n" for name, (x, y) in zip(names, points, strict=True)]
    table.write_text("dataset\tx\ty\n" + "".join(rows))
    theirs = reference.smalldiffusion().DatasaurusDozen(str(table), "star")
    ours = load_data("datasaurus", file=str(table), shape="star")
    assert len(ours) == len(theirs) == 45
    assert_close(ours.x, torch.stack([theirs[i] for i in range(45)]), rtol=0, atol=0)
    with pytest.raises(UserError, match="did you mean 'dino'"):
        load_data("datasaurus", file=str(table), shape="dinos")
    table.write_text("dino\t1.0\n")
    with pytest.raises(UserError, match=r"dozen\.tsv"):
        load_data("datasaurus", file=str(table))
    with pytest.raises(UserError, match=r"nowhere\.tsv"):
        load_data("datasaurus", file="nowhere.tsv")


# ---- TensorData


def test_bytes_become_minus_one_to_one_and_floats_pass_unchanged():
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 1, 4, 4)
    x, cond = everything(TensorData(ramp))
    assert_close(x.flatten(), torch.from_numpy((np.arange(256) / 127.5 - 1).astype(np.float32)), rtol=0, atol=6e-8)
    assert x.min() == -1 and x.max() == 1 and cond == {}
    points = torch.randn(5, 3)
    assert torch.equal(everything(TensorData(points))[0], points)


def test_a_batch_gathers_samples_and_labels_in_the_order_asked():
    data = TensorData(torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]), ("a", "b", "c"))
    index = torch.tensor([5, 0, 5])
    x, cond = data.to("cpu").batch(index)
    assert x.tolist() == [[10, 11], [0, 1], [10, 11]] and cond["label"].tolist() == [2, 0, 2]
    assert (len(data), data.shape, data.classes, data.draws) == (6, (2,), ("a", "b", "c"), 0)


def reference_augment(image, u, flip, p, fill):
    """One image (c h w) by numpy's own pad, slice and reverse."""
    if p:
        mode = {"reflect": {"mode": "reflect"}, "zero": {"mode": "constant"}}[fill]
        (i, j), (h, w) = np.floor(u[-2:] * (2 * p + 1)).astype(int), image.shape[1:]
        image = np.pad(image, ((0, 0), (p, p), (p, p)), **mode)[:, i : i + h, j : j + w]
    return image[:, :, ::-1] if flip and u[0] < 0.5 else image


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("fill", ["reflect", "zero"])
@pytest.mark.parametrize(("flip", "p"), [(True, 0), (False, 2), (True, 3)])
def test_flip_and_crop_equal_numpys(flip, p, fill, dtype):
    pixels = random_images(40, 3, 5, 7).to(dtype)
    data = TensorData(pixels, flip=flip, crop_padding=p, crop_fill=fill)
    assert data.draws == flip + 2 * (p > 0)
    u = torch.rand(40, data.draws, generator=torch.Generator().manual_seed(1))
    u[0], u[1] = 0, 1 - 2**-24  # the ends of [0, 1) in float32
    expected = [reference_augment(a, b, flip, p, fill) for a, b in zip(pixels.numpy(), u.numpy(), strict=True)]
    expected = torch.from_numpy(np.stack(expected).astype(np.float32))
    expected = expected / 127.5 - 1 if dtype == torch.uint8 else expected
    x, _ = everything(data, u)
    assert_close(x, expected, rtol=0, atol=0)
    assert_close(everything(data, u)[0], x, rtol=0, atol=0)


def test_without_numbers_nothing_is_augmented():
    pixels = random_images(8, 1, 6, 6)
    plain, augmented = TensorData(pixels), TensorData(pixels, flip=True, crop_padding=2)
    assert torch.equal(everything(augmented)[0], everything(plain)[0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TensorData(torch.zeros(0, 2)), "at least one sample"),
        (lambda: TensorData(torch.zeros(3, 2).double()), "float32"),
        (lambda: TensorData(torch.zeros(3, 2, dtype=torch.uint8)), "n c h w"),
        (lambda: TensorData(torch.tensor([[0.0], [float("nan")]])), "first bad sample is number 1"),
        (lambda: TensorData(torch.zeros(2, 1), torch.tensor([0, 5]), ("a", "b")), "0 to 5"),
        (lambda: TensorData(torch.zeros(2, 1), torch.tensor([0, -1])), "-1 to 0"),
        (lambda: TensorData(torch.zeros(2, 1), torch.tensor([0])), "one integer label"),
        (lambda: TensorData(torch.zeros(2, 3), flip=True), "only images flip"),
        (lambda: TensorData(torch.zeros(2, 1, 4, 4), crop_padding=4), "0 to 3"),
        (lambda: TensorData(torch.zeros(2, 1, 4, 4), crop_padding=-1), "0 to 3"),
        (lambda: TensorData(torch.zeros(2, 1, 4, 4), flip=True, crop_fill="zeros"), "did you mean 'zero'"),
    ],
)
def test_tensors_that_are_no_data_set_are_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_gathering_is_never_the_bottleneck():
    """A tenth of the goal of 750,000 a second, so that a busy machine does not fail it."""
    data, index = TensorData(random_images(20000, 1, 28, 28), flip=True), torch.randperm(20000)[:512]
    u = torch.rand(512, 1)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        data.batch(index, u)
        seconds.append(time.perf_counter() - start)
    assert 512 / min(seconds) > 75_000


# ---- tools


@pytest.fixture
def labelled():
    labels = torch.arange(100) % 4
    return TensorData(torch.arange(100.0)[:, None], labels, ("a", "b", "c", "d"))


def test_subset_takes_samples_with_their_labels(labelled):
    part = nd.subset(labelled, [7, 2])
    assert part.x.flatten().tolist() == [7, 2] and part.labels.tolist() == [3, 2] and part.classes == labelled.classes
    assert nd.subset(labelled, slice(90, None)).x.flatten().tolist() == list(range(90, 100))
    with pytest.raises(UserError, match="0 to 99"):
        nd.subset(labelled, [100])


def test_split_is_a_stratified_partition_fixed_by_the_seed(labelled):
    rest, part = nd.split(labelled, 0.2, seed=3)
    assert sorted(torch.cat([rest.x, part.x]).flatten().tolist()) == list(range(100))
    assert part.labels.bincount().tolist() == [5, 5, 5, 5]
    assert torch.equal(part.x, nd.split(labelled, 0.2, seed=3)[1].x)
    assert not torch.equal(part.x, nd.split(labelled, 0.2, seed=4)[1].x)
    assert [len(p) for p in nd.split(nd.without_labels(labelled), 0.25)] == [75, 25]
    for fraction in (0.0, 1.0, 0.001):
        with pytest.raises(UserError, match="fraction"):
            nd.split(labelled, fraction)


def test_labels_are_dropped_mapped_and_chosen(labelled):
    bare = nd.without_labels(labelled)
    assert everything(bare)[1] == {} and bare.classes == ()
    expected = (torch.arange(100) % 4 // 2).tolist()
    for new in (lambda k: k // 2, {0: 0, 1: 0, 2: 1, 3: 1}):
        halves = nd.map_labels(labelled, new)
        assert halves.labels.tolist() == expected and halves.classes == ("a+b", "c+d")
    two = nd.only_classes(labelled, "d", 0)
    assert two.classes == ("d", "a")
    assert two.x.flatten().tolist() == [i for i in range(100) if i % 4 in (0, 3)]
    assert two.labels.tolist() == [0 if i % 4 == 3 else 1 for i in range(100) if i % 4 in (0, 3)]
    for wrong in (lambda: nd.only_classes(labelled, "e"), lambda: nd.map_labels(labelled, {0: 0})):
        with pytest.raises(UserError):
            wrong()
    with pytest.raises(UserError, match="no labels"):
        nd.only_classes(bare, 0)


# ---- order


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (10, 10), (3, 10), (1, 4), (7, 21)])
def test_the_order_is_a_stream_of_permutations(n, batch):
    steps = 3 * n
    stream = torch.cat([nd.order(n, batch, 5, step) for step in range(steps)])
    epochs = stream[: len(stream) // n * n].view(-1, n)
    assert stream.dtype == torch.int64 and len(stream) == steps * batch
    assert torch.equal(epochs.sort(1).values, torch.arange(n).expand_as(epochs))
    for epoch in range(3):
        assert torch.equal(epochs[epoch], nd.epoch_order(n, 5, epoch))


def test_the_order_is_a_function_of_seed_and_step_alone():
    forward = [nd.order(50, 16, 0, step) for step in range(30)]
    backward = [nd.order(50, 16, 0, step) for step in reversed(range(30))][::-1]
    assert torch.equal(torch.stack(forward), torch.stack(backward))
    assert not torch.equal(nd.order(50, 16, 1, 0), forward[0])
    assert not torch.equal(nd.epoch_order(50, 0, 1), nd.epoch_order(50, 0, 0))
    assert not torch.equal(nd.epoch_order(50, 1, 0), nd.epoch_order(50, 0, 1))


def test_changing_an_order_in_place_does_not_change_the_next():
    expected = nd.order(20, 20, 0, 0).clone()
    nd.order(20, 20, 0, 0).zero_()
    nd.epoch_order(20, 0, 0).zero_()
    assert torch.equal(nd.order(20, 20, 0, 0), expected)


def test_every_position_of_the_order_is_equally_likely():
    epochs = torch.stack([nd.epoch_order(5, 0, epoch) for epoch in range(4000)])
    counts = torch.nn.functional.one_hot(epochs).sum(0).double()
    assert ((counts - 800) ** 2 / 800).sum() < 40  # chi-square with 16 degrees of freedom: p < 1e-3


# ---- IDX and CIFAR files


def idx(values):
    values = np.asarray(values, np.uint8)
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_idx_files_hold_what_was_written(tmp_path, pack):
    values = random_images(5, 4, 3)
    (tmp_path / "x").write_bytes(pack(idx(values)))
    assert torch.equal(images.read_idx(tmp_path / "x"), values)


GOOD_IDX = idx(np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "no IDX"),
        (b"\0\0", "no IDX"),
        (b"\0\0\x0d" + GOOD_IDX[3:], "00 00 08 rank"),
        (b"\0\0\x08\0", "no IDX"),
        (b"\0\0\x08\x03\0\0\0\1", "no IDX"),
        (GOOD_IDX[:-1], r"24 bytes for shape \(2, 3, 4\)"),
        (GOOD_IDX + b"x", "25 bytes"),
        (struct.pack(">BBBB2I", 0, 0, 8, 2, 2**32 - 1, 2**32 - 1), "wrong length"),
        (gzip.compress(GOOD_IDX, mtime=0)[:-12], "cannot be read"),
        (gzip.compress(GOOD_IDX, mtime=0)[:12] + b"damaged" + gzip.compress(GOOD_IDX, mtime=0)[19:], "cannot be read"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(tmp_path, raw, says):
    (tmp_path / "broken-idx3").write_bytes(raw)
    with pytest.raises(UserError, match=says) as e:
        images.read_idx(tmp_path / "broken-idx3")
    assert "broken-idx3" in str(e.value)


def test_a_compressed_bomb_stops_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LIMIT", 1000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(UserError, match="too large"):
        images.read_idx(tmp_path / "bomb.gz")


@pytest.fixture
def small_mnist(cache, monkeypatch):
    """An IDX set of 6 + 6 images in the cache, published with its own hashes."""
    folder = cache / "mnist"
    folder.mkdir(parents=True)
    parts = {}
    for seed, part in enumerate(("train", "t10k")):
        content = (idx(random_images(6, 28, 28, seed=seed)), idx([3, 1, 4, 1, 5, 9]))
        names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
        for name, raw in zip(names, content, strict=True):
            (folder / name).write_bytes(gzip.compress(raw))
        pairs = zip(names, content, strict=True)
        parts[part] = tuple(
            download.Published(f"http://127.0.0.1:9/{name}", hashlib.sha256(raw).hexdigest(), unpack=True)
            for name, raw in pairs
        )
    monkeypatch.setitem(images.IDX_SETS, "mnist", {"train": parts["train"], "test": parts["t10k"]})
    return folder


def test_mnist_comes_from_the_cache(small_mnist):
    data = load_data("mnist", "test", pad=2)
    assert (data.shape, data.classes, data.labels.tolist()) == ((1, 32, 32), tuple("0123456789"), [3, 1, 4, 1, 5, 9])
    assert torch.equal(data.x[:, 0, 2:-2, 2:-2], random_images(6, 28, 28, seed=1))
    assert data.x.sum() == random_images(6, 28, 28, seed=1).sum()  # the border is black
    assert load_data("mnist", size=14).shape == (1, 14, 14)


def test_an_unpacked_file_in_the_cache_is_as_good(small_mnist):
    expected = load_data("mnist").x
    for packed in small_mnist.glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert torch.equal(load_data("mnist").x, expected)


def test_a_changed_byte_in_the_cache_is_refused(small_mnist):
    file = small_mnist / "train-images-idx3-ubyte.gz"
    raw = bytearray(gzip.decompress(file.read_bytes()))
    raw[100] ^= 1
    file.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(UserError, match="not the published file") as e:
        load_data("mnist")
    assert str(file) in str(e.value) and "delete the file" in str(e.value)


def test_no_network_is_one_clear_error_and_leaves_nothing(small_mnist, cache):
    for file in small_mnist.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="download failed") as e:
        load_data("mnist")
    assert "http://127.0.0.1:9/" in str(e.value) and str(small_mnist) in str(e.value)
    assert all_files(cache) == []


@pytest.mark.skipif(not (images.DEBIAN / "fashion-mnist").is_dir(), reason="no package dataset-fashion-mnist")
def test_fashion_mnist_from_debian_is_whole():
    for part, n in (("train", 60000), ("test", 10000)):
        data = load_data("fashion-mnist", part)
        assert (len(data), data.shape, data.classes[9]) == (n, (1, 28, 28), "Ankle boot")
        assert data.labels.bincount().tolist() == [n // 10] * 10


def test_digits_are_scikit_learns_and_split_by_class():
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = load_data("digits"), load_data("digits", "test")
    assert (len(train) + len(test), train.shape, len(train.classes)) == (1797, (1, 8, 8), 10)
    assert_close(
        test.labels.bincount() / torch.tensor(raw.target).bincount(), torch.full((10,), 0.2), rtol=0, atol=0.003
    )
    levels = torch.cat([train.x, test.x]).double().div(255 / 16).flatten(1)
    theirs = torch.tensor(raw.data).double()
    assert_close(levels.sum(0), theirs.sum(0), rtol=0, atol=1797 * 0.5 / 15.9)
    images_of = {tuple(row) for row in theirs.long().tolist()}
    assert {tuple(row) for row in levels.round().long().tolist()} == images_of
    assert load_data("digits", size=16).shape == (1, 16, 16)


def cifar_tar(batches):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, raw in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return out.getvalue()


def cifar_batch(labels, x):
    return b"".join(bytes([k]) + image.numpy().tobytes() for k, image in zip(labels, x, strict=True))


@pytest.fixture
def small_cifar(cache, monkeypatch):
    """CIFAR-10 of two images a batch, published with its own hash: returns a writer of the archive."""

    def write(batches):
        raw = cifar_tar(batches)
        (cache / "cifar10").mkdir(parents=True, exist_ok=True)
        (cache / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(raw)
        file = replace(images.CIFAR10_FILE, sha256=hashlib.sha256(raw).hexdigest())
        monkeypatch.setattr(images, "CIFAR10_FILE", file)

    return write


def test_cifar_reads_labels_and_planes(small_cifar):
    x = random_images(12, 3, 32, 32)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    small_cifar({name: cifar_batch([i, 9 - i], x[2 * i : 2 * i + 2]) for i, name in enumerate(names)})
    train, test = load_data("cifar10"), load_data("cifar10", "test")
    assert torch.equal(train.x, x[:10]) and torch.equal(test.x, x[10:])
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and test.classes[5] == "dog"


def test_bad_cifar_archives_are_refused(small_cifar, cache):
    for batches, says in (
        ({"test_batch.bin": b"x" * 3000}, "3073"),
        ({"test_batch.bin": b""}, "0 bytes"),
        ({"readme.html": b"hello"}, "lacks a file"),
        ({"test_batch.bin": cifar_batch([77], random_images(1, 3, 32, 32))}, "label is out of range"),
    ):
        small_cifar(batches)
        with pytest.raises(UserError, match=says):
            load_data("cifar10", "test")
    raw = (cache / "cifar10" / "cifar-10-binary.tar.gz").read_bytes()
    for damaged in (raw[: len(raw) // 2], b"not an archive"):
        with pytest.raises(UserError, match="damaged") as e:
            images.parse_cifar(damaged, ["test_batch.bin"], "cifar.tar.gz")
        assert "cifar.tar.gz" in str(e.value)


# ---- downloads


@pytest.fixture(scope="module")
def server():
    """http://127.0.0.1: /good/x serves PAYLOAD, /short/x stops half way, /html/x is a page, anything else is a 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.split("/")[1]
            body = {"good": PAYLOAD, "short": PAYLOAD[: len(PAYLOAD) // 2], "html": b"<html>"}.get(kind)
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(PAYLOAD if kind == "short" else body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


PAYLOAD = gzip.compress(idx(random_images(50, 28, 28)))
INSIDE = hashlib.sha256(gzip.decompress(PAYLOAD)).hexdigest()


def test_a_download_is_verified_kept_and_used_again(server, cache):
    for file in (
        download.Published(f"{server}/good/inside.gz", INSIDE, unpack=True),
        download.Published(f"{server}/good/whole.gz", hashlib.sha256(PAYLOAD).hexdigest()),
    ):
        expected = gzip.decompress(PAYLOAD) if file.unpack else PAYLOAD
        assert download.content(file, "set") == expected
        assert (cache / "set" / file.name).read_bytes() == PAYLOAD
        assert download.content(replace(file, url=f"{server}/gone/{file.name}"), "set") == expected
    assert len(all_files(cache)) == 2


@pytest.mark.parametrize(
    ("path", "sha256", "says"),
    [
        ("good", "0" * 64, "not the published file"),
        ("html", INSIDE, "not the published file"),
        ("short", INSIDE, "cannot be read|download failed"),
        ("missing", INSIDE, "404"),
    ],
)
def test_a_failed_download_names_its_address_and_leaves_nothing(server, cache, path, sha256, says):
    url = f"{server}/{path}/file.gz"
    with pytest.raises(UserError, match=says) as e:
        download.content(download.Published(url, sha256, unpack=True), "set")
    assert url in str(e.value) and str(e.value).count("\n") < 6
    assert all_files(cache) == []


def test_a_cache_that_is_no_folder_is_a_user_error(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="NANODIFFUSION_CACHE"):
        download.content(download.Published(f"{server}/good/x.gz", INSIDE, unpack=True), "set")


# ---- folders of images


def save(path, pixels, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(path, **options)


def noise(h, w, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, c) if c > 1 else (h, w), dtype=np.uint8)


def test_a_folder_keeps_pixels_of_the_right_size_exactly(tmp_path):
    for i, name in enumerate(("b.png", "a.PNG", "c.webp")):
        save(tmp_path / name, noise(8, 8, seed=i), format=name.split(".")[1], lossless=True)
    data = load_data("folder", path=str(tmp_path), size=8)
    expected = np.stack([noise(8, 8, seed=i) for i in (1, 0, 2)]).transpose(0, 3, 1, 2)  # sorted by name
    assert torch.equal(data.x, torch.from_numpy(expected.copy()))
    assert (data.labels, data.classes, data.skipped) == (None, (), ())


def test_the_middle_square_is_kept_and_resized(tmp_path):
    wide, tall = noise(6, 14), noise(14, 6, seed=1)
    save(tmp_path / "0.png", wide)
    save(tmp_path / "1.png", tall)
    assert torch.equal(
        load_data("folder", path=str(tmp_path), size=6).x,
        torch.from_numpy(np.stack([wide[:, 4:10], tall[4:10]]).transpose(0, 3, 1, 2).copy()),
    )
    half = Image.fromarray(wide).resize((7, 3), Image.Resampling.BICUBIC).crop((2, 0, 5, 3))
    assert_close(
        torch.from_numpy(files.load_image(tmp_path / "0.png", 3).astype(int)),
        torch.from_numpy(np.asarray(half).transpose(2, 0, 1).astype(int)),
        rtol=0,
        atol=1,
    )


def test_a_large_jpeg_shrinks_as_the_whole_decode_does(tmp_path):
    waves = 127.5 + 100 * np.sin(np.arange(640) * (2 * np.pi / 32))[None, :, None] + np.zeros((480, 1, 3))
    save(tmp_path / "waves.jpg", waves, quality=95)
    whole = Image.open(tmp_path / "waves.jpg").crop((80, 0, 560, 480)).resize((64, 64), Image.Resampling.BICUBIC)
    small = files.load_image(tmp_path / "waves.jpg", 64).transpose(1, 2, 0)
    difference = np.abs(small.astype(int) - np.asarray(whole).astype(int))
    assert difference[:, 2:-2].max() <= 2  # at the sides `whole` cannot see past its crop


def test_grey_transparent_deep_and_turned_images_look_right(tmp_path):
    deep = (np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096) + 255
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (files.load_image(tmp_path / "deep.png", 4, "L")[0] == deep // 256).all()
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (255, 0, 0, 255)
    save(tmp_path / "clear.png", clear, "RGBA")
    image = files.load_image(tmp_path / "clear.png", 4).transpose(1, 2, 0)
    assert (image[:2] == (255, 0, 0)).all() and (image[2:] == 255).all()  # on white
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    save(tmp_path / "turned.png", half, exif=exif)
    assert (files.load_image(tmp_path / "turned.png", 8, "L")[0] == half[::-1, :, 0]).all()
    save(tmp_path / "grey.png", noise(5, 5, 1), "L")
    assert (files.load_image(tmp_path / "grey.png", 5) == noise(5, 5, 1)[None]).all()


def test_sub_folders_are_classes(tmp_path):
    for i, name in enumerate(("dog/x.png", "cat/deep/y.png", "cat/z.png")):
        save(tmp_path / name, np.full((4, 4, 3), 10 * i))
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    (tmp_path / "cat" / ".hidden.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match=r"1 files left out.*notes\.txt"):
        data = load_data("folder", path=str(tmp_path), size=4, channels=1)
    assert data.classes == ("cat", "dog") and data.shape == (1, 4, 4)
    assert data.labels.tolist() == [0, 0, 1] and data.x[:, 0, 0, 0].tolist() == [10, 20, 0]
    assert data.skipped == (f"{tmp_path / 'cat' / 'notes.txt'}: not an image",)


def test_train_and_test_folders_are_the_splits(tmp_path):
    for i, name in enumerate(("train/a/0.png", "train/b/0.png", "test/b/0.png")):
        save(tmp_path / name, np.full((4, 4, 3), i))
    train, test = (load_data("folder", split, path=str(tmp_path), size=4) for split in ("train", "test"))
    assert train.classes == test.classes == ("a", "b")
    assert train.labels.tolist() == [0, 1] and test.labels.tolist() == [1] and test.x.max() == 2


def test_a_fraction_of_a_folder_is_held_out(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png", np.full((4, 4, 3), i))
    with pytest.raises(UserError, match="test_fraction"):
        load_data("folder", "test", path=str(tmp_path), size=4)
    parts = [load_data("folder", s, path=str(tmp_path), size=4, test_fraction=0.3).x for s in ("train", "test")]
    assert [len(p) for p in parts] == [7, 3]
    assert sorted(torch.cat(parts)[:, 0, 0, 0].tolist()) == list(range(10))


def test_damaged_images_are_named_or_skipped(tmp_path):
    save(tmp_path / "0-good.png", noise(8, 8))
    save(tmp_path / "1-cut.png", noise(64, 64))
    whole = (tmp_path / "1-cut.png").read_bytes()
    (tmp_path / "1-cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2-text.jpg").write_text("not an image at all")
    Image.new("RGB", (8, 8)).save(tmp_path / "3-disguised.png", format="BMP")
    with pytest.raises(UserError, match="3 of 4 images cannot be read") as e:
        load_data("folder", path=str(tmp_path), size=8)
    assert "1-cut.png" in str(e.value) and "skip_bad" in str(e.value)
    with pytest.warns(UserWarning, match="3 files left out"):
        data = load_data("folder", path=str(tmp_path), size=8, skip_bad=True)
    assert torch.equal(data.x, torch.from_numpy(noise(8, 8).transpose(2, 0, 1)[None].copy()))
    assert [Path(line.split(": ")[0]).name for line in data.skipped] == ["1-cut.png", "2-text.jpg", "3-disguised.png"]


@pytest.mark.parametrize(("width", "height"), [(10000, 6401), (60000, 60000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header(tmp_path, width, height):
    """A PNG that states its size and holds no pixels: were it decoded, the error would be another."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    with pytest.raises(UserError, match=r"64 megapixels|decompression bomb") as e:
        load_data("folder", path=str(tmp_path), size=8)
    assert "bomb.png" in str(e.value)


def test_empty_missing_and_too_large_folders_are_user_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="1 other files"):
        load_data("folder", path=str(tmp_path), size=8)
    with pytest.raises(UserError, match="nowhere"):
        load_data("folder", path=str(tmp_path / "nowhere"), size=8)
    save(tmp_path / "0.png", noise(8, 8))
    with pytest.raises(UserError, match="max_gib"):
        load_data("folder", path=str(tmp_path), size=8, max_gib=1e-9)
    with pytest.raises(UserError, match="channels"):
        load_data("folder", path=str(tmp_path), size=8, channels=4)


# ---- array files


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_arrays_hold_what_was_saved(tmp_path, suffix):
    x, label = torch.randn(6, 4, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    path = str(tmp_path / f"set.{suffix}")
    if suffix == "npz":
        np.savez_compressed(path, x=x.double().numpy(), label=label.numpy().astype(np.int32))
    else:
        safetensors.torch.save_file({"x": x, "label": label}, path)
    data = load_data("array", path=path)
    assert torch.equal(data.x, x) and torch.equal(data.labels, label) and data.classes == ("0", "1", "2")
    parts = [load_data("array", split, path=path, test_fraction=0.5) for split in ("train", "test")]
    assert sorted(torch.cat([p.x for p in parts]).flatten().tolist()) == sorted(x.flatten().tolist())


def test_other_keys_bytes_and_half_precision(tmp_path):
    pixels = random_images(3, 3, 4, 4)
    np.save(tmp_path / "x.npy", pixels.numpy())
    assert torch.equal(load_data("array", path=str(tmp_path / "x.npy"), flip=True).x, pixels)
    latents = torch.randn(3, 4).bfloat16()
    safetensors.torch.save_file({"latent_mean": latents}, tmp_path / "l.safetensors")
    data = load_data("array", path=tmp_path / "l.safetensors", key="latent_mean")
    assert torch.equal(data.x, latents.float()) and data.labels is None


def write_npz(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("nan.npz", lambda p: write_npz(p, x=np.array([[0.0], [np.nan]])), "NaN"),
        ("keys.npz", lambda p: write_npz(p, images=np.zeros((2, 2))), "key"),
        ("pickled.npz", lambda p: write_npz(p, x=np.array([{"a": 1}], dtype=object)), "unpickled"),
        ("pickled.npy", lambda p: np.save(p, np.array([print], dtype=object)), "unpickled"),
        ("text.npz", lambda p: write_npz(p, x=np.array([["a"]])), "numbers"),
        ("labels.npz", lambda p: write_npz(p, x=np.zeros((2, 2)), label=np.zeros(2)), "whole numbers"),
        ("count.npz", lambda p: write_npz(p, x=np.zeros((2, 2)), label=np.zeros(3, int)), "one integer label"),
        ("last.npz", lambda p: write_npz(p, x=np.zeros((2, 8, 8, 3), np.uint8)), "transpose"),
        ("cut.npy", lambda p: p.write_bytes(npy_bytes()[:-8]), "cannot be read"),
        ("noise.npz", lambda p: p.write_bytes(b"PK\3\4 hello"), "cannot be read"),
        ("noise.npy", lambda p: p.write_bytes(b"hello"), "cannot be read"),
        ("noise.safetensors", lambda p: p.write_bytes(b"hello world, hello"), "cannot be read"),
        ("absent.npz", lambda p: None, "cannot be read"),
        ("set.csv", lambda p: p.write_text("1,2"), "file type"),
    ],
)
def test_bad_arrays_are_user_errors_that_name_the_file(tmp_path, name, write, says):
    write(tmp_path / name)
    with pytest.raises(UserError, match=says) as e:
        load_data("array", path=str(tmp_path / name))
    assert name in str(e.value) and str(e.value).count("\n") < 6


def npy_bytes():
    out = io.BytesIO()
    np.save(out, np.zeros((4, 4)))
    return out.getvalue()


def test_a_zip_bomb_is_refused_by_the_size_it_states(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((1000, 1000), np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 10_000
    with pytest.raises(UserError, match="max_gib"):
        load_data("array", path=str(tmp_path / "bomb.npz"), max_gib=0.001)


# ---- load_data


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load_data("swissroll"), "did you mean 'swiss-roll'"),
        (lambda: load_data("tree", "tset"), "did you mean 'test'"),
        (lambda: load_data("tree", branchng=3), "did you mean 'branching'"),
        (lambda: load_data("tree", split="train", depth=2.5), r"expected: int\n  found: 2.5"),
        (lambda: load_data("tree", depth=True), "expected: int"),
        (lambda: load_data("swiss-roll", scale="big"), "expected: float"),
        (lambda: load_data("swiss-roll", center=(1.0,)), r"tuple\[float, float\]"),
        (lambda: load_data("digits", flip=1), "expected: bool"),
        (lambda: load_data("folder", path="x"), "folder needs 'size'"),
        (lambda: load_data("datasaurus"), "datasaurus needs 'file'"),
        (lambda: load_data("two-moons", n=0), "2 or more"),
    ],
)
def test_wrong_names_and_options_are_explained(call, says):
    with pytest.raises(UserError, match=says):
        call()
