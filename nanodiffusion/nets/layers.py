"""What the networks share: embeddings of time and class, attention, and the checks of what goes in."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that is one number when the two agree; UserError on three numbers, or one of them."""
    both = (size, size) if isinstance(size, int) else size
    if len(both) != 2:
        raise UserError("a size is one number or two", key="in_size", expected="side, or height and width", found=both)
    return both


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of t at dim/2 geometric frequencies from 1 to 1/max_period: t (b) -> (b dim).

    Vaswani et al. 2017, section 3.5, in the order of ADM and DiT; dim = 2 is (cos t, sin t). It is computed and
    returned in float32 or better, whatever t is: a bfloat16 angle of 999 is wrong by a radian.
    """
    half = dim // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """The net's clock as features: sinusoids of t * scale through a two-layer MLP, t (b) -> (b d).

    `scale` spreads the clock over the frequencies: 1000 for the flow clock in [0, 1] and the log clock, 1 for
    the table clock in [0, 999]. Raises UserError when `features` is not an even number.
    """

    def __init__(self, dim_out: int, features: int = 256, scale: float = 1000.0) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise UserError("sinusoids come in pairs", key="time_features", expected="2, 4, 6, ...", found=features)
        self.features, self.scale = features, scale
        self.mlp = nn.Sequential(nn.Linear(features, dim_out), nn.SiLU(), nn.Linear(dim_out, dim_out))

    def forward(self, t: Tensor) -> Tensor:
        waves = timestep_embedding(t * self.scale, self.features)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """One vector per class and, in the last row, one for the null class: label (b) int64 -> (b d).

    Ho & Salimans 2022: a label that the training loop replaces by the null class trains the unconditional model.
    Raises UserError when there is no label.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label: Tensor | None) -> Tensor:
        if label is None:
            null = self.embedding_table.num_embeddings - 1
            raise UserError("the net is class-conditional", key="label", expected=f"0 to {null} ({null}: no class)")
        return self.embedding_table(label)


class Attention(nn.Module):
    """Multi-head self-attention: (b n d) -> (b n d). Vaswani et al. 2017, eq. 1; rows of qkv are (3 heads d/heads)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # 3 x (b heads n k)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


def zero_(layer: nn.Conv2d | nn.Linear) -> None:
    """Set a layer to zero, in place: the residual branch that ends in it starts as nothing (Goyal et al. 2017)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def check_positive(config: object, *names: str) -> None:
    """UserError unless every named option of a config is a positive number, or a tuple of them."""
    for name in names:
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
            raise UserError("this must be positive", key=name, expected="1 or more", found=value)


def check_multiple(key: str, number: int, divisor: int, why: str) -> None:
    """UserError, which names the config's `key` and says why, unless divisor divides number."""
    if number % divisor:
        raise UserError(why, key=key, expected=f"a multiple of {divisor}", found=number)


def check_sample(x: Tensor, t: Tensor, shape: tuple[int, ...]) -> None:
    """UserError unless x is (b, *shape) and t is (b,); reads shapes only, so it costs no synchronisation."""
    if x.shape[1:] != shape:
        raise UserError("the net was built for samples of another shape", expected=("b", *shape), found=tuple(x.shape))
    if t.shape != x.shape[:1]:
        raise UserError("t needs one value per sample", key="t", expected=(len(x),), found=tuple(t.shape))
