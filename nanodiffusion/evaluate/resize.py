"""Images to the 299 x 299 pixels that Inception wants, in the three ways that are in use; their distances differ.

Parmar, Zhang, Zhu 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanodiffusion.evaluate.inception import SIZE


def clean(x: Tensor, size: int = SIZE) -> Tensor:
    """Pillow's bicubic, antialiased, each channel as floats, clipped (clean-fid): uint8 (b c h w) -> (b c s s).

    Levels l become (l - 128) / 128, as in the graph of 2015.
    """
    resized = [[_bicubic(channel, size) for channel in image] for image in x.cpu().numpy().astype(np.float32)]
    return (torch.from_numpy(np.array(resized)).clamp_(0, 255) - 128) / 128


def _bicubic(channel: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC))


def tf1(x: Tensor, size: int = SIZE) -> Tensor:
    """TensorFlow 1's bilinear, without half pixels or antialiasing (Heusel et al. 2017): uint8 (b c h w) -> (b c s s).

    New pixel i lies at i * old / new of the old ones; levels l become (l - 128) / 128.
    """
    x = x.float()
    for axis in (3, 2):
        low, high, part = _places(x.shape[axis], size, x.device)
        part = part if axis == 3 else part[:, None]
        below = x.index_select(axis, low)
        x = below + (x.index_select(axis, high) - below) * part
    return (x - 128) / 128


def _places(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each new pixel (new): the old one below, the one above, and how far it lies between them in [0, 1)."""
    place = torch.arange(new, device=device, dtype=torch.float32) * torch.tensor(old / new, dtype=torch.float32)
    low = place.long()
    return low, (low + 1).clamp_max(old - 1), place - low


def half_pixel(x: Tensor, size: int = SIZE) -> Tensor:
    """torch's bilinear with half pixels, no antialiasing (pytorch-fid): uint8 (b c h w) -> (b c s s).

    Levels l become 2 l / 255 - 1.
    """
    return 2 * F.interpolate(x.float() / 255, (size, size), mode="bilinear", align_corners=False) - 1


RESIZES: dict[str, Callable[..., Tensor]] = {"clean": clean, "tf1": tf1, "torch": half_pixel}
