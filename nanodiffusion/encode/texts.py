"""Captions to arrays: one vector each for a transformer of ours, or all that the U-Net of a whole checkpoint is told."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanodiffusion.tensors import content_hash
from nanodiffusion.text.pooled import open_text
from nanodiffusion.text.reader import Reader


class Texts(Protocol):
    """What reads captions: where it is from, the hash of its weights, what it makes of a caption and of none.

    shapes: of a caption's arrays, by name; written: their dtype. empty: those of no caption, {} where they are zeros for every
    net. sizes: whether who is told of captions is told sizes of pictures as well. natural: the side in pixels of pictures of
    the checkpoint that they are encoded for, 0 where it is for none.
    """

    where: str
    sha256: str
    shapes: dict[str, tuple[int, ...]]
    written: str
    empty: dict[str, Tensor]
    sizes: bool
    natural: int

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """b captions -> arrays (b ...) on the CPU, by name, as they are written."""
        ...


def open_texts(where: str, device: str, dtype: str | torch.dtype, written: str) -> Texts:
    """A whole checkpoint's text encoders as its U-Net is told by them, else those that `text.pooled.open_text` takes.

    dtype: of the weights. written: that of what a U-Net is told, float16 or float32; other vectors are float16. UserError:
    neither of them.
    """
    from nanodiffusion.pretrained.load import is_checkpoint  # slow to import

    pooled = where.partition(":")[0] == "words" or not is_checkpoint(where)
    return Pooled(where, device, dtype) if pooled else Told(where, device, dtype, written)


class Pooled:
    """One vector of a caption, zeros where there is none: {"pooled": (b d)}."""

    sizes, natural, written = False, 0, "float16"

    def __init__(self, where: str, device: str, dtype: str | torch.dtype) -> None:
        self.text = open_text(where, device, dtype)
        self.where, self.sha256 = where, self.text.sha256
        self.shapes, self.empty = {"pooled": (self.text.dim,)}, {}

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """b captions -> pooled (b d) float16."""
        return {"pooled": self.text.encode(captions).half()}


class Told:
    """What a checkpoint's U-Net is told of a caption: {"context": (b 77 d)} and, of SDXL, pooled (b p); see `Reader`."""

    def __init__(self, where: str, device: str, dtype: str | torch.dtype, written: str) -> None:
        from nanodiffusion.pretrained.load import load_texts  # slow to import

        text, family = load_texts(where, dtype, device)
        self.reader, self.device, self.written = Reader(text, family.zero_uncond).eval(), device, written
        self.where, self.sizes, self.natural = where, family.sizes, family.size
        self.sha256 = content_hash(self.reader.state_dict())
        self.empty = {name: value[0] for name, value in self.encode([""]).items()}
        self.shapes = {name: tuple(value.shape) for name, value in self.empty.items()}

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """b captions, each cut to 75 tokens -> what is told of them."""
        told = self.reader(self.reader.tokens(captions).to(self.device))
        return {name: value.to(getattr(torch, self.written)).cpu() for name, value in told.items()}
