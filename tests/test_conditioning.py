"""Edges, masks and canvases: equality with OpenCV, PyTorch and arithmetic, published distributions, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from torch.testing import assert_close

from nanodiffusion.data import conditioning
from nanodiffusion.data.conditioning import (
    MASKS,
    as_bytes,
    canny,
    hide,
    latent_mask,
    outpaint,
    random_mask,
    to_mask,
    to_unit,
)
from nanodiffusion.errors import UserError

cv2 = pytest.importorskip("cv2")


def picture(channels: int = 3, seed: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Smooth shapes and noise, so that every threshold finds some edges."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, channels), dtype=np.uint8)
    big = np.array([cv2.resize(small[..., c], size[::-1]) for c in range(channels)]).transpose(1, 2, 0)
    return np.clip(big + rng.normal(0, 12, big.shape), 0, 255).astype(np.uint8)


def generator(seed: int = 0, k: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, k]))


# ---- edges


@pytest.mark.parametrize("thresholds", [(100, 200), (20, 60), (0, 0)])
@pytest.mark.parametrize("seed", range(5))
def test_canny_equals_opencv_for_every_kind_of_input(seed, thresholds):
    rgb, grey = picture(3, seed), picture(1, seed)[:, :, 0]
    expected_rgb, expected_grey = cv2.Canny(rgb, *thresholds), cv2.Canny(grey, *thresholds)
    rgba = np.dstack([rgb, np.full_like(grey, 255)])
    for image in (
        rgb,
        rgb.transpose(2, 0, 1),
        torch.from_numpy(rgb),
        Image.fromarray(rgb),
        rgba,
        Image.fromarray(rgba),
    ):
        edges = canny(image, *thresholds)
        assert edges.mode == "L"
        np.testing.assert_array_equal(np.asarray(edges), expected_rgb)
    for image in (grey, grey[:, :, None], grey[None], Image.fromarray(grey)):
        np.testing.assert_array_equal(np.asarray(canny(image, *thresholds)), expected_grey)


def test_what_is_transparent_is_white_and_deep_grey_keeps_its_high_byte():
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:2, :, 3] = 255
    expected = np.array([0, 0, 255, 255], np.uint8)[:, None, None] * np.ones((1, 6, 3), np.uint8)
    np.testing.assert_array_equal(as_bytes(rgba), expected)
    np.testing.assert_array_equal(as_bytes(Image.fromarray(rgba)), expected)
    deep = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16)[None])
    np.testing.assert_array_equal(as_bytes(deep), np.arange(256)[None])


def test_canny_defaults_are_100_and_200():
    np.testing.assert_array_equal(np.asarray(canny(picture())), cv2.Canny(picture(), 100, 200))


@pytest.mark.parametrize("thresholds", [(-1, 5), (200, 100)])
def test_canny_refuses_thresholds_out_of_order(thresholds):
    with pytest.raises(UserError, match="low <= high"):
        canny(picture(), *thresholds)


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((5, 6, 2), np.uint8), np.zeros(4, np.uint8), "a.png"])
def test_what_is_no_image_of_bytes_is_refused(image):
    for use in (canny, as_bytes, to_unit, to_mask):
        with pytest.raises(UserError, match="image"):
            use(image)


# ---- tensors


def test_unit_tensor_is_the_image_over_255():
    rgb, grey = picture(), picture(1)
    assert_close(to_unit(rgb), torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255, rtol=0, atol=0)
    assert_close(to_unit(grey, 1), torch.from_numpy(grey).permute(2, 0, 1)[None] / 255, rtol=0, atol=0)
    assert_close(to_unit(grey, 3), to_unit(grey, 1).expand(-1, 3, -1, -1), rtol=0, atol=0)
    luma = np.array(Image.fromarray(rgb).convert("L"))
    assert_close(to_unit(rgb, 1)[0, 0], torch.from_numpy(luma) / 255, rtol=0, atol=0)
    with pytest.raises(UserError, match="channels"):
        to_unit(rgb, 2)


# ---- masks


def test_mask_is_one_from_half_grey_up():
    ramp = np.arange(256, dtype=np.uint8)[None]
    assert_close(to_mask(ramp)[0, 0, 0], (torch.arange(256) >= 128).float())
    assert_close(to_mask(ramp, 0.2)[0, 0, 0], (torch.arange(256) >= 51).float())
    assert_close(to_mask(Image.fromarray(ramp > 99))[0, 0, 0], (torch.arange(256) > 99).float())


@pytest.mark.parametrize("factor", [8, 4, 1])
def test_latent_mask_takes_each_squares_first_pixel(factor):
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 2, (2, 1, 40, 24), generator=g).float()
    assert_close(latent_mask(mask, factor), mask[:, :, ::factor, ::factor], rtol=0, atol=0)


def test_hidden_is_only_what_the_mask_covers():
    g = torch.Generator().manual_seed(0)
    image, mask = torch.rand(2, 3, 8, 6, generator=g), torch.randint(0, 2, (2, 1, 8, 6), generator=g).float()
    for fill in (0.0, -1.0):
        expected = torch.where(mask.expand_as(image) == 1, torch.tensor(fill), image)
        assert torch.equal(hide(image, mask, fill), expected)


@pytest.mark.parametrize("shape", [(1, 1, 12, 8), (1, 3, 8, 8), (8, 8)])
def test_mask_of_another_shape_is_refused(shape):
    with pytest.raises(UserError, match="mask") as e:
        latent_mask(torch.zeros(shape))
    assert str(shape) in str(e.value)
    with pytest.raises(UserError, match="mask") as e:
        hide(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 4))
    assert "(1, 1, 8, 4)" in str(e.value) and "8, 8" in str(e.value)


# ---- outpainting


@pytest.mark.parametrize("sides", [(8, 0, 0, 0), (0, 16, 0, 0), (1, 2, 3, 4), (0, 0, 24, 8)])
def test_outpainting_keeps_the_picture_and_masks_the_rest(sides):
    left, top, right, bottom = sides
    old = picture()
    canvas, mask = outpaint(Image.fromarray(old), *sides)
    h, w = old.shape[:2]
    assert canvas.size == mask.size == (w + left + right, h + top + bottom)
    assert (canvas.mode, mask.mode) == ("RGB", "L")
    inside = (slice(top, top + h), slice(left, left + w))
    np.testing.assert_array_equal(np.asarray(canvas)[inside], old)
    expected = np.full(mask.size[::-1], 255)
    expected[inside] = 0
    np.testing.assert_array_equal(np.asarray(mask), expected)


def test_outpainting_overlaps_only_on_sides_that_grow():
    _, mask = outpaint(picture(), left=8, bottom=4, overlap=3)
    expected = np.full((48 + 4, 64 + 8), 255)
    expected[: 48 - 3, 8 + 3 :] = 0
    np.testing.assert_array_equal(np.asarray(mask), expected)


@pytest.mark.parametrize(
    "options", [{}, {"left": -1, "right": 9}, {"left": 8, "overlap": -1}, {"left": 8, "right": 8, "overlap": 32}]
)
def test_impossible_outpainting_is_refused(options):
    with pytest.raises(UserError, match="overlap"):
        outpaint(picture(), **options)


# ---- random masks


@pytest.mark.parametrize("size", [(1024, 1024), (64, 96), (8, 8)])
@pytest.mark.parametrize("kind", [None, *MASKS])
def test_random_mask_is_a_function_of_the_seed(kind, size):
    a, b, c = (random_mask(generator(1, k), *size, kind) for k in (3, 3, 4))
    assert a.shape == size and a.dtype == np.uint8 and set(np.unique(a)) <= {0, 1} and a.any()
    np.testing.assert_array_equal(a, b)
    if kind != "full" and min(size) > 60 and a.mean() < 1:
        assert not np.array_equal(a, c)


def test_a_quarter_is_full_and_the_kinds_are_alike_often(monkeypatch):
    drawn = []
    for kind in MASKS:
        monkeypatch.setitem(MASKS, kind, lambda random, h, w, kind=kind: drawn.append(kind))
    for k in range(4000):
        random_mask(generator(0, k), 1024, 1024)
    shares = [drawn.count(kind) / 4000 for kind in ("full", "boxes", "strokes", "bands")]
    np.testing.assert_allclose(shares, 0.25, atol=4 * (0.25 * 0.75 / 4000) ** 0.5)


def sides_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Widths of the masked bands at the left, top, right and bottom."""
    columns, rows = mask.all(0), mask.all(1)
    return tuple(int(np.argmin(edge)) for edge in (columns, rows, columns[::-1], rows[::-1]))


def test_bands_have_the_published_distribution():
    sides = np.array([sides_of(random_mask(generator(0, k), 200, 100, "bands")) for k in range(2000)])
    fractions = sides / np.array([100, 200, 100, 200])
    there = sides > 0
    # p = 1/2 each, but never none of the four: 8/15; two that cover everything together never occur for continuous widths
    np.testing.assert_allclose(there.mean(0), 8 / 15, atol=0.05)
    assert fractions[there].min() >= 0.035 and fractions[there].max() <= 0.5
    np.testing.assert_allclose(fractions[there].mean(), 0.27, atol=0.015)
    assert (there.sum(1) > 0).all()


@pytest.mark.parametrize(("size", "scale"), [((1024, 1100), 1), ((512, 512), 0.5)])
def test_boxes_have_the_published_sides_and_margin(size, scale):
    masks = [random_mask(generator(0, k), *size, "boxes") for k in range(300)]
    spans = np.array([(m.any(1).sum(), m.any(0).sum()) for m in masks]) / scale
    solid = np.array([m.sum() == m.any(1).sum() * m.any(0).sum() for m in masks])  # all one-box masks, and a few others
    margin = int(10 * scale)
    assert not any(m[:margin].any() or m[-margin:].any() or m[:, :margin].any() or m[:, -margin:].any() for m in masks)
    assert 0.4 < solid.mean() < 0.6
    assert spans.min() >= 99 and np.mean(spans[solid] <= 512) > 0.98
    np.testing.assert_allclose(spans[solid].mean(), 305.5, atol=4 * 119 / (2 * 150) ** 0.5)  # uniform on 100 .. 511
    assert {cv2.connectedComponents(m)[0] - 1 for m in masks} == {1, 2}


def test_strokes_cover_more_or_less_and_are_connected_per_stroke():
    cover = []
    for k in range(200):
        mask = random_mask(generator(0, k), 256, 256, "strokes")
        cover.append(mask.mean())
        assert cv2.connectedComponents(mask)[0] - 1 <= 9
    assert np.min(cover) < 0.1 and np.max(cover) > 0.7


# ---- the same, of 100,000 masks: every number that is drawn has the distribution that is specified

DRAWS = 100_000


def alike_often(values: Any, first: int, last: int) -> None:
    """Whole numbers first ... last, none more often than chance allows."""
    counts = np.bincount(np.asarray(values) - first, minlength=last - first + 1)
    assert len(counts) == last - first + 1 and chisquare(counts).pvalue > 1e-4


def uniform(values: Any, low: float = 0, high: float = 1) -> None:
    assert kstest(values, "uniform", (low, high - low)).pvalue > 1e-4


class Recorder:
    """Stands in for an array of pixels, or for what draws on one: what was drawn and where."""

    def __init__(self, *_: Any) -> None:
        self.boxes: list[list[int]] = []
        self.brushes: list[float] = []
        self.parts: list[list[float]] = []

    def __setitem__(self, place: tuple[slice, slice], value: int) -> None:
        self.boxes.append([at for along in place for at in (along.start, along.stop)])

    def ellipse(self, box: list[float], fill: int) -> None:
        self.brushes.append(box[2] - box[0])

    def line(self, ends: list[float], fill: int, width: int) -> None:
        self.parts.append([*ends, width])


@pytest.mark.slow
def test_100000_kinds_of_mask(monkeypatch):
    drawn, random = [], generator()
    for kind in MASKS:
        monkeypatch.setitem(MASKS, kind, lambda random, h, w, kind=kind: drawn.append(kind))
    for _ in range(DRAWS):
        random_mask(random, 8, 8)
    assert chisquare([drawn.count(kind) for kind in MASKS]).pvalue > 1e-4


@pytest.mark.slow
def test_100000_boxes(monkeypatch):
    monkeypatch.setattr(conditioning, "np", SimpleNamespace(zeros=Recorder, uint8=np.uint8))
    random, sizes = generator(), (1024, 1536)
    found = [random_mask(random, *sizes, "boxes").boxes for _ in range(DRAWS)]
    alike_often([len(boxes) for boxes in found], 1, 2)
    boxes = np.array([box for boxes in found for box in boxes])
    dither = np.random.default_rng(0).random((2, len(boxes)))
    for side, (start, stop), part in zip(sizes, (boxes[:, :2].T, boxes[:, 2:].T), dither):
        alike_often(stop - start, 100, 511)
        places = side - 20 - (stop - start) + 1  # 10 from either border
        uniform((start - 10 + part) / places)
    assert abs(np.corrcoef(boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2])[0, 1]) < 0.01


@pytest.mark.slow
def test_100000_masks_of_strokes(monkeypatch):
    random, side, seen = generator(), 1024, []
    monkeypatch.setattr(conditioning.ImageDraw, "Draw", lambda canvas: seen.append(Recorder()) or seen[-1])
    monkeypatch.setattr(conditioning.Image, "new", lambda mode, size: np.zeros(()))
    counts, lengths, angles, brushes, starts = [], [], [], [], []
    for _ in range(DRAWS):
        random_mask(random, side, side, "strokes")
        parts = np.array(seen.pop().parts)
        new = np.flatnonzero(np.r_[True, (parts[1:, :2] != parts[:-1, 2:4]).any(1)])  # where no part goes on
        counts.append(np.diff(np.r_[new, len(parts)]))
        starts.append(parts[new, :2])
        brushes.append(parts[new, 4])
        inside = np.abs(parts[:, :2] - side / 2).max(1) < side / 2 - 460  # of which none reaches the border
        along = (parts[:, 2:4] - parts[:, :2])[inside]
        lengths.append(np.hypot(*along.T))
        angles.append(np.arctan2(*along.T))
    alike_often([len(each) for each in counts], 1, 9)
    alike_often(np.concatenate(counts), 1, 5)
    alike_often(np.concatenate(brushes).astype(int), 5, 260)
    alike_often(np.concatenate(lengths).round().astype(int), 10, 460)
    uniform(np.concatenate(angles), -np.pi, np.pi)
    uniform(np.concatenate(starts).ravel(), 0, side)


@pytest.mark.slow
def test_100000_bands():
    random, side = generator(), 400
    sides = np.array([sides_of(random_mask(random, side, side, "bands")) for _ in range(DRAWS)])
    alike_often((sides > 0) @ [1, 2, 4, 8], 1, 15)  # each side with probability 1/2, but never none
    for width in sides.T:
        alike_often(width[(width > 16) & (width < 200)], 17, 199)  # 4 and 50 % themselves are half as often


@pytest.mark.parametrize(("size", "kind", "key"), [((4, 64), None, "size"), ((64, 64), "box", "boxes")])
def test_random_mask_refuses_tiny_pictures_and_unknown_kinds(size, kind, key):
    with pytest.raises(UserError, match=key):
        random_mask(generator(), *size, kind)
