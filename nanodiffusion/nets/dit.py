"""The diffusion transformer with adaLN-zero (Peebles & Xie 2023), under its authors' parameter names.

`MODERN` are the options that later work added: RMS norms, normed queries and keys, rotary positions and SwiGLU.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.layers import (
    Attention,
    LabelEmbedding,
    Patched,
    RMSNorm,
    TimeEmbedding,
    check_choice,
    check_count,
    check_multiple,
    check_pooled,
    check_positive,
    check_sample,
    joined,
    pair,
    zero_,
)

MODERN: dict[str, Any] = {"norm": "rms", "qk_norm": True, "positions": "rotary", "ffn": "swiglu"}
NORMS = {
    "layer": partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6),
    "rms": partial(RMSNorm, elementwise_affine=False, eps=1e-6),
}
ROTARY_BASE = 100.0  # the slowest angle turns by about 1/100 a token: grids are tens of tokens wide (Heo et al. 2024)


@dataclass(frozen=True)
class DiTConfig(Patched):
    """The size of a sample, how it is cut into tokens, and the size of the transformer; the default is DiT-S/2."""

    in_size: int | tuple[int, int] = 32  # side, or (height, width), of a sample
    channels_in: int = 4
    patch: int = 2
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 0  # 0: unconditional
    time_features: int = 256
    time_scale: float = 1000.0
    pooled_dim: int = 0  # features of a pooled text embedding; 0: reads none
    concat_channels: int = 0  # of a known part, which is read beside x
    norm: str = "layer"  # or "rms" (Zhang & Sennrich 2019)
    qk_norm: bool = False  # RMS norms of every head's queries and keys (Dehghani et al. 2023)
    positions: str = "sincos"  # added to the tokens; or "rotary": queries and keys turn
    ffn: str = "gelu"  # or "swiglu" (Shazeer 2020), of as many parameters

    def __post_init__(self) -> None:
        check_positive(self, "in_size", "channels_in", "patch", "dim", "depth", "heads")
        check_count(self, "num_classes", "pooled_dim", "concat_channels")
        self.check_patches()
        check_multiple("dim", self.dim, self.heads, "the heads share the features")
        check_multiple("dim", self.dim, 4, "the place is told by a sine and a cosine of row and column")
        for name, choices in (("norm", NORMS), ("positions", ("sincos", "rotary")), ("ffn", FEEDFORWARDS)):
            check_choice(self, name, choices)
        if not 1 <= self.dim * self.mlp_ratio < float("inf"):
            raise UserError("no hidden features are left", key="mlp_ratio", expected="e.g. 4.0", found=self.mlp_ratio)
        if self.positions == "rotary":
            check_multiple("dim", self.dim, 4 * self.heads, "rows and columns turn pairs of each head's features")


def position_embedding(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sinusoids: the first half of the features tells the column, the second the row -> (1 (h w) dim).

    Each half is [sin, cos] at dim/4 frequencies from 1 to 1/10000. Peebles & Xie 2023, as in MAE.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()[None]


def rotations(grid: tuple[int, int], features: int) -> Tensor:
    """Cosines and sines by which a head's pairs of features turn at each token -> (2 (h w) features/2).

    The first half of the pairs turns with the column, the second with the row, each at features/4 speeds from 1 radian a
    token to nearly 1/100. Su et al. 2021, eq. 34; axial as in Heo et al. 2024, eq. 5.
    """
    speed = ROTARY_BASE ** -(torch.arange(features // 4, dtype=torch.float64) / (features // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angle = torch.cat([place.reshape(-1, 1) * speed for place in (column, row)], dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def turn(x: Tensor, by: Tensor) -> Tensor:
    """Features 2i and 2i + 1 as a point of the plane, turned: x (b heads n k), by (2 n k/2) -> (b heads n k), in float32."""
    cos, sin = by
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(3, (-1, 2)).unbind(4)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=4).flatten(3)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (b n d) scaled about 1 and shifted by vectors (b d), the same for every token."""
    return x * (1 + scale[:, None]) + shift[:, None]


def xavier_(layer: nn.Conv2d | nn.Linear) -> None:
    """Xavier's uniform weights, a patch counting as one vector, and no bias, in place: the authors' choice."""
    nn.init.xavier_uniform_(layer.weight.flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def normal_(embedder: nn.Module) -> None:
    """Weights of standard deviation 0.02 and no biases, in place: the authors' choice for both embedders."""
    for p in embedder.parameters():
        nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.0)


class PatchEmbed(nn.Module):
    """Patches of p x p pixels as tokens, row by row: (b c h w) -> (b n d)."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two layers about a GELU (its tanh form): (b n d) -> (b n d)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Two layers about a gated product, (W x) * silu(V x): (b n d) -> (b n d). Shazeer 2020, eq. 6.

    Of hidden features there are two thirds of what is asked for, so that the parameters are as many as Mlp's.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = max(8, 8 * round(hidden / 12))
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=2)
        return self.fc2(F.silu(gate) * value)


FEEDFORWARDS = {"gelu": Mlp, "swiglu": SwiGLU}


class TurnedAttention(Attention):
    """Self-attention whose queries and keys may be normed and turned: x (b n d), by of `rotations` or None -> (b n d)."""

    def __init__(self, dim: int, heads: int, norm: bool) -> None:
        super().__init__(dim, heads)
        make = partial(RMSNorm, dim // heads, eps=1e-6) if norm else nn.Identity
        self.q_norm, self.k_norm = make(), make()

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # 3 x (b heads n k)
        q, k = self.q_norm(q), self.k_norm(k)
        if by is not None:
            q, k = turn(q, by), turn(k, by)
        return self.proj(self.mix(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2))


def adaln(dim: int, vectors: int) -> nn.Sequential:
    """What turns the embedding into modulation: (b d) -> (b vectors*d), at first zero."""
    last = nn.Linear(dim, vectors * dim)
    zero_(last)
    return nn.Sequential(nn.SiLU(), last)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after: at first x itself.

    x (b n d), emb (b d), by of `rotations` or None -> (b n d).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = NORMS[config.norm](dim), NORMS[config.norm](dim)
        self.attn = TurnedAttention(dim, config.heads, config.qk_norm)
        self.mlp = FEEDFORWARDS[config.ffn](dim, int(dim * config.mlp_ratio))
        self.adaLN_modulation = adaln(dim, 6)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            xavier_(layer)

    def forward(self, x: Tensor, emb: Tensor, by: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(emb).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), by)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches: x (b n d), emb (b d) -> (b n (p p c)); at first zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = NORMS[config.norm](config.dim)
        self.linear = nn.Linear(config.dim, config.patch**2 * config.channels_in)
        self.adaLN_modulation = adaln(config.dim, 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(emb).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """F of an image or latent, its time, class and text: x (b c h w), t (b), label (b) int64, pooled (b d) -> (b c h w).

    concat (b c' h w) is a known part, for a net with concat_channels. It starts as F = 0 with every block the identity;
    pos_embed is a buffer, saved as the authors do. A net ignores conditions that it does not take. Raises UserError on
    inputs of another shape, and on a missing label or text.
    """

    pos_embed: Tensor | None
    rotations: Tensor | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.sample_shape = (c.channels_in, *pair(c.in_size))
        self.null_label = c.num_classes or None
        wanted = {"label": c.num_classes, "pooled": c.pooled_dim, "concat": c.concat_channels}
        self.takes = tuple(name for name, size in wanted.items() if size)
        self.x_embedder = PatchEmbed(c.channels_in + c.concat_channels, c.dim, c.patch)
        self.t_embedder = TimeEmbedding(c.dim, c.time_features, c.time_scale)
        self.y_embedder = LabelEmbedding(c.num_classes, c.dim) if c.num_classes else None
        self.pooled_embedder = nn.Linear(c.pooled_dim, c.dim) if c.pooled_dim else None
        self._add_positions()
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)
        self._start()

    def _add_positions(self) -> None:
        """Either table; the rotary one is the same for every net of its size and not saved."""
        c, rotary = self.config, self.config.positions == "rotary"
        self.register_buffer("pos_embed", None if rotary else position_embedding(c.grid, c.dim))
        self.register_buffer("rotations", rotations(c.grid, c.dim // c.heads) if rotary else None, persistent=False)

    def _start(self) -> None:
        """The authors' starting values; the blocks have theirs."""
        xavier_(self.x_embedder.proj)
        zero_(self.final_layer.linear)
        for embedder in (self.t_embedder, self.y_embedder, self.pooled_embedder):
            if embedder is not None:
                normal_(embedder)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        pooled: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        check_sample(x, t, self.sample_shape)
        emb = self._embed(t, label, pooled)
        tokens = self.x_embedder(joined(x, concat, self.config.concat_channels))
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, emb, self.rotations)
        return self._unpatchify(self.final_layer(tokens, emb))

    def _embed(self, t: Tensor, label: Tensor | None, pooled: Tensor | None) -> Tensor:
        """The sum of what is known of the samples: (b d)."""
        emb = self.t_embedder(t)
        if self.y_embedder is not None:
            emb = emb + self.y_embedder(label)
        if self.pooled_embedder is not None:
            text = check_pooled(pooled, len(t), self.config.pooled_dim)
            emb = emb + self.pooled_embedder(text.to(self.pooled_embedder.weight.dtype))
        return emb

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(b (rows columns) (p q c)) -> (b c (rows p) (columns q))."""
        (rows, columns), p = self.config.grid, self.config.patch
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))  # (b rows columns p q c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * p, columns * p)
