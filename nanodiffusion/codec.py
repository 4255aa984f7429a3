"""Codecs: images (b 3 H W) in [-1, 1] to the x0 of a diffusion model and back. Scale and shift are inside.

`encode(image, noise) -> x0` and `decode(x0) -> image` are the same call for the KL autoencoders, TAESD and plain pixels.
A codec runs in the dtype of its own weights and takes and gives the caller's: it is its own precision boundary. Where half
precision overflows, it computes those images again in float32 and says so.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nanodiffusion.errors import UserError
from nanodiffusion.nets.autoencoder import Decoder, Encoder, TinyDecoder, TinyEncoder
from nanodiffusion.nets.layers import check_multiple, check_positive

Call = Callable[[Tensor], Tensor]
Span = tuple[int, int]  # start and stop, in latent pixels

HALF = (torch.bfloat16, torch.float16)
LOGVAR = (-30.0, 20.0)  # where log variances are clamped
SMALLEST_TILE = 4  # latent pixels, a quarter of which overlap


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """A KL autoencoder (Rombach et al. 2022), one level per width; x0 = (z - shift) * scale of its latents z."""

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2  # per level on the way down; one more on the way up
    groups: int = 32
    scale: float = 0.18215
    shift: float = 0.0
    attention: bool = True  # in the middle
    quant_conv: bool = True  # a 1x1 convolution after the encoder
    post_quant_conv: bool = True  # and one before the decoder

    def __post_init__(self) -> None:
        check_positive(self, "channels", "latent_channels", "widths", "blocks", "groups")
        if not self.widths:
            raise UserError("an autoencoder needs a level", key="widths", expected="e.g. (128, 256)", found=())
        for width in self.widths:
            check_multiple("widths", width, self.groups, "GroupNorm's groups share the channels")


SD_VAE = AutoencoderKLConfig()  # 83,653,863 parameters
SDXL_VAE = replace(SD_VAE, scale=0.13025)
F8C16 = replace(
    SD_VAE, latent_channels=16, widths=(128, 128, 256, 512), scale=0.24447420268654824
)  # ostris, 57,266,643
SD3_VAE = replace(
    SD_VAE, latent_channels=16, scale=1.5305, shift=0.0609, quant_conv=False, post_quant_conv=False
)  # 83,819,683


@dataclass(frozen=True)
class TinyConfig:
    """TAESD: a small autoencoder distilled from a large one. Its latents are the large one's x0, already scaled."""

    channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "channels", "latent_channels", "width", "encoder_blocks", "decoder_blocks")
        if not self.decoder_blocks or len(self.encoder_blocks) != len(self.decoder_blocks):
            found = f"{self.encoder_blocks} and {self.decoder_blocks}"
            raise UserError("both ways change the size as often", key="encoder_blocks, decoder_blocks", found=found)


class Codec(nn.Module):
    """What every codec with weights does: checks, precision, tiles and slices.

    factor: image pixels per latent pixel, along each axis.
    tile: side, in latent pixels, of the largest square worked on at once, None for everything; it bounds the memory.
    slices: one image at a time.
    overflows: how many images half precision could not hold so far.
    """

    def __init__(self, channels: int, latent_channels: int, factor: int) -> None:
        super().__init__()
        self.channels, self.latent_channels, self.factor = channels, latent_channels, factor
        self.tile: int | None = None
        self.slices = False
        self.overflows = 0

    def _encode(self, net: nn.Module, image: Tensor) -> Tensor:
        """net's latents of checked images: (b 3 H W) -> (b c h w)."""
        _check_image(image, self.channels, self.factor)
        return self._slices(net, image, (self.factor, 1))

    def _decode(self, net: nn.Module, z: Tensor) -> Tensor:
        """net's images of checked latents: (b c h w) -> (b 3 H W)."""
        _check("these are not this codec's latents", "x0", z, self.latent_channels)
        return self._slices(net, z, (1, self.factor))

    def _slices(self, net: nn.Module, x: Tensor, pixels: tuple[int, int]) -> Tensor:
        parts = x.split(1) if self.slices else [x]
        return torch.cat([self._guarded(net, part, pixels) for part in parts])

    def _guarded(self, net: nn.Module, x: Tensor, pixels: tuple[int, int]) -> Tensor:
        """net(x) in its weights' dtype, given back in x's; images that overflow there are computed again in float32."""
        dtype = next(net.parameters()).dtype
        run = partial(tiled, net, tile=self.tile, pixels=pixels)
        narrow = partial(run, lambda part: net(part.to(dtype)))
        out = narrow(x)
        if dtype not in HALF or x.is_meta:
            return out
        bad = (_finite(x) & ~_finite(out)).tolist()
        if not any(bad):
            return out
        self._warn(sum(bad), dtype)
        weights = {name: p.float() for name, p in net.named_parameters()}
        wide = partial(run, lambda part: functional_call(net, weights, part.float()))
        # the good ones too: what overflowed must leave no NaN in the gradient, and no image may depend on its neighbours
        return torch.cat([wide(row) if is_bad else narrow(row) for row, is_bad in zip(x.split(1), bad)])

    def _warn(self, count: int, dtype: torch.dtype) -> None:
        if not self.overflows:
            name = str(dtype).removeprefix("torch.")
            warnings.warn(
                f"the codec overflows in {name}: computing such images again in float32, which takes longer. "
                "Keep its weights in float32 or bfloat16, or use a variant made for float16 (fp16-fix)",
                stacklevel=2,
            )
        self.overflows += count


class AutoencoderKL(Codec):
    """The autoencoder of Stable Diffusion and its kin (Rombach et al. 2022, section 3.1)."""

    def __init__(self, config: AutoencoderKLConfig = SD_VAE) -> None:
        c = config
        super().__init__(c.channels, c.latent_channels, 2 ** (len(c.widths) - 1))
        self.config = c
        both = 2 * c.latent_channels  # mean and log variance
        self.encoder = Encoder(c.channels, both, c.widths, c.blocks, c.groups, c.attention)
        self.decoder = Decoder(c.latent_channels, c.channels, c.widths, c.blocks, c.groups, c.attention)
        self.quant_conv = nn.Conv2d(both, both, 1) if c.quant_conv else nn.Identity()
        self.post_quant_conv = (
            nn.Conv2d(c.latent_channels, c.latent_channels, 1) if c.post_quant_conv else nn.Identity()
        )

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, in [-30, 20], of the unscaled latents: (b 3 H W) in [-1, 1] -> two (b c h w)."""
        z = self._encode(nn.Sequential(self.encoder, self.quant_conv), image)
        mean, logvar = z.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """x0 = (mean + std * noise - shift) * scale of an image: (b 3 H W) in [-1, 1], noise (b c h w) -> (b c h w).

        noise: unit noise, for a sample of the posterior; None for its mean.
        Raises UserError where factor does not divide the size, and on another shape of image or noise.
        """
        mean, logvar = self.moments(image)
        if noise is None:
            return (mean - self.config.shift) * self.config.scale
        if noise.shape != mean.shape:
            expected = tuple(mean.shape)
            raise UserError(
                "this is not noise for these latents", key="noise", expected=expected, found=tuple(noise.shape)
            )
        z = mean + (0.5 * logvar).exp() * noise.to(mean)
        return (z - self.config.shift) * self.config.scale

    def decode(self, x0: Tensor) -> Tensor:
        """The image of latents, about [-1, 1]: (b c h w) -> (b 3 H W). Raises UserError on another number of channels."""
        z = x0 / self.config.scale + self.config.shift
        return self._decode(nn.Sequential(self.post_quant_conv, self.decoder), z)


class TinyAutoencoder(Codec):
    """TAESD (Bohan 2023): an approximate codec at some hundredth of the cost, for previews of the same x0."""

    def __init__(self, config: TinyConfig | None = None) -> None:
        c = config or TinyConfig()
        super().__init__(c.channels, c.latent_channels, 2 ** (len(c.decoder_blocks) - 1))
        self.config = c
        self.encoder = TinyEncoder(c.channels, c.latent_channels, c.width, c.encoder_blocks)
        self.decoder = TinyDecoder(c.latent_channels, c.channels, c.width, c.decoder_blocks)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """x0 of an image, without a distribution, so that noise is ignored: (b 3 H W) in [-1, 1] -> (b c h w)."""
        return (self._encode(self.encoder, image) - self.config.shift) * self.config.scale

    def decode(self, x0: Tensor) -> Tensor:
        """The image of latents as `AutoencoderKL.decode` takes them, about [-1, 1]: (b c h w) -> (b 3 H W)."""
        return self._decode(self.decoder, x0 / self.config.scale + self.config.shift)


class PixelCodec(nn.Module):
    """No codec: x0 is the image itself, (b c h w) in [-1, 1]."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = self.latent_channels = channels
        self.factor = 1

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The image: it has no distribution, so that noise is ignored."""
        _check_image(image, self.channels, 1)
        return image

    def decode(self, x0: Tensor) -> Tensor:
        """x0."""
        return x0


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(what: str, key: str, x: Tensor, channels: int, fix: str | None = None) -> None:
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        found = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        raise UserError(what, key=key, expected=f"(b, {channels}, h, w), floating point", found=found, fix=fix)


def _check_image(image: Tensor, channels: int, factor: int) -> None:
    _check("these are not images in [-1, 1]", "image", image, channels)
    h, w = image.shape[2:]
    if h % factor or w % factor or not h or not w:
        near = " x ".join(str(max(1, round(side / factor)) * factor) for side in (h, w))
        raise UserError(
            "the autoencoder works in whole latent pixels",
            key="image",
            expected=f"height and width that are multiples of {factor}",
            found=f"{h} x {w}",
            fix=f"crop or resize to {near}",
        )


def _finite(x: Tensor) -> Tensor:
    """Whether each sample is finite throughout: (b ...) -> (b)."""
    return x.isfinite().flatten(1).all(1)


# -- tiles -------------------------------------------------------------------------------------------------------------


def tiled(net: nn.Module, call: Call, x: Tensor, tile: int | None, pixels: tuple[int, int]) -> Tensor:
    """call(x) by way of overlapping tiles of `tile` latent pixels, blended: (b c h w) -> (b c' h' w') in x's dtype.

    pixels: the width of a latent pixel in x and in the result. call: runs `net`, all of whose GroupNorms take their
    statistics from one thumbnail of x, of the size of a tile: with statistics of their own, tiles differ in contrast.
    """
    inside, outside = pixels
    size = [side // inside for side in x.shape[2:]]
    rows, columns = (tile_spans(side, tile) for side in size)
    if tile is None or len(rows) == len(columns) == 1:
        return call(x).to(x.dtype)
    out = torch.zeros(())
    with one_normalisation(net):
        call(_thumbnail(x, size, tile, inside))
        for row, up in _ramps(rows, outside):
            for column, along in _ramps(columns, outside):
                part = call(x[..., _cut(row, inside), _cut(column, inside)]).to(x.dtype)
                if not out.ndim:
                    out = part.new_zeros(*part.shape[:2], *(side * outside for side in size))
                out[..., _cut(row, outside), _cut(column, outside)] += (up[:, None] * along).to(part) * part
    return out


@contextmanager
def one_normalisation(net: nn.Module) -> Iterator[None]:
    """Meanwhile, each GroupNorm of net keeps the statistics of the first maps it is given for all that follow."""
    norms = [module for module in net.modules() if isinstance(module, nn.GroupNorm)]
    try:
        for norm in norms:
            norm.forward = _keeping(norm)  # type: ignore[method-assign]  # on the instance: it hides the class's
        yield
    finally:
        for norm in norms:
            del norm.forward


def _keeping(norm: nn.GroupNorm) -> Call:
    kept: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (norm.num_groups, -1))  # (b g c/g h w)
        if not kept:
            kept.extend(torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True))
        var, mean = kept
        rows = ((groups - mean) * (var + norm.eps).rsqrt()).flatten(1, 2)
        return (rows * norm.weight[:, None, None] + norm.bias[:, None, None]).to(x.dtype)

    return forward


def _thumbnail(x: Tensor, size: Sequence[int], tile: int, inside: int) -> Tensor:
    """x at the area of a tile: (b c h w) -> (b c h' w')."""
    smaller = min(1.0, tile / math.sqrt(size[0] * size[1]))
    # averaging keeps the statistics of images, which are alike at all scales (Field 1987), but not those of noisy latents
    mode = "area" if inside > 1 else "nearest-exact"
    return F.interpolate(x, [max(1, int(side * smaller)) * inside for side in size], mode=mode)


def tile_spans(size: int, side: int | None) -> list[Span]:
    """The fewest equal spans [start, stop) of at most `side` that cover `size` and overlap by a quarter of `side` or more.

    Raises UserError on a side below 4, whose quarter is nothing.
    """
    if side is not None and side < SMALLEST_TILE:
        expected = f"at least {SMALLEST_TILE} latent pixels"
        raise UserError("the tiles are too small to overlap", key="tile", expected=expected, found=side)
    if side is None or size <= side:
        return [(0, size)]
    overlap = side // 4
    n = math.ceil((size - overlap) / (side - overlap))
    length = math.ceil((size + (n - 1) * overlap) / n)
    return [(start, start + length) for start in (i * (size - length) // (n - 1) for i in range(n))]


def _cut(span: Span, pixels: int) -> slice:
    """The pixels of a span, so many per latent pixel."""
    return slice(span[0] * pixels, span[1] * pixels)


def _ramps(spans: Sequence[Span], pixels: int) -> Iterator[tuple[Span, Tensor]]:
    """Each span and the weights of its pixels, linear over the overlaps: all the weights of a pixel sum to 1."""
    for i, (start, stop) in enumerate(spans):
        weight = torch.ones((stop - start) * pixels)
        if i:
            weight *= _rise((spans[i - 1][1] - start) * pixels, len(weight))
        if i < len(spans) - 1:
            weight *= _rise((stop - spans[i + 1][0]) * pixels, len(weight)).flip(0)
        yield (start, stop), weight


def _rise(overlap: int, length: int) -> Tensor:
    """From 0 to 1 over the first `overlap` of `length` pixels, then 1, each taken at its centre."""
    return ((torch.arange(length) + 0.5) / overlap).clamp(max=1)
