"""Inpainting through cross-attention: what is known of the picture as further context tokens. It produces conditioning."""

import torch
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.dit import position_embedding
from nanodiffusion.nets.layers import check_multiple


class InpaintTokens(nn.Module):
    """One context token for every pixel of a masked latent: x0_masked (b c h w), mask (b 1 h w) -> (b h*w d).

    mask: 1 where the picture is to be made, 0 where it is known; between, what is nearer. The tokens go after those of
    the text, in cond["context"]. context_dim: d, the U-Net's; channels: c. positions: fixed sinusoids of column and row are
    added to each, see `dit.position_embedding`. Raises UserError on other shapes.
    """

    def __init__(self, context_dim: int = 2048, channels: int = 4, positions: bool = False) -> None:
        super().__init__()
        if positions:
            check_multiple("context_dim", context_dim, 4, "the place is told by a sine and a cosine of row and column")
        self.positions = positions
        self.conditioning_image_proj = nn.Linear(channels, context_dim)
        self.conditioning_image_mask_embeddings = nn.Embedding(2, context_dim)

    def forward(self, x0_masked: Tensor, mask: Tensor) -> Tensor:
        b, _, h, w = x0_masked.shape
        channels = self.conditioning_image_proj.in_features
        if x0_masked.shape[1] != channels or mask.shape != (b, 1, h, w):
            found = f"{tuple(x0_masked.shape)} and {tuple(mask.shape)}"
            expected = f"(b {channels} h w) and (b 1 h w)"
            raise UserError("the masked latent and its mask do not fit", key="mask", expected=expected, found=found)
        pixels = x0_masked.to(self.conditioning_image_proj.weight.dtype).flatten(2).transpose(1, 2)
        known = self.conditioning_image_mask_embeddings((mask.flatten(1) >= 0.5).to(torch.int64))
        tokens = self.conditioning_image_proj(pixels) + known
        return tokens + _places(h, w, tokens) if self.positions else tokens


def _places(h: int, w: int, like: Tensor) -> Tensor:
    """`position_embedding` (h*w d), of a column and a row of it: so little is computed on the CPU and copied."""
    d = like.shape[2]
    columns, rows = (position_embedding(grid, d)[0].to(like) for grid in ((1, w), (h, 1)))
    halves = columns[:, : d // 2].expand(h, w, -1), rows[:, None, d // 2 :].expand(h, w, -1)
    return torch.cat(halves, 2).flatten(0, 1)
