"""What the inputs of `generate` become: cond and uncond, known latents, a guided denoiser that changes from step to step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map

from nanodiffusion.data.conditioning import hide, latent_mask, to_unit
from nanodiffusion.denoiser import Cond, Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import Bound, bind, cfg, loss_guidance, stepwise, zeros_like_cond
from nanodiffusion.nets.adapter import sum_features
from nanodiffusion.nets.controlnet import Controlled, check_family, control_strengths
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.nets.sd_unet import feature_shapes
from nanodiffusion.pretrained import Bundle
from nanodiffusion.tasks.request import (
    AdapterInput,
    Control,
    Embeddings,
    GenerateConfig,
    Inputs,
    Loss,
    Picture,
    takes_pixels,
    unet_of,
    wants_mask,
)
from nanodiffusion.text import CLIPText

Conds = list[dict[str, Any]]  # [cond] without guidance, [cond, uncond] with it


# -- text and sizes ----------------------------------------------------------------------------------------------------


def conditioning(bundle: Bundle, config: GenerateConfig, embeddings: Embeddings | None = None) -> Conds:
    """cond and, unless guidance is 1, uncond for every picture: context (b m d) and, for SDXL, pooled (b p), sizes (b 6).

    uncond is of the negative prompts; without any, zeros where the family was trained so (SDXL), or of "".
    """
    cond, uncond = encode(bundle, config) if embeddings is None else _given(bundle, config, embeddings)
    both = [cond] if config.guidance == 1 else [cond, zeros_like_cond(dict(cond)) if uncond is None else uncond]
    shapes = [tuple(c["context"].shape) for c in both]
    if shapes[0] != shapes[-1]:
        raise UserError("cond and uncond differ in shape", key="embeddings", expected=shapes[0], found=shapes[1])
    device, dtype = bundle.device, unet_of(bundle).conv_in.weight.dtype
    cast = lambda v: v.to(device, dtype if v.is_floating_point() else None)
    conds = [tree_map(cast, _spread(c, config)) for c in both]
    if bundle.family.sizes:
        for c, prefix in zip(conds, ("", "negative_")):
            c["sizes"] = _sizes(config, prefix).to(device).expand(len(c["context"]), -1)
    return conds


def encode(bundle: Bundle, config: GenerateConfig) -> tuple[Cond, Cond | None]:
    """cond and uncond of the prompts, one row per prompt; uncond None where there are zeros instead, or no need."""
    p, negative = len(config.prompt), config.negative
    if len(negative) not in (0, 1, p):
        raise UserError("one negative prompt, or one per prompt", key="negative", expected=p, found=len(negative))
    if not negative and not bundle.family.zero_uncond:
        negative = [""]
    wanted = negative * (p // len(negative)) if negative and config.guidance != 1 else None
    second = config.prompt_2 or None
    with bundle.at_work(*text_nets(bundle)):
        return bundle.text.encode(config.prompt, wanted, clip_skip=config.clip_skip, prompts_2=second)


def text_nets(bundle: Bundle) -> list[CLIPText]:
    """The text encoders."""
    return [part.net for part in bundle.text.parts]


def _given(bundle: Bundle, config: GenerateConfig, embeddings: Embeddings) -> tuple[Cond, Cond | None]:
    cond, uncond = embeddings if isinstance(embeddings, tuple) else (embeddings, None)
    if uncond is None and config.guidance != 1 and not bundle.family.zero_uncond:
        b, m = cond["context"].shape[:2]
        with bundle.at_work(*text_nets(bundle)):
            empty = bundle.text.encode([""] * b)[0]
        chunks = max(1, m // empty["context"].shape[1])  # a long prompt has several
        uncond = {**empty, "context": empty["context"].repeat(1, chunks, 1)}
    return cond, uncond


def _spread(cond: Cond, config: GenerateConfig) -> dict[str, Any]:
    """One row per picture: n for each prompt, or the frames between prompts."""
    if config.frames:
        return between(cond, config.frames)
    return tree_map(lambda v: v.repeat_interleave(config.n, 0), dict(cond))


def _sizes(config: GenerateConfig, prefix: str) -> Tensor:
    """(6) int64, which no half precision rounds: size before cropping, top left of the crop, size wanted."""
    own = [config.height, config.width]
    defaults = {"original_size": own, "crop": [0, 0], "target_size": own}
    return torch.tensor([getattr(config, prefix + k) or getattr(config, k) or v for k, v in defaults.items()]).flatten()


# -- on the way from one to another ------------------------------------------------------------------------------------


def between(cond: Cond, frames: int) -> dict[str, Any]:
    """Rows evenly spaced on the straight path through the rows of every tensor: (p ...) -> (frames ...)."""
    return tree_map(lambda v: walk(v, frames, torch.lerp), dict(cond))


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """On the great circle from a to b, of any one shape: unit noise stays unit noise on the way (Shoemake 1985)."""
    angle = ((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1).acos()
    if angle.sin().abs() < 1e-6:
        return torch.lerp(a, b, weight)
    return (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()


def walk(rows: Tensor, frames: int, move: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """Rows evenly spaced on the path through the rows, both ends included; move(a, b, w) goes from one to the next."""
    if len(rows) == 1:
        return rows.expand(frames, *rows.shape[1:])
    places = np.linspace(0, len(rows) - 1, frames).tolist()
    starts = [min(int(at), len(rows) - 2) for at in places]
    return torch.stack([move(rows[i], rows[i + 1], at - i) for i, at in zip(starts, places)])


# -- pictures and masks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What is given of the picture: latents x0 and masked (b c h w), mask (b 1 h w) of 0 and 1; all None without any.

    shape: (b c h w). held: whether what is known is held from outside, for want of a net that inpaints.
    """

    shape: tuple[int, int, int, int]
    x0: Any = None
    mask: Any = None
    masked: Any = None
    held: bool = False

    @property
    def concat(self) -> Tensor:
        """What inpainting nets read: the mask, then the latent of the picture with its hole grey (b 1+c h w)."""
        return torch.cat([self.mask, self.masked], 1)


def know(bundle: Bundle, config: GenerateConfig, inputs: Inputs, b: int) -> Known:
    """The picture and the mask in the codec's space, for b pictures."""
    codec, device = bundle.codec, bundle.device
    shape = (b, codec.latent_channels, config.height // codec.factor, config.width // codec.factor)
    if inputs.image is None:
        return Known(shape)
    image = pixels(inputs.image, config, "image", codec.channels, low=-1)
    latent = lambda x: rows(to_latent(bundle, x), config, b, "image").to(device)
    if inputs.mask is None:
        return Known(shape, latent(image))
    mask = (pixels(inputs.mask, config, "mask", 1) >= 0.5).float()
    small = rows(latent_mask(mask, codec.factor), config, b, "mask").to(device)
    held = inputs.tokens is None and not wants_mask(bundle)
    reads = not held or not all(map(takes_pixels, inputs.controls))
    x0 = latent(image) if held or config.strength != 1 else None
    return Known(shape, x0, small, latent(_hidden(image, mask)) if reads else None, held)


def _hidden(image: Tensor, mask: Tensor) -> Tensor:
    n = max(len(image), len(mask))
    if not {len(image), len(mask)} <= {1, n}:
        raise UserError("as many masks as pictures, or one", key="mask", expected=len(image), found=len(mask))
    return hide(image.expand(n, -1, -1, -1), mask)


def pixels(picture: Picture, config: GenerateConfig, key: str, channels: int = 3, low: int = 0) -> Tensor:
    """A picture, or a list of them, as (b c H W) in [low, 1]; a floating tensor is that already, but for its batch.

    UserError when it is not of the size, channels or range that it must be.
    """
    x = _pixels(picture, channels, low)
    if x.shape[2:] != (config.height, config.width):
        expected, found = (f"{w} x {h} (width x height)" for h, w in ((config.height, config.width), x.shape[2:]))
        raise UserError("a picture of another size", key=key, expected=expected, found=found, fix="resize it first")
    if x.shape[1] != channels:
        raise UserError("another number of channels", key=key, expected=channels, found=x.shape[1])
    span = [float(x.min()), float(x.max())]
    if not -1.001 <= span[0] <= span[1] <= 1.001:
        raise UserError("values out of range", key=key, expected=[low, 1], found=span)
    return x


def _pixels(picture: Picture, channels: int, low: int) -> Tensor:
    if isinstance(picture, Tensor) and picture.is_floating_point():
        x = picture.detach().cpu().float()
        return x.reshape((1,) * (4 - x.ndim) + x.shape)
    if isinstance(picture, Image.Image | np.ndarray | Tensor):
        return to_unit(picture, channels) * (1 - low) + low
    several = [_pixels(p, channels, low) for p in picture]
    shapes = [tuple(x.shape[1:]) for x in several]
    if len(set(shapes)) != 1:
        expected = "one or more, all of one size"
        raise UserError("these pictures do not go together", key="image", expected=expected, found=shapes[:6])
    return torch.cat(several)


def rows(x: Tensor, config: GenerateConfig, b: int, key: str) -> Tensor:
    """One row per picture that is made, of one for all, one per prompt, or one each: (1 or p or b ...) -> (b ...)."""
    if len(x) == 1:
        return x.expand(b, *x.shape[1:])
    if len(x) * config.n == b:
        return x.repeat_interleave(config.n, 0)
    if len(x) != b:
        raise UserError("not as many as there are to be made", key=key, expected=f"1 or {b}", found=len(x))
    return x


def to_latent(bundle: Bundle, image: Tensor) -> Tensor:
    """The codec's mean latent, in image's dtype: (b 3 H W) in [-1, 1] -> (b c h w)."""
    with bundle.at_work(bundle.codec):
        return bundle.codec.encode(image.to(bundle.device))


def to_image(bundle: Bundle, x0: Tensor) -> Tensor:
    """The codec's picture of a latent, in its dtype: (b c h w) -> (b 3 H W), about [-1, 1]."""
    with bundle.at_work(bundle.codec):
        return bundle.codec.decode(x0.to(bundle.device))


def with_known(bundle: Bundle, conds: Conds, known: Known, tokens: InpaintTokens | None) -> Conds:
    """conds with what inpainting adds: concat (b 5 h w) for a net that takes it, further context (b h*w d) from tokens."""
    if wants_mask(bundle):
        conds = [{**c, "concat": known.concat} for c in conds]
    if tokens is not None:
        with bundle.at_work(tokens):
            more = tokens(known.masked.to(bundle.device), known.mask.to(bundle.device))
        conds = [{**c, "context": torch.cat([c["context"], more.to(c["context"])], 1)} for c in conds]
    return conds


# -- the denoiser ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hinted:
    """A control whose picture has been read, once for all steps: hint (b c h w)."""

    source: Control
    hint: Tensor


@dataclass(frozen=True)
class Featured:
    """An adapter whose picture has been read, once for all steps: features, one (b c h w) per level."""

    source: AdapterInput
    features: tuple[Tensor, ...]


def ready(bundle: Bundle, config: GenerateConfig, inputs: Inputs, known: Known) -> tuple[list[Hinted], list[Featured]]:
    """Every control with its hint, every adapter with its features."""
    for source in (*inputs.controls, *inputs.adapters):
        if not 0 <= source.start < source.end <= 1:
            raise UserError("a window is 0 <= start < end <= 1", key="start", found=[source.start, source.end])
    controls = [Hinted(c, _hint(bundle, config, c, known)) for c in inputs.controls]
    return controls, [Featured(a, _features(bundle, config, a, known)) for a in inputs.adapters]


def _features(bundle: Bundle, config: GenerateConfig, adapter: AdapterInput, known: Known) -> tuple[Tensor, ...]:
    image = pixels(adapter.image, config, "adapter", adapter.net.config.channels_in)
    with bundle.at_work(adapter.net):
        features = adapter.net(image.to(bundle.device))
    own = feature_shapes(unet_of(bundle).config, known.shape[2], known.shape[3])
    found = tuple(tuple(f.shape[1:]) for f in features)
    if found != own[: len(found)]:
        raise UserError("this adapter belongs to another family of U-Nets", key="adapter", expected=own, found=found)
    return tuple(rows(f, config, known.shape[0], "adapter") for f in features)


def _hint(bundle: Bundle, config: GenerateConfig, control: Control, known: Known) -> Tensor:
    net, weight = control.net, control.net.conv_in.weight
    check_family("control", net.config, unet_of(bundle).config)
    _check_dtype(bundle, weight.dtype)
    if takes_pixels(control):
        if control.image is None:
            raise UserError("a control needs a picture", key="control", fix="Control(net, image)")
        given = pixels(control.image, config, "control", net.control.hint_channels)
    elif control.image is None and known.masked is None:
        what = "this ControlNet reads the picture and mask of inpainting"
        raise UserError(what, key="control", fix="image=... mask=...")
    else:
        given = known.concat if control.image is None else _pixels(control.image, 3, 0)
    with bundle.at_work(net):
        return rows(net.embed(given.to(bundle.device)), config, known.shape[0], "control")


def _check_dtype(bundle: Bundle, dtype: torch.dtype) -> None:
    own = next(unet_of(bundle).parameters()).dtype
    if own != dtype:
        raise UserError("the ControlNet's precision is not the U-Net's", key="control", expected=own, found=dtype)


def denoiser_of(
    bundle: Bundle,
    config: GenerateConfig,
    conds: Conds,
    sigmas: Tensor,
    helpers: tuple[Sequence[Hinted], Sequence[Featured]],
    words: int | None = None,
) -> Bound:
    """The guided denoiser, at every step with those helpers only whose window is open: none is asked in vain.

    words: how many tokens of the context are the text's, which controls read; None: all.
    """
    steps, chosen = len(sigmas) - 1, []
    built: dict[tuple[int, ...], Bound] = {}
    for i in range(steps):
        controls = [c for c in helpers[0] if _open(c.source, i, steps)]
        adapters = [a for a in helpers[1] if _open(a.source, i, steps)]
        key = tuple(map(id, (*controls, *adapters)))
        if key not in built:
            built[key] = guided(bundle, config, conds, controls, adapters, words)
        chosen.append(built[key])
    return chosen[0] if len(built) == 1 else stepwise(sigmas.tolist(), chosen)


def _open(source: Control | AdapterInput, i: int, steps: int) -> bool:
    return source.start <= i / steps and (i + 1) / steps <= source.end


def guided(
    bundle: Bundle,
    config: GenerateConfig,
    conds: Conds,
    controls: Sequence[Hinted],
    adapters: Sequence[Featured],
    words: int | None = None,
) -> Bound:
    """The denoiser with its controls, bound to its conditioning under classifier-free guidance."""
    denoiser = bundle.denoiser
    if controls:
        net = Controlled(unet_of(bundle), [c.source.net for c in controls], words)
        denoiser = Denoiser(net, denoiser.prediction, denoiser.clock, precision=denoiser.precision)
        hints = tuple(c.hint for c in controls)
        strengths = [tuple(_strength(c, uncond=i > 0) for c in controls) for i in range(len(conds))]
        conds = [{**c, "hints": hints, "strengths": s} for c, s in zip(conds, strengths)]
    if adapters:
        features = sum_features([a.features for a in adapters], [a.source.strength for a in adapters])
        conds = [{**c, "features": features} for c in conds]
    if len(conds) == 1:
        return bind(denoiser, conds[0])
    lo, hi = config.guidance_interval or (0.0, float("inf"))
    assert config.guidance is not None
    return cfg(denoiser, conds[0], conds[1], config.guidance, lo, hi, config.guidance_rescale)


def _strength(control: Hinted, uncond: bool) -> Tensor:
    """(b k): how strong each residual is in every row; a control that guesses is not asked without the prompt."""
    source = control.source
    strength = control_strengths(source.strength, len(control.hint), source.net.count, source.guess).to(control.hint)
    return torch.zeros_like(strength) if uncond and source.guess else strength


def with_loss(bundle: Bundle, config: GenerateConfig, D: Bound, sigmas: Tensor, loss: Loss | None) -> Bound:
    """D moved down the gradient of a loss of the decoded x0, in the first of every `loss_every` steps."""
    if loss is None:
        return D
    descended = loss_guidance(
        D, lambda x0: _checked(loss(to_image(bundle, x0)), len(x0)).to(x0.device), config.loss_scale
    )

    def moved(x: Tensor, sigma: Tensor) -> Tensor:
        with bundle.at_work(bundle.codec):  # until the gradient has gone back through it
            return descended(x, sigma)

    return stepwise(sigmas.tolist(), [D if i % config.loss_every else moved for i in range(len(sigmas) - 1)])


def _checked(loss: Tensor, b: int) -> Tensor:
    if loss.shape != (b,):
        raise UserError("a loss is one number per picture", key="loss", expected=(b,), found=tuple(loss.shape))
    return loss
