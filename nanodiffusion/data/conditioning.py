"""What a picture is controlled by: edges, masks, and more canvas to paint on; and the random masks of inpainting training.

A mask is 1 where the picture is to be painted anew and 0 where it stays. Random masks are pure functions of (generator,
size), so a training sample's mask is a function of (seed, k): `np.random.Generator(np.random.Philox(key=[seed, k]))`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from nanodiffusion.data.files import opaque
from nanodiffusion.errors import UserError, lookup, need

CHANNELS: dict[Any, str] = {1: "L", 3: "RGB"}
Generator = np.random.Generator


# ---- pictures


def as_bytes(image: Any) -> np.ndarray:
    """An image as bytes (h w) or (h w 3): a PIL image, or uint8 (h w), (h w c) or (c h w) with c 1, 3 or 4.

    What is transparent is white. Raises UserError on anything else.
    """
    if isinstance(image, Image.Image):
        grey = image.mode in ("1", "L") and not image.has_transparency_data
        return np.asarray(image.convert("L") if grey else opaque(image))
    array = np.asarray(image.cpu() if isinstance(image, Tensor) else image)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or tuple(array.shape[2:]) not in ((), (1,), (3,), (4,)):
        expected = "a PIL image, or uint8 (h w), (h w 3) or (3 h w)"
        found = f"{array.dtype} {array.shape}"
        raise UserError("this is no image of bytes", key="image", expected=expected, found=found)
    array = array[:, :, 0] if array.shape[2:] == (1,) else array
    return as_bytes(Image.fromarray(np.ascontiguousarray(array)))


def to_unit(image: Any, channels: int = 3) -> Tensor:
    """An image, as `as_bytes` takes it, in grey (1) or RGB (3): -> (1 channels h w) float32 in [0, 1].

    What ControlNets and adapters take. Raises UserError on another number of channels.
    """
    mode = lookup(CHANNELS, channels, "channels")
    levels = np.array(Image.fromarray(as_bytes(image)).convert(mode))
    return torch.from_numpy(np.atleast_3d(levels)).permute(2, 0, 1)[None].float() / 255


def canny(image: Any, low: int = 100, high: int = 200) -> Image.Image:
    """The edges of an image, white on black (Canny 1986): -> PIL "L", 255 on an edge and 0 elsewhere.

    An edge's gradient is above `high`, or above `low` beside an edge (levels of 0..255, L1 norm of a 3x3 Sobel filter).
    Of a colour image it is the channel that changes most. Raises UserError on other images and unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise UserError(
            "these thresholds are not in order", key="low, high", expected="0 <= low <= high", found=(low, high)
        )
    return Image.fromarray(need("cv2", extra="data").Canny(as_bytes(image), low, high))


# ---- masks


def to_mask(image: Any, threshold: float = 0.5) -> Tensor:
    """An image, as `as_bytes` takes it, as a mask: 1 where its grey is `threshold` (of 1) or more -> (1 1 h w) float32."""
    return (to_unit(image, 1) >= threshold).float()


def latent_mask(mask: Tensor, factor: int = 8) -> Tensor:
    """A mask of the latent's size, the nearest pixel of each: (b 1 H W) -> (b 1 H/factor W/factor).

    Raises UserError on another shape, and unless factor divides H and W.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] % factor or mask.shape[3] % factor:
        expected = f"(b, 1, H, W), where {factor} divides H and W"
        raise UserError("the mask does not fit a latent", key="mask", expected=expected, found=tuple(mask.shape))
    return F.interpolate(mask, (mask.shape[2] // factor, mask.shape[3] // factor), mode="nearest")


def hide(image: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """The image with `fill` where the mask is 1: (b c H W), (b 1 H W) -> (b c H W).

    0 (grey in [-1, 1]) for the 9-channel U-Nets, -1 in an image in [0, 1] for inpainting ControlNets.
    Raises UserError when the two differ in size.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != image.shape[2:]:
        expected = ("b", 1, *image.shape[2:])
        raise UserError(
            "the mask does not have the picture's size", key="mask", expected=expected, found=tuple(mask.shape)
        )
    return image.masked_fill(mask.to(image.device) >= 0.5, fill)


def outpaint(
    image: Any, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, overlap: int = 0
) -> tuple[Image.Image, Image.Image]:
    """The image on a larger canvas, and the mask of what is new: -> PIL "RGB" and "L" (255: new), of one size.

    Sides in pixels. The new pixels repeat the border's. overlap: how far the mask reaches into the old picture, on the
    sides that grow. Raises UserError on negative numbers, on no growth, and when the mask would cover everything.
    """
    old = np.array(Image.fromarray(as_bytes(image)).convert("RGB"))
    sides = _sides(left, top, right, bottom, overlap, old.shape[0], old.shape[1])
    picture = np.pad(old, ((top, bottom), (left, right), (0, 0)), mode="edge")
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = (s + overlap * (s > 0) for s in sides)
    mask = np.full((height, width), 255, np.uint8)
    mask[y0 : height - y1, x0 : width - x1] = 0
    return Image.fromarray(picture), Image.fromarray(mask)


def _sides(left: int, top: int, right: int, bottom: int, overlap: int, height: int, width: int) -> tuple[int, ...]:
    sides = (left, top, right, bottom)
    if min(*sides, overlap) < 0 or not any(sides):
        expected = "left, top, right, bottom and overlap of 0 or more, and not all sides 0"
        raise UserError("the picture cannot grow so", key="sides", expected=expected, found=(*sides, overlap))
    across, down = (overlap * ((sides[i] > 0) + (sides[i + 2] > 0)) for i in (0, 1))
    if across >= width or down >= height:
        expected = f"so little that some of the picture, {width} x {height}, stays"
        raise UserError("nothing of the picture would stay", key="overlap", expected=expected, found=overlap)
    return sides


# ---- random masks, of the shapes of LaMa (Suvorov et al. 2022)

FULL = 0.25  # how often the whole picture is masked
BAND = (0.04, 0.5)  # of the picture's height or width
# How many; and pixels of a picture whose shorter side is 1024, in proportion for others.
BOXES, SIDE, MARGIN = (1, 2), (100, 511), 10
STROKES, PARTS, LENGTH, BRUSH = (1, 9), (1, 5), (10, 460), (5, 260)


def _count(random: Generator, bounds: tuple[int, int]) -> int:
    """A whole number between the bounds, both included."""
    return int(random.integers(bounds[0], bounds[1] + 1))


def _length(random: Generator, bounds: tuple[int, int], scale: float) -> int:
    """As many pixels as that is, times scale, but 1 at least."""
    return max(1, round(scale * _count(random, bounds)))


def full_mask(random: Generator, height: int, width: int) -> np.ndarray:
    """Everything: -> uint8 (h w) of ones."""
    return np.ones((height, width), np.uint8)


def box_mask(random: Generator, height: int, width: int) -> np.ndarray:
    """One or two rectangles, sides 100 to 511, 10 or more from the border: -> uint8 (h w) of 0 and 1."""
    mask, scale = np.zeros((height, width), np.uint8), min(height, width) / 1024
    margin = round(scale * MARGIN)
    for _ in range(_count(random, BOXES)):
        h, w = (_length(random, SIDE, scale) for _ in range(2))
        top, left = (_count(random, (margin, side - margin - s)) for side, s in ((height, h), (width, w)))
        mask[top : top + h, left : left + w] = 1
    return mask


def stroke_mask(random: Generator, height: int, width: int) -> np.ndarray:
    """1 to 9 crooked strokes of a round brush 5 to 260 wide: -> uint8 (h w) of 0 and 1.

    Each starts anywhere and goes on in any direction for 1 to 5 straight parts of 10 to 460, no further than the border.
    """
    canvas, scale = Image.new("L", (width, height)), min(height, width) / 1024
    draw = ImageDraw.Draw(canvas)
    for _ in range(_count(random, STROKES)):
        brush, point = _length(random, BRUSH, scale), random.uniform(0, (width, height))
        _dab(draw, point, brush)
        for _ in range(_count(random, PARTS)):
            angle, length = random.uniform(0, 2 * np.pi), _length(random, LENGTH, scale)
            end = np.clip(point + length * np.array([np.cos(angle), np.sin(angle)]), 0, (width, height))
            draw.line([*map(float, point), *map(float, end)], fill=1, width=brush)
            _dab(draw, end, brush)
            point = end
    return np.array(canvas)


def _dab(draw: ImageDraw.ImageDraw, point: np.ndarray, brush: int) -> None:
    x, y = map(float, point)
    draw.ellipse([x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2], fill=1)


def band_mask(random: Generator, height: int, width: int) -> np.ndarray:
    """Outpainting: a band along each side with probability 1/2, 4 to 50 % of the picture wide -> uint8 (h w) of 0 and 1.

    Where nothing, or all of the picture, would be masked, it is drawn again.
    """
    mask = np.zeros((height, width), np.uint8)
    while mask.all() or not mask.any():
        there, wide = random.random(4) < 0.5, random.uniform(*BAND, 4)
        left, top, right, bottom = np.rint(there * wide * np.array([width, height] * 2)).astype(int)
        mask[:] = 1
        mask[top : height - bottom, left : width - right] = 0
    return mask


MASKS: dict[str, Callable[[Generator, int, int], np.ndarray]] = {
    "full": full_mask,
    "boxes": box_mask,
    "strokes": stroke_mask,
    "bands": band_mask,
}


def random_mask(random: Generator, height: int, width: int, kind: str | None = None) -> np.ndarray:
    """A mask for inpainting training: a generator's next, for a picture of that size -> uint8 (h w), 1 is painted anew.

    One mask in four is the whole picture, the others are boxes, strokes or bands alike often; or all of one `kind`.
    Raises UserError on an unknown kind and a picture below 8 pixels.
    """
    if min(height, width) < 8:
        raise UserError("the picture is too small", key="size", expected="8 pixels or more", found=(height, width))
    if kind is None:
        kind = "full" if random.random() < FULL else ("boxes", "strokes", "bands")[int(random.integers(3))]
    return lookup(MASKS, kind, "kind")(random, height, width)
