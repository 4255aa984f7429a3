"""A pixel U-Net: DDPM's (Ho et al. 2020, appendix B), with ADM's modulation as an option (Dhariwal & Nichol 2021)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.layers import (
    Attention,
    LabelEmbedding,
    TimeEmbedding,
    check_count,
    check_multiple,
    check_positive,
    check_sample,
    check_share,
    pair,
    zero_,
)


@dataclass(frozen=True)
class UNetConfig:
    """One level per multiplier, each half the size of the one above it and `channels * multiplier` wide."""

    in_size: int | tuple[int, int] = 28  # side, or (height, width), of a sample
    channels_in: int = 1
    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2  # per level on the way down; one more on the way up
    attention: tuple[int, ...] = (14,)  # at levels whose longer side is one of these; the middle always has it
    heads: int = 1
    dropout: float = 0.1
    num_classes: int = 0  # 0: unconditional
    time_features: int = 256
    time_scale: float = 1000.0
    scale_shift: bool = False  # the embedding scales and shifts (ADM) instead of being added (DDPM)

    def __post_init__(self) -> None:
        check_positive(self, "in_size", "channels_in", "channels", "multipliers", "blocks", "heads")
        check_count(self, "num_classes")
        check_share(self, "dropout")
        if not self.multipliers:
            raise UserError("a U-Net needs a level", key="multipliers", expected="e.g. (1, 2, 2)", found=())
        for level, width in enumerate(self.widths):
            check_multiple("channels", width, self.heads, f"the heads share the channels of level {level}")
        for side in pair(self.in_size):
            check_multiple("in_size", side, self.factor, "the size is halved between levels")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def factor(self) -> int:
        """How many times smaller the lowest level is."""
        return 2 ** (len(self.multipliers) - 1)

    def attends(self, level: int) -> bool:
        """Whether a level has attention."""
        return max(pair(self.in_size)) // 2**level in self.attention


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or the largest power of two below that divides the channels; eps 1e-6."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResBlock(nn.Module):
    """Two convolutions told the time and class, beside a shortcut: x (b c h w), emb (b e) -> (b c' h w).

    The second convolution starts at zero, so the block starts as its shortcut.
    """

    def __init__(self, channels_in: int, channels_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.norm1, self.conv1 = group_norm(channels_in), conv3(channels_in, channels_out)
        self.emb = nn.Linear(4 * config.channels, channels_out * (2 if config.scale_shift else 1))
        self.norm2, self.conv2 = group_norm(channels_out), conv3(channels_out, channels_out)
        self.dropout = nn.Dropout(config.dropout)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)
        zero_(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift  # AdaGN, Dhariwal & Nichol 2021, eq. 3
        else:
            h = self.norm2(h + emb)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class PixelAttention(nn.Module):
    """Every pixel of a map looks at every other, beside a shortcut: (b c h w) -> (b c h w)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attn = group_norm(channels), Attention(channels, heads)
        zero_(self.attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (b (h w) c)
        return x + self.attn(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Half the size, by a convolution padded on the right and below only: (b c h w) -> (b c h/2 w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # emb: called as a Block is
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size, by repeating pixels and a convolution: (b c h w) -> (b c 2h 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """A residual block, then perhaps attention, then perhaps twice the size: x (b c h w), emb (b e) -> (b c' h' w')."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: UNetConfig,
        attention: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.res = ResBlock(channels_in, channels_out, config)
        self.attn = PixelAttention(channels_out, config.heads) if attention else nn.Identity()
        self.up = Upsample(channels_out) if upsample else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.up(self.attn(self.res(x, emb)))


class UNet(nn.Module):
    """F of an image, its time and its class: x (b c h w), t (b), label (b) int64 -> (b c h w).

    Any height and width that `config.factor` divides will do, also other than in_size. Every output of the way
    down (conv_in, each block, each halving) is read once on the way up. It starts as F = 0. An unconditional net
    ignores labels. Raises UserError on inputs of another shape, and on a missing label.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.sample_shape = (c.channels_in, *pair(c.in_size))
        self.null_label = c.num_classes or None
        self.takes = ("label",) if c.num_classes else ()
        self.t_embedder = TimeEmbedding(4 * c.channels, c.time_features, c.time_scale)
        self.y_embedder = LabelEmbedding(c.num_classes, 4 * c.channels) if c.num_classes else None
        self.conv_in = conv3(c.channels_in, c.channels)
        skips = self._add_down()
        bottom = c.widths[-1]
        self.mid = nn.ModuleList([Block(bottom, bottom, c, attention=True), Block(bottom, bottom, c)])
        self._add_up(skips)
        self.norm_out, self.conv_out = group_norm(c.widths[0]), conv3(c.widths[0], c.channels_in)
        zero_(self.conv_out)

    def _add_down(self) -> list[int]:
        """Build the way down; return the channels of each of its outputs."""
        c, self.down, skips = self.config, nn.ModuleList(), [self.config.channels]
        for level, width in enumerate(c.widths):
            if level:
                self.down.append(Downsample(skips[-1]))
                skips.append(skips[-1])
            for _ in range(c.blocks):
                self.down.append(Block(skips[-1], width, c, c.attends(level)))
                skips.append(width)
        return skips

    def _add_up(self, skips: list[int]) -> None:
        """Build the way up, whose blocks read the outputs of the way down, last first."""
        c, self.up, below = self.config, nn.ModuleList(), skips[-1]
        for level, width in reversed(list(enumerate(c.widths))):
            for i in range(c.blocks + 1):
                upsample = level > 0 and i == c.blocks
                self.up.append(Block(below + skips.pop(), width, c, c.attends(level), upsample))
                below = width

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self._check(x, t)
        emb = self.t_embedder(t)
        if self.y_embedder is not None:
            emb = emb + self.y_embedder(label)
        emb = F.silu(emb)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down:
            x = block(x, emb)
            skips.append(x)
        for block in self.mid:
            x = block(x, emb)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _check(self, x: Tensor, t: Tensor) -> None:
        c, f = self.config.channels_in, self.config.factor
        if x.ndim != 4 or x.shape[1] != c or x.shape[2] % f or x.shape[3] % f:
            expected = f"(b, {c}, h, w), where {f} divides h and w"
            raise UserError("the U-Net cannot take this input", key="x", expected=expected, found=tuple(x.shape))
        check_sample(x, t, tuple(x.shape[1:]))
