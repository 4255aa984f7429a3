"""Inpainting through cross-attention: what is known of the picture as further context tokens. It produces conditioning."""

import torch
from torch import Tensor, nn

from nanodiffusion.errors import UserError


class InpaintTokens(nn.Module):
    """One context token for every pixel of a masked latent: x0_masked (b c h w), mask (b 1 h w) -> (b h*w d).

    mask: 1 where the picture is to be made, 0 where it is known; between, what is nearer. The tokens go after those of
    the text, in cond["context"]. context_dim: d, the U-Net's; channels: c. Raises UserError on other shapes.
    """

    def __init__(self, context_dim: int = 2048, channels: int = 4) -> None:
        super().__init__()
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
        return self.conditioning_image_proj(pixels) + known
