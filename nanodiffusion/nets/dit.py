"""The diffusion transformer with adaLN-zero (Peebles & Xie 2023), under its authors' parameter names."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.nets.layers import (
    Attention,
    LabelEmbedding,
    TimeEmbedding,
    check_multiple,
    check_positive,
    check_sample,
    pair,
    zero_,
)


@dataclass(frozen=True)
class DiTConfig:
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

    def __post_init__(self) -> None:
        check_positive(self, "in_size", "channels_in", "patch", "dim", "depth", "heads")
        for side in pair(self.in_size):
            check_multiple("in_size", side, self.patch, "the sample is cut into patches")
        check_multiple("dim", self.dim, self.heads, "the heads share the features")
        check_multiple("dim", self.dim, 4, "the place is told by a sine and a cosine of row and column")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = pair(self.in_size)
        return height // self.patch, width // self.patch


def position_embedding(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sinusoids: the first half of the features tells the column, the second the row -> (1 (h w) dim).

    Each half is [sin, cos] at dim/4 frequencies from 1 to 1/10000. Peebles & Xie 2023, as in MAE.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()[None]


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


def adaln(dim: int, vectors: int) -> nn.Sequential:
    """What turns the embedding into modulation: (b d) -> (b vectors*d), at first zero."""
    last = nn.Linear(dim, vectors * dim)
    zero_(last)
    return nn.Sequential(nn.SiLU(), last)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after: x (b n d), emb (b d) -> (b n d); at first x itself."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, config.heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.adaLN_modulation = adaln(dim, 6)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            xavier_(layer)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(emb).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches: x (b n d), emb (b d) -> (b n (p p c)); at first zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.dim, config.patch**2 * config.channels_in)
        self.adaLN_modulation = adaln(config.dim, 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(emb).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """F of an image or latent, its time and its class: x (b c h w), t (b), label (b) int64 -> (b c h w).

    It starts as F = 0 with every block the identity; pos_embed is a buffer, saved as the authors do. An
    unconditional net ignores labels. Raises UserError on inputs of another shape, and on a missing label.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.sample_shape = (c.channels_in, *pair(c.in_size))
        self.null_label = c.num_classes or None
        self.takes = ("label",) if c.num_classes else ()
        self.x_embedder = PatchEmbed(c.channels_in, c.dim, c.patch)
        self.t_embedder = TimeEmbedding(c.dim, c.time_features, c.time_scale)
        self.y_embedder = LabelEmbedding(c.num_classes, c.dim) if c.num_classes else None
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_embedding(c.grid, c.dim))
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)
        xavier_(self.x_embedder.proj)
        zero_(self.final_layer.linear)
        normal_(self.t_embedder)
        if self.y_embedder is not None:
            normal_(self.y_embedder)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_sample(x, t, self.sample_shape)
        emb = self.t_embedder(t)
        if self.y_embedder is not None:
            emb = emb + self.y_embedder(label)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, emb)
        return self._unpatchify(self.final_layer(tokens, emb))

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(b (rows columns) (p q c)) -> (b c (rows p) (columns q))."""
        (rows, columns), p = self.config.grid, self.config.patch
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))  # (b rows columns p q c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * p, columns * p)
