"""What the networks share: embeddings of time and class, attention, and the checks of what goes in."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError, lookup


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that is one number when the two agree; UserError on three numbers, or one of them."""
    both = (size, size) if isinstance(size, int) else size
    if len(both) != 2:
        raise UserError("a size is one number or two", key="in_size", expected="side, or height and width", found=both)
    return both


class Patched:
    """The config of a net that cuts a sample into patches, one a token."""

    in_size: int | tuple[int, int]
    patch: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = pair(self.in_size)
        return height // self.patch, width // self.patch

    def check_patches(self) -> None:
        """UserError unless the patches divide the sample."""
        for side in pair(self.in_size):
            check_multiple("in_size", side, self.patch, "the sample is cut into patches")


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
        return self.embedding_table(check_label(label, self.embedding_table.num_embeddings - 1))


class RMSNorm(nn.RMSNorm):
    """Features over their root mean square, times a weight: (... d) -> (... d), in x's dtype. Zhang & Sennrich 2019, eq. 4."""

    def forward(self, x: Tensor) -> Tensor:
        # A weight of another dtype, as under autocast, keeps torch from its fused kernel.
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class MultiHead(nn.Module):
    """What multi-head attentions share: the product itself, `attend`, which others may replace; Vaswani et al. 2017, eq. 1.

    dropout: the share of its weights that training sets to zero.
    """

    def __init__(self, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (b heads n k), k, v (b heads m k) -> (b heads n k)."""
        if self.dropout and self.training:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return self.attend(q, k, v)


class Attention(MultiHead):
    """Multi-head self-attention: (b n d) -> (b n d); rows of qkv are (3 heads d/heads)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # 3 x (b heads n k)
        return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens as the patches they are: (b (rows columns) (c p q)) -> (b c (rows p) (columns q))."""
    rows, columns = grid
    x = x.unflatten(2, (-1, patch, patch)).unflatten(1, grid)  # (b rows columns c p q)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, rows * patch, columns * patch)


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


def check_count(config: object, *names: str) -> None:
    """UserError unless every named option of a config is 0, which stands for none, or more."""
    for name in names:
        if getattr(config, name) < 0:
            raise UserError("this counts something", key=name, expected="0 or more", found=getattr(config, name))


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


def check_choice(config: object, name: str, choices: Iterable[str]) -> None:
    """UserError, with the nearest valid one, unless the option `name` of a config is one of the choices."""
    lookup(dict.fromkeys(choices, True), getattr(config, name), name)


def check_share(config: object, *names: str) -> None:
    """UserError unless every named option of a config is in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError("this is a share", key=name, expected="0 or more, below 1", found=getattr(config, name))


def check_label(label: Tensor | None, null: int) -> Tensor:
    """label (b), or a UserError unless it is there; null: the class that stands for none."""
    if label is None:
        raise UserError("the net is class-conditional", key="label", expected=f"0 to {null} ({null}: no class)")
    return label


def check_pooled(pooled: Tensor | None, b: int, dim: int) -> Tensor:
    """pooled, or a UserError unless it is there and (b dim)."""
    if pooled is None or pooled.shape != (b, dim):
        found = "nothing" if pooled is None else tuple(pooled.shape)
        fix = "pass the text's pooled embedding; zeros stand for no text"
        raise UserError("the net reads a text embedding", key="pooled", expected=(b, dim), found=found, fix=fix)
    return pooled


def joined(x: Tensor, concat: Tensor | None, channels: int) -> Tensor:
    """x (b c h w) with the known part behind it, of so many channels -> (b c+channels h w); UserError on another shape."""
    if not channels:
        return x
    want = (len(x), channels, *x.shape[2:])
    if concat is None or concat.shape != want:
        found = "nothing" if concat is None else tuple(concat.shape)
        other = None if concat is None or concat.shape[1] == channels else concat.shape[1]
        fix = f"net.concat_channels={other}" if other else None
        raise UserError("the net also reads a known part", key="concat", expected=want, found=found, fix=fix)
    return torch.cat([x, concat.to(x.dtype)], dim=1)
