"""A class-conditional transformer with adaLN-single (PixArt-alpha, Chen et al. 2023), as nano-diffusion has it.

One modulation of the time serves all blocks, each of which adds a vector of its own to it. The class is a token that the
picture's tokens look at beside each other.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.layers import (
    MultiHead,
    Patched,
    RMSNorm,
    check_choice,
    check_count,
    check_label,
    check_multiple,
    check_positive,
    check_sample,
    check_share,
    joined,
    pair,
    unpatchify,
    zero_,
)

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "mish": nn.Mish}
NORMS = {"layer": nn.LayerNorm, "rms": partial(RMSNorm, eps=2.0**-23)}  # float32's own, whatever the dtype is


@dataclass(frozen=True)
class PixArtConfig(Patched):
    """The size of a sample and of the transformer; the default, for 4 x 4 latents of CIFAR-10, has 88,734,016 parameters.

    nano-diffusion's has 88,733,248: the class that stands for none is the only row more (768 numbers).
    """

    in_size: int | tuple[int, int] = 4  # side, or (height, width), of a sample
    channels_in: int = 16
    patch: int = 2
    dim: int = 768
    depth: int = 12
    heads: int = 12
    ffn_ratio: float = 4.0
    num_classes: int = 10  # 0: unconditional
    concat_channels: int = 0  # of a known part, which is read beside x
    activation: str = "silu"
    norm: str = "rms"  # or "layer"
    dropout: float = 0.0
    time_features: int = 0  # sinusoids, which pass two layers first; 0: as many as dim, which pass none
    time_scale: float = 1000.0

    def __post_init__(self) -> None:
        check_positive(self, "in_size", "channels_in", "patch", "dim", "depth", "heads", "ffn_ratio")
        check_count(self, "num_classes", "concat_channels")
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "norm", NORMS)
        check_share(self, "dropout")
        self.check_patches()
        check_multiple("dim", self.dim, self.heads, "the heads share the features")
        check_multiple("dim", self.dim, 4, "the place is told by a sine and a cosine of row and column")


def interleaved(place: Tensor, count: int) -> Tensor:
    """Sine and cosine of every frequency side by side: place (...) -> (... count 2), in place's dtype.

    Frequencies are 10000^(-i/count). Vaswani et al. 2017, section 3.5.
    """
    frequency = 10000.0 ** -(torch.arange(count, device=place.device, dtype=place.dtype) / count)
    angle = place[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1)


def position_embedding(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sinusoids, [sin x, cos x, sin y, cos y] at each of dim/4 frequencies -> (1 (h w) dim)."""
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    waves = [interleaved(place.flatten(), dim // 4) for place in (column, row)]  # 2 x (n dim/4 2)
    return torch.stack(waves, dim=2).flatten(1).float()[None]


class TimeWaves(nn.Module):
    """The net's clock as interleaved sinusoids of t * scale, and perhaps two layers: t (b) -> (b d)."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        dim, self.features, self.scale = config.dim, config.time_features or config.dim, config.time_scale
        if self.features < 2 or self.features % 2:
            raise UserError(
                "sinusoids come in pairs", key="time_features", expected="0, 2, 4, ...", found=self.features
            )
        layers = (nn.Linear(self.features, dim), nn.SiLU(), nn.Linear(dim, dim)) if config.time_features else ()
        self.mlp = nn.Sequential(*layers)

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32)) * self.scale
        waves = interleaved(t, self.features // 2).flatten(1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype)) if len(self.mlp) else waves


class AdaLNSingle(nn.Module):
    """Modulation of every block by one layer: emb (b d) -> (b depth 6 d), at first zero. Chen et al. 2023, eq. 2.

    The six are, in order, the shifts, scales and gates of attention and feedforward: shift, shift, scale, scale, gate, gate.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(dim, 6 * dim))
        self.layer_embeddings = nn.Parameter(torch.zeros(depth, 6 * dim))
        zero_(self.time_mlp[0])  # type: ignore[arg-type]

    def forward(self, emb: Tensor) -> Tensor:
        shared = self.time_mlp(F.silu(emb).to(self.layer_embeddings.dtype))
        return (shared[:, None] + self.layer_embeddings).unflatten(2, (6, -1))


class PatchEmbedding(nn.Module):
    """Patches of p x p pixels as tokens that know their place: (b c h w) -> (b n d)."""

    position: Tensor

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        c, self.patch = config, config.patch
        self.lin_projection = nn.Linear((c.channels_in + c.concat_channels) * c.patch**2, c.dim)
        self.register_buffer("position", position_embedding(c.grid, c.dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (b n (c p p))
        return self.lin_projection(patches) + self.position


class JointAttention(MultiHead):
    """Tokens look at one another and at the context: x (b n d), context (b m d) or None -> (b n d)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(heads, dropout)
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * dim, dim)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = self._split(qkv, 3)
        if context is not None:
            d = x.shape[2]
            more = self._split(F.linear(context, self.in_proj_weight[d:], self.in_proj_bias[d:]), 2)
            k, v = (torch.cat(both, dim=2) for both in zip((k, v), more))
        return self.out_proj(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(b n (parts heads k)) -> parts x (b heads n k)."""
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class PixArtBlock(nn.Module):
    """Attention and feedforward behind one norm, each modulated before and gated after; at first x itself.

    x (b n d), six (b 6 d) of AdaLNSingle, context (b m d) or None -> (b n d).
    """

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.ffn_ratio)
        self.normalization_layer = NORMS[config.norm](dim)
        self.multi_head_attn = JointAttention(dim, config.heads, config.dropout)
        act = ACTIVATIONS[config.activation]()
        self.feedforward = nn.Sequential(nn.Linear(dim, hidden), act, nn.Linear(hidden, dim))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, six: Tensor, context: Tensor | None) -> Tensor:
        shift1, shift2, scale1, scale2, gate1, gate2 = six[:, :, None].unbind(1)  # each (b 1 d)
        h = self.normalization_layer(x) * (1 + scale1) + shift1
        x = x + gate1 * self.multi_head_attn(h, context)
        h = self.normalization_layer(x) * (1 + scale2) + shift2
        return x + gate2 * self.drop(self.feedforward(h))


class Reshaper(nn.Module):
    """Tokens to the pixels of their patches: (b n d) -> (b c h w); at first zero."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.grid, self.patch = config.grid, config.patch
        self.normalization_layer = NORMS[config.norm](config.dim)
        self.lin_projection = nn.Linear(config.dim, config.channels_in * config.patch**2)
        zero_(self.lin_projection)

    def forward(self, x: Tensor) -> Tensor:
        return unpatchify(self.lin_projection(self.normalization_layer(x)), self.grid, self.patch)


class PixArt(nn.Module):
    """F of a latent, its time and its class: x (b c h w), t (b), label (b) int64 -> (b c h w).

    concat (b c' h w) is a known part, for a net with concat_channels. It starts as F = 0 with every block the identity.
    Parameters have nano-diffusion's names. Raises UserError on inputs of another shape, and on a missing label.
    """

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        c = self.config = config
        self.sample_shape = (c.channels_in, *pair(c.in_size))
        self.null_label = c.num_classes or None
        self.takes = ("label",) * bool(c.num_classes) + ("concat",) * bool(c.concat_channels)
        self.patch_embedding, self.time_embedding = PatchEmbedding(c), TimeWaves(c)
        self.adaln_single = AdaLNSingle(c.dim, c.depth)
        self.context_embedding = nn.Embedding(c.num_classes + 1, c.dim) if c.num_classes else None
        self.dit_blocks = nn.ModuleList(PixArtBlock(c) for _ in range(c.depth))
        self.reshaper = Reshaper(c)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        check_sample(x, t, self.sample_shape)
        context = self._context(label)
        layers = self.adaln_single(self.time_embedding(t)).unbind(1)
        tokens = self.patch_embedding(joined(x, concat, self.config.concat_channels))
        for block, six in zip(self.dit_blocks, layers):
            tokens = block(tokens, six, context)
        return self.reshaper(tokens)

    def _context(self, label: Tensor | None) -> Tensor | None:
        """The class as one token (b 1 d); None of an unconditional net."""
        if self.context_embedding is None:
            return None
        return self.context_embedding(check_label(label, self.config.num_classes))[:, None]
