"""Captioned pictures: what is left out is named, what is given is the same for every number of workers and ranks."""

import functools
import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from nanodiffusion.data import census, load_data, pictures, split
from nanodiffusion.data.buckets import BucketOrder, bucket_table
from nanodiffusion.data.conditioning import MASKS, random_mask
from nanodiffusion.data.controls import CONTROLS
from nanodiffusion.data.judge import choose_picture
from nanodiffusion.data.pictures import Pictures, place, resized
from nanodiffusion.data.shards import Fault, expand_shards, read_shards
from nanodiffusion.data.tensors import order
from nanodiffusion.errors import UserError
from tests.test_shards import dirty_set, encoded, tar

PHOTOS = {
    "astronaut": skimage.data.astronaut,  # 512 x 512
    "chelsea": skimage.data.chelsea,  # 300 x 451
    "coffee": skimage.data.coffee,  # 400 x 600
    "china": lambda: load_sample_image("china.jpg"),  # 427 x 640
    "flower": lambda: load_sample_image("flower.jpg").transpose(1, 0, 2),  # 640 x 427
}


@functools.cache
def photo(name: str) -> np.ndarray:
    return np.ascontiguousarray(PHOTOS[name]())


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG", compress_level=1)


@functools.cache
def photo_png(name: str) -> bytes:
    return png(photo(name))


def photo_members(names: Any = PHOTOS) -> list[tuple[str, bytes]]:
    return [m for n in names for m in ((f"{n}.png", photo_png(n)), (f"{n}.txt", f"a photo of {n}".encode()))]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Two shards of five photos, in two shapes besides the square."""
    names = list(PHOTOS)
    (tmp_path / "photos").mkdir()
    for k in range(2):
        tar(tmp_path / "photos" / f"{k}.tar", *photo_members(names[3 * k : 3 * k + 3]))
    return str(tmp_path / "photos")


def small(tmp_path: Path, n: int, height: int = 12, width: int = 16, **members: bytes) -> str:
    """A shard of n noisy pictures."""
    random = np.random.default_rng(0)
    made = []
    for i in range(n):
        made += [(f"{i:04d}.png", png(random.integers(0, 256, (height, width, 3), np.uint8)))]
        made += [(f"{i:04d}.txt", f"picture {i}".encode())]
        made += [(f"{i:04d}.{ending}", raw) for ending, raw in members.items()]
    return str(tar(tmp_path / "small.tar", *made))


def drawn(b: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, 4, generator=torch.Generator().manual_seed(seed))


def as_bytes(x0: torch.Tensor) -> torch.Tensor:
    """(b 3 h w) in [-1, 1] -> uint8 (b h w 3)."""
    return ((x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


# ---- pixels


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_a_crop_is_pillows_resized_picture_at_the_place_that_is_told(photos: str, resample: str) -> None:
    data = pictures(photos, size=96, resample=resample)
    index, u = torch.arange(5), drawn(5)
    x0, cond = data.batch(index, u)
    for name, x, (_, _, top, left, height, width) in zip(PHOTOS, x0, cond["sizes"].tolist()):
        image = Image.fromarray(photo(name))
        short = min(image.size)
        size = (96 * image.width // short, 96 * image.height // short)
        whole = np.asarray(image.resize(size, Image.Resampling[resample.upper()]))
        expected = torch.from_numpy(whole[top : top + height, left : left + width].copy()).permute(2, 0, 1)
        torch.testing.assert_close(x, expected.float() / 127.5 - 1, rtol=0, atol=0)
        assert (height, width) == (96, 96)


def test_resizing_is_antialiased_as_torchs_is(photos: str) -> None:
    x0, _ = pictures(photos, size=64, crop="center").batch(torch.arange(5))
    for name, x in zip(PHOTOS, x0):
        pixels = torch.tensor(photo(name)).permute(2, 0, 1)[None].float()
        h, w = pixels.shape[2:]
        high, wide = (64, 64 * w // h) if h <= w else (64 * h // w, 64)
        whole = F.interpolate(pixels, (high, wide), mode="bilinear", antialias=True, align_corners=False)[0]
        top, left = (high - 64) // 2, (wide - 64) // 2
        torch.testing.assert_close((x + 1) * 127.5, whole[:, top : top + 64, left : left + 64], rtol=0, atol=1.001)


def test_sizes_are_height_before_width_in_portrait_and_landscape(photos: str, tmp_path: Path) -> None:
    data = pictures(photos, size=64)
    sizes = data.batch(torch.arange(5), torch.full((5, 4), 0.999999))[1]["sizes"]
    # 64 / 300 * 451 = 96.2, 64 / 400 * 600 = 96, 64 / 427 * 640 = 95.9: the last place is that less 64
    assert sizes.tolist() == [
        [512, 512, 0, 0, 64, 64],
        [300, 451, 0, 32, 64, 64],
        [400, 600, 0, 32, 64, 64],
        [427, 640, 0, 31, 64, 64],
        [640, 427, 31, 0, 64, 64],
    ]
    said = json.dumps({"original_height": 1000, "original_width": 2000}).encode()
    data = pictures(small(tmp_path, 2, json=said), size=8)
    assert data.batch(torch.arange(2))[1]["sizes"].tolist() == [[1000, 2000, 0, 1, 8, 8]] * 2


def test_a_mirrored_crop_lies_where_it_is_told_in_the_mirror_image(photos: str) -> None:
    plain, mirrored = pictures(photos, size=64), pictures(photos, size=64, flip=True)
    u = drawn(5)
    u[:, 2] = torch.tensor([0.1, 0.9, 0.1, 0.49, 0.5])
    x, cond = mirrored.batch(torch.arange(5), u)
    for i, name in enumerate(PHOTOS):
        _, _, top, left, _, _ = cond["sizes"][i].tolist()
        image = Image.fromarray(photo(name))
        whole = np.asarray(
            image.resize([64 * side // min(image.size) for side in image.size], Image.Resampling.BILINEAR)
        )
        whole = whole[:, ::-1] if u[i, 2] < 0.5 else whole
        expected = torch.from_numpy(whole[top : top + 64, left : left + 64].copy())
        torch.testing.assert_close(as_bytes(x)[i], expected, rtol=0, atol=0)
    torch.testing.assert_close(cond["sizes"], plain.batch(torch.arange(5), u)[1]["sizes"])


def test_a_resized_picture_just_covers_its_crop() -> None:
    height, width = np.random.default_rng(0).integers(1, 3000, (2, 5000))
    for to_height, to_width in ((64, 64), (64, 96), (1024, 960)):
        high, wide = resized(height, width, to_height, to_width)
        scale = np.maximum(to_height / height, to_width / width)
        assert (high >= to_height).all() and (wide >= to_width).all()
        assert ((high == to_height) | (wide == to_width)).all()
        for found, side in ((high, height), (wide, width)):
            assert (found <= side * scale + 1e-6).all() and (found > side * scale - 1 - 1e-6).all()


def test_crops_lie_everywhere_alike_often_in_100000_draws() -> None:
    n = 100_000
    u = np.random.default_rng(0).random((n, 4), np.float32)
    height, width = resized(np.full(n, 480), np.full(n, 500), 64, 64)
    assert (height[0], width[0]) == (64, 66)
    top, left = place(height - 64 + 9, width - 64, u)
    for found, places in ((top, 10), (left, 3)):
        counts = np.bincount(found, minlength=places)
        assert len(counts) == places
        # 5 standard deviations of a binomial
        np.testing.assert_allclose(counts, n / places, atol=5 * (n * (1 / places) * (1 - 1 / places)) ** 0.5)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.02
    last = place(np.arange(2000), np.arange(2000), np.full((2000, 4), np.nextafter(np.float32(1), np.float32(0))))
    np.testing.assert_array_equal(last, [np.arange(2000)] * 2)


# ---- controls and holes


def test_canny_is_opencvs_of_the_very_crop(photos: str) -> None:
    data = pictures(photos, size=96, flip=True, control={"name": "canny", "low": 50, "high": 120})
    x0, cond = data.batch(torch.arange(5), drawn(5))
    for x, control in zip(as_bytes(x0), cond["control"]):
        edges = torch.from_numpy(cv2.Canny(np.ascontiguousarray(x.numpy()), 50, 120)).float() / 255
        torch.testing.assert_close(control, edges.expand(3, -1, -1), rtol=0, atol=0)
    assert cond["control"].dtype == torch.float32 and 0 < cond["control"].mean() < 0.5


@pytest.mark.parametrize("kind", [None, *MASKS])
def test_a_hole_is_the_random_mask_of_its_number(photos: str, kind: str | None) -> None:
    data = pictures(photos, size=64, hole={"name": kind or "random"}, control={"name": "inpainting"})
    u = drawn(5)
    x0, cond = data.batch(torch.arange(5), u)
    for i, seed in enumerate(u[:, 3].tolist()):
        random = np.random.Generator(np.random.Philox(key=[int(seed * 2**53), 0]))
        expected = torch.from_numpy(random_mask(random, 64, 64, kind))[None].float()
        torch.testing.assert_close(cond["hole"][i], expected, rtol=0, atol=0)
    hidden = torch.where(cond["hole"] == 1, -torch.ones(()), (x0 + 1) / 2)
    torch.testing.assert_close(cond["control"], hidden, rtol=0, atol=1e-6)
    without = data.batch(torch.arange(5))[1]["hole"]
    torch.testing.assert_close(data.batch(torch.arange(5))[1]["hole"], without, rtol=0, atol=0)


def test_a_pair_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    rows = np.arange(60, dtype=np.uint8)[:, None, None].repeat(90, 1).repeat(3, 2)
    columns = np.arange(90, dtype=np.uint8)[None, :, None].repeat(60, 0).repeat(3, 2)
    picture = np.concatenate([rows[..., :1], columns[..., :1], rows[..., :1]], 2)
    half = np.asarray(Image.fromarray(255 - picture).resize((45, 30), Image.Resampling.BOX))
    members = [("a.png", png(picture)), ("a.control.png", png(255 - picture)), ("a.txt", b"a")]
    members += [("b.png", png(picture)), ("b.txt", b"b"), ("b.control.png", png(half))]
    shard = tar(tmp_path / "p.tar", *members, ("c.png", png(picture)), ("c.txt", b"c"))
    (tmp_path / "folder").mkdir()
    for name, raw in members:
        (tmp_path / "folder" / name).write_bytes(raw)
    for path in (str(shard), str(tmp_path / "folder")):
        data = pictures(path, size=32, flip=True, control={"name": "paired"})
        x0, cond = data.batch(torch.tensor([0, 1, 0, 1]), drawn(4))
        torch.testing.assert_close(cond["control"], 1 - (x0 + 1) / 2, rtol=0, atol=2.5 / 255)
        assert data.captions == ("a", "b")
        assert data.faults == (["p.tar:c: no control.png"] if path.endswith("tar") else [])


def test_a_function_of_the_users_is_a_control_by_name(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTROLS, "negative", lambda crop, gain=1.0: gain * (255 - crop.transpose(2, 0, 1)) / 255)
    monkeypatch.setitem(CONTROLS, "odd", lambda crop: crop)
    data = pictures(photos, size=32, control={"name": "negative", "gain": 0.5})
    x0, cond = data.batch(torch.arange(5), drawn(5))
    torch.testing.assert_close(cond["control"], (1 - x0) / 4, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="the control makes no picture"):
        pictures(photos, size=32, control={"name": "odd"})


# ---- the census


def test_every_fault_of_a_shard_reader_is_named_counted_and_the_same_on_every_opening(tmp_path: Path) -> None:
    shards = "::".join(map(str, dirty_set(tmp_path)))
    faults: list[str] = []
    sound = list(read_shards(expand_shards(shards), faults))
    data = pictures(shards, size=8, workers=2)
    assert data.captions == tuple(sample.caption for sample in sound) and data.faults == faults
    sizes = data.batch(torch.arange(len(data)))[1]["sizes"]
    assert sizes[:, :2].tolist() == [[sample.image.height, sample.image.width] for sample in sound]
    line = str(data.census)
    assert line.startswith(f"{len(sound)} pictures of 9 files; {len(faults)} left out: ") and "\n" not in line
    assert sum(data.census.reasons.values()) == len(faults) and data.census.reasons["no caption"] == 3
    again = pictures(shards, size=8)  # from the cache
    shutil.rmtree(tmp_path / "cache")
    anew = pictures(shards, size=8)
    for other in (again, anew):
        assert (other.faults, other.captions, str(other.census)) == (data.faults, data.captions, line)
        np.testing.assert_array_equal(other.census.rows, data.census.rows)


def test_a_census_is_kept_until_the_shard_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = small(tmp_path, 3)
    first = pictures(shard, size=8)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as m:
        m.setattr("nanodiffusion.data.census.groups", never)
        np.testing.assert_array_equal(pictures(shard, size=16).census.rows, first.census.rows)
        with pytest.raises(AssertionError, match="read again"):
            pictures(shard, size=8, captions=False)
    small(tmp_path, 4)
    assert len(pictures(shard, size=8)) == 4
    for kept in (cache / "shards").glob("*.json"):
        kept.write_text('{"rows": ')
    assert len(pictures(shard, size=8)) == 4


def test_a_folder_is_measured_again_only_where_files_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "folder"
    home.mkdir()
    for i in range(3):
        (home / f"{i}.png").write_bytes(png(np.full((8, 10 + i, 3), i, np.uint8)))
        (home / f"{i}.txt").write_text(f"number {i}")
    (home / "bad.png").write_bytes(b"nothing")
    (home / "bad.txt").write_text("bad")
    (home / "mute.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    (home / "2.json").write_text('{"original_height": 80, "original_width": 120}')
    data = pictures(str(home), size=8)
    assert data.captions == ("number 0", "number 1", "number 2")
    assert data.faults == ["bad.png: not a PNG, JPEG or WEBP", "mute.png: no caption"]
    assert data.batch(torch.arange(3))[1]["sizes"][:, :2].tolist() == [[8, 10], [8, 11], [80, 120]]
    read = []
    real = Path.read_bytes
    monkeypatch.setattr("nanodiffusion.data.census.picture_bytes", lambda file: read.append(file.name) or real(file))
    (home / "1.txt").write_text("another caption")
    (home / "bad.png").write_bytes(png(np.ones((9, 9, 3), np.uint8)))
    data = pictures(str(home), size=8)
    assert read == ["bad.png"]
    assert data.captions == ("number 0", "another caption", "number 2", "bad")
    assert len(pictures(str(home), size=8, captions=False)) == 5


def test_a_fault_of_the_moment_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "folder"
    home.mkdir()
    for i in range(3):
        (home / f"{i}.png").write_bytes(png(np.full((8, 8, 3), i, np.uint8)))
    real = census.picture_bytes

    def refused(file: Path) -> bytes:
        if file.name == "1.png":
            raise Fault("the file cannot be read: Permission denied")
        return real(file)

    with monkeypatch.context() as patch:
        patch.setattr(census, "picture_bytes", refused)
        assert len(pictures(str(home), size=8, captions=False)) == 2
    read = []
    monkeypatch.setattr(census, "picture_bytes", lambda file: read.append(file.name) or real(file))
    assert len(pictures(str(home), size=8, captions=False)) == 3 and read == ["1.png"]


def test_a_quick_census_reads_headers_and_the_damage_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    turned = encoded(Image.fromarray(photo("coffee")), "JPEG", exif=_turned())
    shard = tar(tmp_path / "a.tar", ("a.jpg", turned), ("a.txt", b"a"), ("b.jpg", turned[:9000]), ("b.txt", b"b"))
    whole, quick = pictures(str(shard), size=16), pictures(str(shard), size=16, check="quick")
    assert (len(whole), len(quick)) == (1, 2)
    np.testing.assert_array_equal(quick.census.rows[:1], whole.census.rows)
    assert whole.batch(torch.tensor([0]))[1]["sizes"].tolist()[0][:2] == [600, 400]
    with pytest.raises(UserError, match="tar:b is not what it was at the census"):
        quick.batch(torch.tensor([0, 1]))


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_the_best_of_n_is_the_first_of_the_highest_score(tmp_path: Path) -> None:
    grey = lambda level: png(np.full((8, 8, 3), level, np.uint8))
    members = []
    for key, scores in {"a": "0.1, 0.3,0.2", "b": "0.3,0.3,-1e3", "c": "-2,-3,-1\n"}.items():
        members += [(f"{key}.{i}.png", grey(10 * i + ord(key))) for i in (2, 0, 1)]
        members += [(f"{key}.txt", b"text"), (f"{key}.clip_scores.txt", scores.encode())]
    shard = str(tar(tmp_path / "best.tar", *members))
    data, faults = pictures(shard, size=8), list[str]()
    chosen = [ord("a") + 10, ord("b"), ord("c") + 20]
    assert as_bytes(data.batch(torch.arange(3))[0])[:, 0, 0, 0].tolist() == chosen and not data.faults
    read = [sample.image.getpixel((0, 0)) for sample in read_shards([shard], faults)]  # as encode and prepare have it
    assert read == [(level,) * 3 for level in chosen] and not faults


@pytest.mark.parametrize(
    "parts",
    [
        {"clip_scores.txt": b"0.1,0.2", "0.png": b"", "2.png": b""},
        {"clip_scores.txt": b"0.1", "0.png": b"", "1.png": b""},
        {"clip_scores.txt": b"0.1,nan", "0.png": b"", "1.png": b""},
        {"clip_scores.txt": b"0.1;0.2", "0.png": b"", "1.png": b""},
        {"clip_scores.txt": b"", "0.png": b""},
        {"clip_scores.txt": b"0.1", "0.png": b"", "png": b""},
        {"clip_scores.txt": b"0.1"},
        {"0.png": b"", "1.png": b""},
        {"txt": b"a"},
    ],
)
def test_malformed_scores_are_faults(parts: dict[str, bytes]) -> None:
    with pytest.raises(Fault, match=r"clip_scores.txt|no picture"):
        choose_picture(parts)


# ---- order and workers


def test_order_and_tensors_are_the_same_for_any_number_of_ranks_and_workers(tmp_path: Path) -> None:
    steps, batch = 3, 8
    members = [
        (f"{n}.{end}", raw) for n in PHOTOS for end, raw in (("png", png(photo(n)[::6, ::6])), ("txt", b"a photo"))
    ]
    photos = str(tar(tmp_path / "small.tar", *members))
    options: dict[str, Any] = {"size": 48, "flip": True, "hole": {"name": "random"}, "control": {"name": "inpainting"}}

    def epoch(ranks: int, workers: int, buckets: bool) -> list[dict[str, torch.Tensor]]:
        sizes = [[48, 48], [48, 72], [72, 48]] if buckets else False
        sets = [pictures(photos, **options, buckets=sizes, workers=workers) for _ in range(ranks)]
        asked = [(sets[0].order(batch, 7, step), drawn(batch, step)) for step in range(steps)]
        seen = []
        for step, (index, u) in enumerate(asked):
            parts = []
            for rank, data in enumerate(sets):
                torch.testing.assert_close(data.order(batch, 7, step), index)
                cuts = [t.chunk(ranks)[rank] for t in (index, u)]
                if step + 1 < steps:
                    data.prefetch(*(t.chunk(ranks)[rank] for t in asked[step + 1]))
                x0, cond = data.batch(*cuts)
                assert x0.shape[1:] == data.shape_of(index)
                parts.append({"x0": x0, **cond})
            seen.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        for data in sets:
            data.close()
        return seen

    for buckets in (False, True):
        expected = epoch(1, 0, buckets)
        for ranks, workers in ((1, 2), (2, 0), (2, 2), (4, 0), (4, 2)):
            for ours, theirs in zip(epoch(ranks, workers, buckets), expected):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_without_buckets_the_order_is_that_of_every_set(photos: str) -> None:
    data = pictures(photos, size=16)
    for step in range(5):
        torch.testing.assert_close(data.order(4, 3, step), order(5, 4, 3, step))


def test_buckets_of_1024_are_those_of_sdxl() -> None:
    """Podell et al. 2023, appendix I, aspects 0.5 to 2, and the mirror of 704 x 1344, which the table lacks."""
    published = """704 1408, 704 1344, 768 1344, 768 1280, 832 1216, 832 1152, 896 1152, 896 1088, 960 1088, 960 1024,
    1024 1024, 1024 960, 1088 960, 1088 896, 1152 896, 1152 832, 1216 832, 1280 768, 1344 768, 1408 704"""
    table = [tuple(map(int, bucket.split())) for bucket in published.split(",")]
    assert [bucket for bucket in bucket_table(1024) if bucket != (1344, 704)] == table
    assert bucket_table(512) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


def test_a_picture_is_in_the_bucket_of_the_nearest_shape_and_covers_it(photos: str) -> None:
    data = pictures(photos, size=256, buckets=True)
    assert data.buckets == ((192, 320), (256, 256), (320, 192))
    # log(451/300) = 0.408 and log(640/427) = 0.405 are nearer to log(320/192) = 0.511 than to 0
    assert [data.buckets[k] for k in data.bucket] == [(256, 256), *[(192, 320)] * 3, (320, 192)]
    x0, cond = data.batch(torch.tensor([1, 2, 3]), torch.full((3, 4), 0.999999))
    assert x0.shape == (3, 3, 192, 320)
    # 300 x 451 becomes 212 x 320, 400 x 600 213 x 320, 427 x 640 213 x 320
    assert cond["sizes"].tolist() == [
        [300, 451, 20, 0, 192, 320],
        [400, 600, 21, 0, 192, 320],
        [427, 640, 21, 0, 192, 320],
    ]
    with pytest.raises(UserError, match="a batch is of one bucket"):
        data.batch(torch.tensor([0, 1]))
    assert data.square().batch(torch.tensor([0, 1]))[0].shape == (2, 3, 256, 256)


def test_every_sample_comes_equally_often_in_batches_of_one_bucket() -> None:
    bucket = np.random.default_rng(0).permutation(np.repeat([0, 2, 3], [50, 3, 17]))
    turn, batch, epochs = BucketOrder(bucket), 8, 80
    steps = epochs * len(bucket) // batch  # 80 n_k divides by 8: a whole number of epochs of every bucket
    seen = [turn(batch, 5, step) for step in range(steps)]
    assert all(len(np.unique(bucket[index])) == 1 for index in seen)
    np.testing.assert_array_equal(np.bincount(torch.cat(seen), minlength=len(bucket)), np.full(len(bucket), epochs))
    other = BucketOrder(bucket)
    for step in (699, 3, 311):  # a function of the step, in any order
        torch.testing.assert_close(other(batch, 5, step), seen[step])
    assert not all(torch.equal(turn(batch, 6, step), seen[step]) for step in range(9))
    first = [int(bucket[index[0]]) for index in seen[:8]]
    assert first != sorted(first)


def test_a_split_and_a_part_keep_captions_and_pictures(photos: str) -> None:
    data = pictures(photos, size=32)
    rest, held = split(data, 0.4, seed=1)
    assert sorted([*rest.captions, *held.captions]) == sorted(data.captions) and len(held) == 2
    part = data.take(torch.tensor([4, 2, 0])).take(torch.tensor([2, 0]))
    x0, cond = part.batch(torch.arange(2))
    torch.testing.assert_close(x0, data.batch(torch.tensor([0, 4]))[0], rtol=0, atol=0)
    assert [part.captions[i] for i in cond["row"]] == ["a photo of astronaut", "a photo of flower"]
    test = load_data("pictures", "test", path=photos, size=32, test_fraction=0.4, seed=1)
    assert test.captions == held.captions
    other = load_data("pictures", "test", path=photos + "/{0..1}.tar", test_path=photos + "/1.tar", size=32)
    assert other.captions == data.captions[3:]


def test_a_test_set_of_its_own_is_taken_whole_whatever_the_fraction(photos: str, tmp_path: Path) -> None:
    own = {"path": photos + "/0.tar", "test_path": photos + "/1.tar"}
    for part, file in {"train": "0.tar", "test": "1.tar"}.items():
        (tmp_path / "parted" / part).mkdir(parents=True)
        shutil.copy(Path(photos) / file, tmp_path / "parted" / part)
    for options in (own, {"path": str(tmp_path / "parted")}):
        sets = [load_data("pictures", part, size=32, test_fraction=0.4, **options) for part in ("train", "test")]
        assert [len(data) for data in sets] == [3, 2]


def test_no_thread_is_left_when_a_set_is_closed(photos: str) -> None:
    before = threading.active_count()
    data = pictures(photos, size=16, workers=2)
    for step in range(4):  # two wait at most
        data.prefetch(torch.arange(5), drawn(5, step))
    data.batch(torch.arange(5), drawn(5, 3))
    assert threading.active_count() == before + 2
    data.close()
    assert threading.active_count() == before
    torch.testing.assert_close(data.batch(torch.arange(5))[0].shape, (5, 3, 16, 16))  # goes on
    data.close()


@pytest.mark.slow
def test_a_program_ends_while_a_batch_is_under_way(photos: str) -> None:
    program = (
        "import sys, torch; from nanodiffusion.data import pictures\n"
        f"data = pictures({photos!r}, size=512, workers=2); data.prefetch(torch.arange(5)); print(len(data))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"5\n", b"")


# ---- from elsewhere


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Counting(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Counting, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_shards_at_addresses_are_fetched_once_and_then_open_offline(
    site: tuple[str, list[str]], photos: str, cache: Path
) -> None:
    url, asked = site
    here = pictures(photos, size=32)
    there = pictures(url + "/photos/{0..1}.tar", size=32)
    assert asked == ["/photos/0.tar", "/photos/1.tar"]
    shutil.rmtree(photos)
    again = pictures(url + "/photos/{0..1}.tar", size=32, control={"name": "canny"})
    assert len(asked) == 2 and again.captions == there.captions == here.captions
    torch.testing.assert_close(again.batch(torch.arange(5))[0], there.batch(torch.arange(5))[0], rtol=0, atol=0)
    with pytest.raises(UserError, match="cannot be had"):
        pictures(url + "/photos/2.tar", size=32)
    assert len(list((cache / "shards").glob("*.tar"))) == 2 and not list((cache / "shards").glob(".*"))


def test_a_picture_of_the_users_own_at_an_address_is_fetched_once(
    site: tuple[str, list[str]], photos: str, tmp_path: Path
) -> None:
    url, asked = site
    (tmp_path / "coffee.png").write_bytes(photo_png("coffee"))
    data = pictures(photos, size=32)
    here = data.own([str(tmp_path / "coffee.png")], [], ["a cup"]).batch(torch.arange(1))[0]
    for _ in range(2):
        there = data.own([f"{url}/coffee.png"], [], ["a cup"])
        torch.testing.assert_close(there.batch(torch.arange(1))[0], here, rtol=0, atol=0)
    assert asked == ["/coffee.png"] and there.captions == ("a cup",)
    with pytest.raises(UserError, match="cannot be had"):
        data.own([f"{url}/gone.png"], [], ["a cup"])


def test_of_many_who_open_an_address_at_once_one_fetches_it(site: tuple[str, list[str]], photos: str) -> None:
    url, asked = site
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pictures(url + "/photos/0.tar", size=32).captions, range(4)))
    assert found == [("a photo of astronaut", "a photo of chelsea", "a photo of coffee")] * 4
    assert asked == ["/photos/0.tar"]


def test_a_command_is_run_only_where_it_is_allowed_and_once(photos: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"import sys; open({str(log)!r}, 'a').write('x'); sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    command = f"pipe:{shlex.join([sys.executable, '-c', script])} {photos}/" + "{0..1}.tar"
    with pytest.raises(UserError, match="pipes=true"):
        pictures(command, size=32)
    assert not log.exists()
    data = pictures(command, size=32, pipes=True)
    assert data.captions == pictures(photos, size=32).captions and log.read_text() == "xx"
    pictures(command, size=32, pipes=True)
    assert log.read_text() == "xx"
    piped = pictures(f"pipe:sh -c 'cat {photos}/0.tar | cat'", size=32, pipes=True)
    assert len(piped) == 3
    with pytest.raises(UserError, match="brought no shard"):
        pictures(f"pipe:cat {photos}/0.tar;touch {log}2", size=32, pipes=True)
    assert not Path(f"{log}2").exists()


# ---- bad input

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no_such_path": ({"path": "{tmp}/nothing"}, "a shard is not there"),
    "no_match": ({"path": "{tmp}/z*.tar"}, "a shard is not there"),
    "empty_folder": ({"path": "{tmp}/empty"}, "there is no picture here"),
    "other_scheme": ({"path": "s3://bucket/0.tar"}, "this is no place for shards"),
    "pipe_refused": ({"path": "pipe:cat x.tar"}, "a recipe may not start a command"),
    "pipe_with_a_shell": ({"path": "pipe:cat a | gunzip", "pipes": True}, "this is no command"),
    "pipe_unclosed": ({"path": "pipe:cat 'a", "pipes": True}, "the command cannot be read"),
    "pipe_unknown": ({"path": "pipe:no-such-program a", "pipes": True}, "the command cannot be run"),
    "pipe_fails": ({"path": "pipe:cat no-such-file.tar", "pipes": True}, "the command brought no shard"),
    "pipe_silent": ({"path": "pipe:true", "pipes": True}, "the command brought no shard"),
    "no_captions_anywhere": ({"path": "{tmp}/mute.tar"}, "no picture has a caption"),
    "nothing_sound": ({"path": "{tmp}/broken.tar"}, "there is no sound sample"),
    "size_of_8": ({"size": 100}, "halves a picture three times"),
    "size_zero": ({"size": 0}, "size is too small"),
    "resample": ({"resample": "nearest"}, "unknown resample 'nearest'"),
    "crop": ({"crop": "left"}, "unknown crop 'left'"),
    "check": ({"check": "none"}, "unknown check 'none'"),
    "workers": ({"workers": -1}, "workers is too small"),
    "control": ({"control": {"name": "cany"}}, "did you mean 'canny'"),
    "control_unnamed": ({"control": {"low": 1}}, "unknown control"),
    "control_option": ({"control": {"name": "canny", "lo": 1}}, "unknown key control.lo"),
    "control_order": ({"control": {"name": "canny", "low": 9, "high": 1}}, "these thresholds are not in order"),
    "control_given": ({"control": {"name": "canny", "crop": 1}}, "the data gives this by itself"),
    "control_without_hole": ({"control": {"name": "inpainting"}}, "inpainting needs holes"),
    "control_member": ({"control": {"name": "paired", "member": "../x.png"}}, "this names no picture"),
    "control_absent": ({"control": {"name": "paired"}}, "no control.png"),
    "hole": ({"hole": {"name": "square"}}, "unknown hole.name 'square'"),
    "hole_option": ({"hole": {"name": "boxes", "sides": 3}}, "unknown key hole.sides"),
    "no_bucket": ({"size": 40, "buckets": True}, "no bucket is of this size"),
    "bucket_odd": ({"buckets": [[64, 65]]}, "these are no buckets"),
    "bucket_flat": ({"buckets": [64, 64]}, "wrong type"),
    "bucket_twice": ({"buckets": [[64, 64], [64, 64]]}, "these are no buckets"),
    "bucket_none": ({"buckets": []}, "these are no buckets"),
    "option": ({"sise": 8}, "unknown key data.sise"),
    "type": ({"size": "8"}, "wrong type"),
    "split": ({"split": "valid"}, "unknown split"),
    "no_test_set": ({"split": "test"}, "this set has no test part"),
    "template": ({"path": "{tmp}/folder", "template": "a photo"}, "this is no template"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_message(kind: str, tmp_path: Path) -> None:
    small(tmp_path, 2)
    grey = png(np.zeros((8, 8, 3), np.uint8))
    tar(tmp_path / "mute.tar", ("a.png", grey), ("b.png", grey), ("b.txt", b" "))
    tar(tmp_path / "broken.tar", ("a.png", grey[:40]), ("a.txt", b"a"), ("b.png", grey))
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(grey)
    options, said = BAD[kind]
    options = {"path": "{tmp}/small.tar", **options}
    options["path"] = options["path"].replace("{tmp}", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_data("pictures", **{"size": 8, **options})
    message = str(error.value)
    assert said in message and len(message.splitlines()) <= 6 and "Traceback" not in message


def test_a_picture_that_changed_since_the_census_is_one_clear_message(tmp_path: Path) -> None:
    shard = Path(small(tmp_path, 3))
    data = pictures(str(shard), size=8, workers=2)
    raw = bytearray(shard.read_bytes())
    start = int(data.census.rows[1, 1])
    raw[start : start + 40] = bytes(40)
    shard.write_bytes(raw)
    data.batch(torch.tensor([0, 2]))
    data.prefetch(torch.arange(3))
    with pytest.raises(UserError, match=r"small.tar:0001 is not what it was at the census"):
        data.batch(torch.arange(3))
    shard.write_bytes(raw[:1000])
    with pytest.raises(UserError, match="bytes are left"):
        data.batch(torch.tensor([2]))
    os.unlink(shard)
    with pytest.raises(UserError, match="No such file"):
        data.batch(torch.tensor([0]))


def test_without_captions_every_sound_picture_is_taken(tmp_path: Path) -> None:
    grey = png(np.zeros((8, 8, 3), np.uint8))
    shard = tar(tmp_path / "a.tar", ("a.png", grey), ("b.png", grey), ("b.txt", b"words"))
    data = pictures(str(shard), size=8, captions=False)
    assert data.captions == ("", "words") and isinstance(data, Pictures) and not data.faults
    assert pictures(str(shard), size=8).faults == ["a.tar:a: no caption"]


def test_the_outputs_are_where_they_are_sent(tmp_path: Path) -> None:
    data = pictures(small(tmp_path, 2), size=8, hole={"name": "full"}).to("meta")
    x0, cond = data.batch(torch.arange(2))
    assert {t.device.type for t in (x0, *cond.values())} == {"meta"}
