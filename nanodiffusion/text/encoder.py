"""CLIP's text encoder (Radford et al. 2021), under the names its published weights have in transformers.

`embed` gives token and position embeddings, `encode` runs the layers on them: whoever edits embeddings works in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError, lookup
from nanodiffusion.nets.layers import check_multiple, check_positive


def quick_gelu(x: Tensor) -> Tensor:
    """x times the logistic of 1.702 x, OpenAI's stand-in for the GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class TextConfig:
    """The size of a CLIP text encoder; the default is CLIP-L, which SD 1.x and SDXL have."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: str = "quick_gelu"
    projection: int | None = None  # features of `pooled` after a linear map; None: the width, and no map
    vocab: int = 49408
    positions: int = 77
    eos: int = 49407  # the end token, where `pooled` is read; 2 in configs of before 2023, which means 49407

    def __post_init__(self) -> None:
        check_positive(self, "width", "layers", "heads", "mlp", "vocab", "positions")
        check_multiple("width", self.width, self.heads, "the heads share the features")
        lookup(ACTIVATIONS, self.activation, "activation")

    @property
    def end(self) -> int:
        """The end token's true id."""
        return 49407 if self.eos == 2 else self.eos


CLIP_L = TextConfig()
CLIP_H = TextConfig(1024, 23, 16, 4096, "gelu")  # SD 2.x never runs OpenCLIP-H's last layer, so its folder lacks it
CLIP_BIGG = TextConfig(1280, 32, 20, 5120, "gelu", projection=1280)


class Encoded(NamedTuple):
    """What the encoder says: layers (the embeddings, then each layer's output, (b n d) all), last (b n d), pooled (b p).

    `last` is the last layer after the final norm; `pooled` its state at the end token, projected where there is a projection.
    """

    layers: tuple[Tensor, ...]
    last: Tensor
    pooled: Tensor


class CausalAttention(nn.Module):
    """Multi-head self-attention of each token to itself and those before: (b n d) -> (b n d). Vaswani et al. 2017, eq. 1."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        # Called with is_causal=True, so that a replacement which cannot mask fails instead of looking ahead.
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers about an activation: (b n d) -> (b n d)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1, self.fc2 = nn.Linear(config.width, config.mlp), nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each of normalised tokens and added to them: (b n d) -> (b n d)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = CausalAttention(config.width, config.heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def table(rows: int, width: int) -> nn.Embedding:
    """A table of random vectors with a deviation of 0.02, as CLIP's start: ids -> (... d)."""
    # Not nn.Embedding's own normal numbers: on meta those cost two seconds of imports.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width).uniform_(-0.0346, 0.0346))


class Embeddings(nn.Module):
    """The two tables: a vector per token id, and one per place."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = table(config.vocab, config.width)
        self.position_embedding = table(config.positions, config.width)


class Layers(nn.Module):
    """The layers under their published name."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class TextModel(nn.Module):
    """The parts that published names have below `text_model`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class CLIPText(nn.Module):
    """CLIP's text encoder: ids (b n) -> Encoded. Its keys are transformers' CLIPTextModel's, with `projection` those of
    CLIPTextModelWithProjection; a `text_model.embeddings.position_ids` in an old file is a constant and no weight.

    Raises UserError on ids or embeddings of another shape, and on more tokens than there are positions.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def forward(self, ids: Tensor) -> Encoded:
        return self.encode(self.embed(ids), self.end(ids))

    def token_embedding(self, ids: Tensor) -> Tensor:
        """The vector of each token, without its place: ids (b n) -> (b n d)."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise UserError("not token ids", key="ids", expected="integers (b, n)", found=(ids.dtype, *ids.shape))
        return self.text_model.embeddings.token_embedding(ids)

    def position_embedding(self, n: int | None = None) -> Tensor:
        """The vectors of the first n places (None: of all): -> (n d)."""
        table = self.text_model.embeddings.position_embedding.weight
        if n is not None and n > len(table):
            raise UserError("more tokens than places", key="ids", expected=f"at most {len(table)} tokens", found=n)
        return table[:n]

    def embed(self, ids: Tensor) -> Tensor:
        """Token and position embeddings together, what the first layer is given: ids (b n) -> (b n d)."""
        return self.token_embedding(ids) + self.position_embedding(ids.shape[1])

    def end(self, ids: Tensor) -> Tensor:
        """Where the first end token of each row is: ids (b n) -> (b); 0 in a row without one.

        Not the largest id, by which early versions found it: an added token has a larger one.
        """
        return (ids == self.config.end).int().argmax(dim=1)

    def encode(self, embeddings: Tensor, end: Tensor) -> Encoded:
        """The layers on embeddings (b n d) that `embed` gave and that may since be edited, end (b) -> Encoded."""
        _check_embeddings(embeddings, end, self.config)
        layers = [embeddings]
        for layer in self.text_model.encoder.layers:
            layers.append(layer(layers[-1]))
        last = self.text_model.final_layer_norm(layers[-1])
        pooled = last[torch.arange(len(last), device=last.device), end]
        return Encoded(tuple(layers), last, pooled if self.text_projection is None else self.text_projection(pooled))

    def output(self, encoded: Encoded, layer: int = -1, norm: bool = True) -> Tensor:
        """One layer's output -> (b n d), as is or through the final norm; layer as an index of `encoded.layers`."""
        if layer == -1 and norm:
            return encoded.last
        return self.text_model.final_layer_norm(encoded.layers[layer]) if norm else encoded.layers[layer]


def _check_embeddings(embeddings: Tensor, end: Tensor, config: TextConfig) -> None:
    found = tuple(embeddings.shape)
    if len(found) != 3 or found[2] != config.width or found[1] > config.positions:
        expected = f"(b, n, {config.width}) with n at most {config.positions}"
        raise UserError("embeddings of another shape", key="embeddings", expected=expected, found=found)
    if end.shape != found[:1]:
        raise UserError("one place of the end token per row", key="end", expected=found[:1], found=tuple(end.shape))


# -- edited embeddings ---------------------------------------------------------------------------------------------------


def replace_token(embeddings: Tensor, ids: Tensor, token: int, vector: Tensor) -> Tensor:
    """A copy of token embeddings (b n d) with `vector` (d) wherever ids (b n) is `token`.

    For embeddings without their places (`token_embedding`); add `position_embedding` after. UserError: shapes that do not
    belong together.
    """
    if embeddings.shape[:-1] != ids.shape or vector.shape != embeddings.shape[-1:]:
        raise UserError(
            "these do not belong together",
            expected="embeddings (b, n, d), ids (b, n), vector (d)",
            found=", ".join(str(tuple(t.shape)) for t in (embeddings, ids, vector)),
        )
    return torch.where((ids == token)[..., None], vector.to(embeddings), embeddings)


def mix_tokens(net: CLIPText, first: int, second: int, share: float = 0.5) -> Tensor:
    """The vector (1 - share) of one token id + share of another -> (d): half a puppy, half a skunk."""
    a, b = net.token_embedding(torch.tensor([[first, second]], device=net.position_embedding().device))[0]
    return torch.lerp(a, b, share)
