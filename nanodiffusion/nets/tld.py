"""The text-conditional latent transformer of apapiu's transformer_latent_diffusion, under its parameter names.

It reads the flow clock, t in [0, 1] of x = (1 - t) x0 + t eps, and predicts x0: Denoiser's prediction "x0_linear".
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.layers import (
    MultiHead,
    Patched,
    check_choice,
    check_count,
    check_multiple,
    check_pooled,
    check_positive,
    check_sample,
    check_share,
    joined,
    pair,
    unpatchify,
    zero_,
)

LEGACY: dict[str, Any] = {"post_norm": True, "cross_heads": 4, "head_order": "dh"}  # of the published weights, 2024


@dataclass(frozen=True)
class TLDConfig(Patched):
    """The size of a sample and of the transformer; the default is the published one, of 101,164,352 parameters."""

    in_size: int | tuple[int, int] = 32  # side, or (height, width), of a sample
    channels_in: int = 4
    patch: int = 2
    dim: int = 768
    depth: int = 12
    noise_features: int = 256
    text_dim: int = 768  # of the pooled text embedding: CLIP ViT-L/14's
    dropout: float = 0.0
    ffn_ratio: int = 4
    head_dim: int = 64
    cross_heads: int = 0  # of cross-attention; 0: as many as of self-attention
    head_order: str = "hd"  # features of a head lie side by side; "dh": features of one index do
    post_norm: bool = False  # each norm follows the sum instead of preceding the branch
    concat_channels: int = 0  # of a known part, for outpainting

    def __post_init__(self) -> None:
        sizes = ("patch", "dim", "depth", "noise_features", "text_dim", "ffn_ratio", "head_dim")
        check_positive(self, "in_size", "channels_in", *sizes)
        check_count(self, "cross_heads", "concat_channels")
        check_choice(self, "head_order", ("hd", "dh"))
        check_share(self, "dropout")
        self.check_patches()
        check_multiple("dim", self.dim, self.head_dim, "the heads share the features")
        check_multiple("dim", self.dim, self.cross_heads or 1, "the heads of cross-attention share the features")
        if self.noise_features < 4 or self.noise_features % 2:
            expected = "4, 6, 8, ..."
            raise UserError(
                "sinusoids come in pairs", key="noise_features", expected=expected, found=self.noise_features
            )

    @property
    def heads(self) -> int:
        """Heads of self-attention."""
        return self.dim // self.head_dim


def speeds(features: int, device: torch.device | None = None) -> Tensor:
    """Radians per unit of t: 2 pi times features/2 frequencies from 1 to 1000, evenly spaced in their logarithm."""
    return 2 * math.pi * torch.exp(torch.linspace(0.0, math.log(1000.0), features // 2, device=device))


class Waves(nn.Module):
    """Sines, then cosines, of the noise level: t (b) -> (b features). Always in float32 or better: an angle of 6283 needs it.

    angular_speeds is there for files, which hold it; as it might have been rounded with the net, it is not read.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("angular_speeds", speeds(features))

    def forward(self, t: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        angle = t.to(wide)[:, None] * speeds(self.features, t.device).to(wide)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Heads(MultiHead):
    """Attention of given q (b n d), k, v (b m d) -> (b n d), the features cut into heads in one of two orders.

    "dh" is what weights of 2023 and 2024 were trained with: head i has the features i, i + heads, i + 2 heads, ...
    """

    def __init__(self, heads: int, order: str, dropout: float = 0.0) -> None:
        super().__init__(heads, dropout)
        self.order = order

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.mix(*(self._cut(x) for x in (q, k, v)))  # (b heads n k)
        return out.permute((0, 2, 1, 3) if self.order == "hd" else (0, 2, 3, 1)).flatten(2)

    def _cut(self, x: Tensor) -> Tensor:
        if self.order == "hd":
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return x.unflatten(2, (-1, self.heads)).permute(0, 3, 1, 2).contiguous()


class SelfAttention(nn.Module):
    """Tokens look at one another, without biases and with no projection behind: (b n d) -> (b n d)."""

    def __init__(self, config: TLDConfig) -> None:
        super().__init__()
        self.qkv_linear = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.mha = Heads(config.heads, config.head_order, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(*self.qkv_linear(x).chunk(3, dim=2))


class CrossAttention(nn.Module):
    """Tokens look at the condition: x (b n d), y (b m d) -> (b n d)."""

    def __init__(self, config: TLDConfig) -> None:
        super().__init__()
        self.kv_linear = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.q_linear = nn.Linear(config.dim, config.dim, bias=False)
        self.mha = Heads(config.cross_heads or config.heads, config.head_order)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mha(self.q_linear(x), *self.kv_linear(y).chunk(2, dim=2))


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, on tokens, where it is a linear layer, and sooner done: (b n d) -> (b n d')."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class SepConvMLP(nn.Module):
    """A feedforward whose hidden features meet those of the eight neighbours: (b n d) -> (b n d). Li et al. 2021, LocalViT."""

    def __init__(self, config: TLDConfig) -> None:
        super().__init__()
        dim, hidden, self.grid = config.dim, config.ffn_ratio * config.dim, config.grid
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        wide, narrow = Pointwise(dim, hidden), Pointwise(hidden, dim)
        self.mlp = nn.Sequential(wide, depthwise, nn.GELU(), narrow, nn.Dropout(config.dropout))

    def forward(self, x: Tensor) -> Tensor:
        wide, depthwise, act, narrow, drop = self.mlp
        maps = wide(x).transpose(1, 2).unflatten(2, self.grid)  # (b d h w), channels-last in memory
        return drop(narrow(act(depthwise(maps)).flatten(2).transpose(1, 2)))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and feedforward beside shortcuts: x (b n d), y (b m d) -> (b n d)."""

    def __init__(self, config: TLDConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.self_attention, self.cross_attention = SelfAttention(config), CrossAttention(config)
        self.mlp = SepConvMLP(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.dim) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.self_attention(x))
            x = self.norm2(x + self.cross_attention(x, y))
            return self.norm3(x + self.mlp(x))
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), y)
        return x + self.mlp(self.norm3(x))


class Tokens(nn.Module):
    """(b n d) of a map: (b d h w)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Trunk(nn.Module):
    """Patches to tokens, the blocks, and tokens to patches: x (b c h w), cond (b m d) -> (b c h w); at first zero."""

    def __init__(self, config: TLDConfig) -> None:
        super().__init__()
        c, self.grid, self.patch = config, config.grid, config.patch
        pixels, tokens = c.channels_in * c.patch**2, math.prod(c.grid)
        cut = nn.Conv2d(c.channels_in + c.concat_channels, pixels, c.patch, stride=c.patch)
        norm, last = nn.LayerNorm(pixels), nn.LayerNorm(c.dim)
        self.patchify_and_embed = nn.Sequential(cut, Tokens(), norm, nn.Linear(pixels, c.dim), last)
        self.pos_embed = nn.Embedding(tokens, c.dim)
        self.register_buffer("precomputed_pos_enc", torch.arange(tokens))  # 0, 1, ..., which files hold
        self.decoder_blocks = nn.ModuleList(DecoderBlock(c) for _ in range(c.depth))
        self.out_proj = nn.Sequential(nn.Linear(c.dim, pixels))
        zero_(self.out_proj[0])  # type: ignore[arg-type]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        tokens = self.patchify_and_embed(x) + self.pos_embed.weight
        for block in self.decoder_blocks:
            tokens = block(tokens, cond)
        return unpatchify(self.out_proj(tokens), self.grid, self.patch)


class TLD(nn.Module):
    """x0 of a latent, its noise level and its text: x (b c h w), t (b) in [0, 1], pooled (b d) -> (b c h w).

    concat (b c' h w) is a known part, for a net with concat_channels. Zeros stand for no text. UserError on inputs of another
    shape, smaller and larger ones too: nets.transfer.resized makes a net of another size.
    """

    def __init__(self, config: TLDConfig) -> None:
        super().__init__()
        c = self.config = config
        self.sample_shape = (c.channels_in, *pair(c.in_size))
        self.null_label, self.takes = None, ("pooled",) + ("concat",) * bool(c.concat_channels)
        layers = nn.Linear(c.noise_features, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim)
        self.fourier_feats = nn.Sequential(Waves(c.noise_features), *layers)
        self.denoiser_trans_block = Trunk(c)
        self.norm, self.label_proj = nn.LayerNorm(c.dim), nn.Linear(c.text_dim, c.dim)

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        check_sample(x, t, self.sample_shape)
        text = self.label_proj(check_pooled(pooled, len(x), self.config.text_dim).to(self.label_proj.weight.dtype))
        waves, *layers = self.fourier_feats
        noise = waves(t).to(text.dtype)
        for layer in layers:
            noise = layer(noise)
        cond = self.norm(torch.stack([noise, text.to(noise.dtype)], dim=1))  # (b 2 d)
        return self.denoiser_trans_block(joined(x, concat, self.config.concat_channels), cond)
