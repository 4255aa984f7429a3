"""The parts of Stable Diffusion's U-Net (Rombach et al. 2022), under the names its published weights have in diffusers.

Only what a checkpoint holds is a parameter here; what speeds a net up replaces `CrossAttention.attend` or `.project`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanodiffusion.errors import UserError

Run = Callable[..., Tensor]
Shape = tuple[int | None, ...]  # None: any length


def call(module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """module(*inputs)."""
    return module(*inputs)


def recompute(module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """module(*inputs), whose inner activations are computed again for the gradient instead of being kept (Chen et al. 2016)."""
    return checkpoint(module, *inputs, use_reentrant=False)  # type: ignore[return-value]


def check_shape(name: str, value: Tensor | None, shape: Shape | None) -> None:
    """UserError, which names it, unless a tensor has a shape (None: any length), or is None where no shape is given."""
    expected = None if shape is None else "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
    found = None if value is None else tuple(value.shape)
    if found is None or shape is None:
        if found is not None or shape is not None:
            what = f"the net {'takes no' if shape is None else 'needs'} {name}"
            raise UserError(what, key=name, expected=expected, found=found)
    elif len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape)):
        raise UserError(f"{name} has another shape than the net takes", key=name, expected=expected, found=found)


def add(x: Tensor, extra: Tensor | None, name: str = "features") -> Tensor:
    """x and what an extension adds to it, if anything; UserError, which names it, where its shape is another."""
    if extra is None:
        return x
    check_shape(name, extra, tuple(x.shape))
    return x + extra


def conv3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution padded by one pixel all round."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)


class TimeMLP(nn.Module):
    """Sinusoids to an embedding, rounded to the weights' dtype first: (b f) -> (b d)."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(features, dim), nn.Linear(dim, dim)

    def forward(self, waves: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """Two convolutions told the time, beside a shortcut: x (b c h w), emb (b d) already past its SiLU -> (b c' h w)."""

    def __init__(self, channels_in: int, channels_out: int, emb: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels_in, eps=1e-5), conv3(channels_in, channels_out)
        self.time_emb_proj = nn.Linear(emb, channels_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels_out, eps=1e-5), conv3(channels_out, channels_out)
        same = channels_in == channels_out
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h + self.time_emb_proj(emb)[:, :, None, None])
        return self.conv_shortcut(x) + self.conv2(F.silu(h))


class CrossAttention(nn.Module):
    """Multi-head attention of x (b n d) to a context (b m e), or to itself where there is none -> (b n d).

    Vaswani et al. 2017, eq. 1. `project` gives queries, keys and values; `attend` combines them: both may be replaced.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def split(self, features: Tensor) -> Tensor:
        """Features of all heads, apart: (b n (heads k)) -> (b heads n k)."""
        return features.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (b n d), context (b m e) -> queries (b heads n k), keys and values (b heads m k)."""
        source = x if context is None else context
        return self.split(self.to_q(x)), self.split(self.to_k(source)), self.split(self.to_v(source))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out(self.attend(*self.project(x, context)).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear map gated by the GELU of another: (b n d) -> (b n hidden). Shazeer 2020."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=2)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the features, and back: (b n d) -> (b n d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The published net has a dropout of 0 between the two, so the second is called net.2.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Tokens look at each other, then at the context, then at themselves: x (b n d), context (b m e) -> (b n d)."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), CrossAttention(dim, heads)
        self.norm2, self.attn2 = nn.LayerNorm(dim), CrossAttention(dim, heads, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


def tokens(x: Tensor) -> Tensor:
    """A map as tokens, row by row: (b c h w) -> (b (h w) c)."""
    return x.flatten(2).transpose(1, 2)


class Transformer2D(nn.Module):
    """Transformer blocks on the pixels of a map, beside a shortcut: x (b c h w), context (b m e) -> (b c h w).

    linear: the maps in and out are linear layers on tokens (SD 2.x, SDXL), not 1x1 convolutions (SD 1.x).
    """

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, run: Run = call) -> Tensor:
        h = self.norm(x)
        h = self.proj_in(tokens(h)) if self.linear else tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = run(block, h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    """Half the size, rounded up, by a convolution of stride 2: (b c h w) -> (b c h/2 w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Up to a given size (h', w'), by repeating pixels and a convolution: (b c h w) -> (b c h' w')."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
