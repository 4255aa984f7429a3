"""The two halves of an image autoencoder: the KL autoencoder of latent diffusion (Rombach et al. 2022) and TAESD's tiny one.

They know no scale, tile or precision: that is `codec.py`. Attribute names are the published key names.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanodiffusion.nets.unet import Upsample, conv3


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the eps of every published autoencoder."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut: (b c h w) -> (b c' h w)."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels_in, groups), conv3(channels_in, channels_out)
        self.norm2, self.conv2 = group_norm(channels_out, groups), conv3(channels_out, channels_out)
        same = channels_in == channels_out
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """Every pixel of a map looks at every other, with one head, beside a shortcut: (b c h w) -> (b c h w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (b (h w) c)
        q, k, v = (to(tokens)[:, None] for to in (self.to_q, self.to_k, self.to_v))  # (b 1 n c)
        out = self.to_out(self.attend(q, k, v)[:, 0])
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class Middle(nn.Module):
    """Two residual blocks, attention between them or not, at the lowest resolution: (b c h w) -> (b c h w)."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Half the size, by a convolution padded on the right and below only: (b c h w) -> (b c h/2 w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def levels(
    widths: Sequence[int], blocks: int, groups: int, name: str, resize: Callable[[int], nn.Module]
) -> nn.ModuleList:
    """Levels of residual blocks, widths[i - 1] -> widths[i]; each but the last ends in a change of size called `name`."""
    made = nn.ModuleList()
    for before, width in zip((widths[0], *widths), widths):
        resnets = nn.Sequential(
            ResBlock(before, width, groups), *(ResBlock(width, width, groups) for _ in range(blocks - 1))
        )
        made.append(nn.Sequential(OrderedDict(resnets=resnets)))
    for block, width in zip(made[:-1], widths):
        block.add_module(name, nn.Sequential(resize(width)))
    return made


def through(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> Tensor:
    """One block after the other; with checkpointing, only x between them is kept for the gradient."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return x


class Encoder(nn.Module):
    """An image, each level but the last halving it, as features: (b c h w) -> (b c' h/f w/f), f = 2^(levels - 1)."""

    def __init__(
        self, channels_in: int, channels_out: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.checkpointing = False
        self.conv_in = conv3(channels_in, widths[0])
        self.down_blocks = levels(widths, blocks, groups, "downsamplers", Downsample)
        self.mid_block = Middle(widths[-1], groups, attention)
        self.conv_norm_out, self.conv_out = group_norm(widths[-1], groups), conv3(widths[-1], channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = through([*self.down_blocks, self.mid_block], self.conv_in(x), self.checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """The way back, with one residual block more on each level: (b c h w) -> (b c' fh fw), f = 2^(levels - 1)."""

    def __init__(
        self, channels_in: int, channels_out: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.checkpointing = False
        self.conv_in = conv3(channels_in, widths[-1])
        self.mid_block = Middle(widths[-1], groups, attention)
        self.up_blocks = levels(widths[::-1], blocks + 1, groups, "upsamplers", Upsample)
        self.conv_norm_out, self.conv_out = group_norm(widths[0], groups), conv3(widths[0], channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = through([self.mid_block, *self.up_blocks], self.conv_in(x), self.checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class TinyBlock(nn.Module):
    """Three convolutions beside a shortcut, and no norm: (b c h w) -> (b c h w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv3(width, width), nn.ReLU(), conv3(width, width), nn.ReLU(), conv3(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class TinyEncoder(nn.Module):
    """TAESD's encoder; each entry of `blocks` but the first halves the image: (b c h w) in [-1, 1] -> (b c' h/f w/f)."""

    def __init__(self, channels_in: int, channels_out: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv3(channels_in, width)]
        for i, n in enumerate(blocks):
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)] if i else []
            layers += [TinyBlock(width) for _ in range(n)]
        self.layers = nn.Sequential(*layers, conv3(width, channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x + 1) / 2)  # it was trained on [0, 1]


class TinyDecoder(nn.Module):
    """TAESD's decoder; each entry of `blocks` but the last doubles the image: (b c h w) -> (b c' fh fw) about [-1, 1]."""

    def __init__(self, channels_in: int, channels_out: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv3(channels_in, width), nn.ReLU()]
        for n in blocks[:-1]:
            layers += [TinyBlock(width) for _ in range(n)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        last = [TinyBlock(width) for _ in range(blocks[-1])]
        self.layers = nn.Sequential(*layers, *last, conv3(width, channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.tanh(x / 3) * 3) * 2 - 1  # a soft clamp to [-3, 3]; it was trained on [0, 1]
