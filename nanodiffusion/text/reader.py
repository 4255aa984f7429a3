"""Captions as they are read in training: cut to one chunk, without weights, and none at all as sampling has it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanodiffusion.text.prompts import TextEncoder

NO_TEXT = -1  # as an id: the features of this caption are zeros


class Reader(nn.Module):
    """The text encoders of a checkpoint: b captions to ids (b k 77) of its k encoders, and those to what its U-Net is told.

    zeros: whether zeros stand for no caption, as for SDXL, or else the features of "" (`Family.zero_uncond`).
    """

    def __init__(self, text: TextEncoder, zeros: bool) -> None:
        super().__init__()
        self.text, self.zeros = text, zeros
        self.encoders = nn.ModuleList(part.net for part in text.parts)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Captions as ids (b k 77), each cut to 75 tokens; "" is NO_TEXT where zeros stand for it."""
        ids = torch.stack([part.tokenizer(list(captions), part.net.config.positions) for part in self.text.parts], 1)
        empty = torch.tensor([not caption for caption in captions]) & self.zeros
        return ids.masked_fill(empty[:, None, None], NO_TEXT)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Ids (b k 77) -> context (b 77 d) and, of SDXL, pooled (b p); zeros of a row of NO_TEXT."""
        there = ids[:, 0, 0] != NO_TEXT
        rows = ids.clamp(min=0).unbind(1)
        cond = self.text.from_embeddings([net.embed(row) for net, row in zip(self.encoders, rows)], rows)  # type: ignore[operator]
        if not self.zeros:
            return dict(cond)
        return {name: torch.where(there.view(-1, *[1] * (v.ndim - 1)), v, 0) for name, v in cond.items()}
