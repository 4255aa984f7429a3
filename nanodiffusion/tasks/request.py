"""What is asked of `generate`: plain values in a GenerateConfig, pictures and networks in Inputs; and what cannot be asked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from nanodiffusion.config import SampleConfig, from_dict
from nanodiffusion.data.conditioning import as_bytes
from nanodiffusion.denoiser import Cond
from nanodiffusion.errors import UserError
from nanodiffusion.nets.adapter import Adapter
from nanodiffusion.nets.controlnet import ControlNet
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.nets.sd_unet import SDUNet
from nanodiffusion.pretrained import Bundle

Picture = Image.Image | np.ndarray | Tensor | Sequence[Any]
Embeddings = Cond | tuple[Cond, Cond | None]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GenerateConfig(SampleConfig):
    """What is asked for, in plain values: it goes into a file and comes back the same.

    0, [] and None stand for what the model's family, or the picture that is given, would have. Sizes are in pixels of
    the picture, [height, width], and crop is [top, left], as SDXL was told them in training (Podell et al. 2023).
    """

    prompt: list[str] = field(default_factory=list)
    prompt_2: list[str] = field(default_factory=list)  # what SDXL's second encoder reads; one, or one per prompt
    negative: list[str] = field(default_factory=list)  # one, or one per prompt
    n: int = 1  # pictures per prompt
    steps: int = 30
    guidance: float | None = None
    width: int = 0
    height: int = 0
    seed: int = 0  # of the first picture; the others' follow
    seeds: list[int] = field(default_factory=list)  # every picture's own, instead
    sigmas: list[float] = field(default_factory=list)  # a ladder of your own instead of `ladder` and `steps`
    timesteps: list[float] = field(default_factory=list)  # the same, as indices into the schedule
    clip_skip: int = 0  # last layers of the text encoder that are left out
    strength: float | None = None  # share of the ladder that a given picture goes through; None: 0.8, or 1 with a mask
    frames: int = 0  # pictures on the way from prompt to prompt, and from seed to seed
    original_size: list[int] = field(default_factory=list)
    crop: list[int] = field(default_factory=list)
    target_size: list[int] = field(default_factory=list)
    negative_original_size: list[int] = field(default_factory=list)
    negative_crop: list[int] = field(default_factory=list)
    negative_target_size: list[int] = field(default_factory=list)
    sharpness: float = 0.0  # added to channel 3 of the last latent
    brightness: float = 0.0  # added to channel 0
    loss_scale: float = 1.0
    loss_every: int = 1  # the loss guides the first step of every so many


@dataclass(frozen=True)
class Control:
    """A ControlNet and its picture, at the steps i of n with start <= i/n and (i+1)/n <= end.

    image: a picture, or a tensor (b 3 H W) in [0, 1]. A net without a stem for pictures takes the mask and the masked
    latent of inpainting (image None) or a tensor (b c h w). guess: for the prompt alone, deep layers more than others.
    """

    net: ControlNet
    image: Picture | None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False


@dataclass(frozen=True)
class AdapterInput:
    """A T2I-Adapter and its picture, or a tensor (b c H W) in [0, 1]; strength, start and end as in `Control`."""

    net: Adapter
    image: Picture
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """What is no plain value; see `generate`."""

    embeddings: Embeddings | None = None
    image: Picture | None = None
    mask: Picture | None = None
    controls: tuple[Control, ...] = ()
    adapters: tuple[AdapterInput, ...] = ()
    tokens: InpaintTokens | None = None
    loss: Loss | None = None
    noise: Tensor | None = None


def settle(config: GenerateConfig, prompt: str | Sequence[str] | None = None, **changes: Any) -> GenerateConfig:
    """The config with changes, checked; a text stands for a list of one, a name for a component of that name."""
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    asked = changes | ({} if prompt is None else {"prompt": prompt})
    return from_dict(GenerateConfig, known | {key: _plain(key, value) for key, value in asked.items()})


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value} if key in ("sampler", "ladder") else [value]
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, range | tuple) else value


def complete(bundle: Bundle, config: GenerateConfig, inputs: Inputs) -> GenerateConfig:
    """The config with the defaults of the family and of the pictures filled in; UserError for what cannot be."""
    check_values(config, inputs)
    _check_pictures(bundle, config, inputs)
    width, height = size_of(bundle, config, inputs)
    strength = config.strength
    if strength is None and inputs.image is not None:
        strength = 0.8 if inputs.mask is None else 1.0
    guidance = bundle.family.guidance if config.guidance is None else config.guidance
    second = config.prompt_2 * (len(config.prompt) if len(config.prompt_2) == 1 else 1)
    return replace(config, width=width, height=height, strength=strength, guidance=guidance, prompt_2=second)


def check_values(config: GenerateConfig, inputs: Inputs) -> None:
    """UserError for what no model could make, whatever its pictures."""
    if inputs.embeddings is None and not config.prompt:
        raise UserError(
            "there is no prompt", key="prompt", expected="a text, a list of texts, or embeddings", found="[]"
        )
    if inputs.embeddings is not None and (config.prompt or config.prompt_2 or config.negative):
        raise UserError("embeddings take the place of prompts", key="embeddings", fix="leave one of them out")
    for key, what in (("negative", "one negative prompt"), ("prompt_2", "one prompt for the second encoder")):
        if (given := len(getattr(config, key))) not in (0, 1, len(config.prompt)):
            raise UserError(f"{what}, or one per prompt", key=key, expected=len(config.prompt), found=given)
    for key in ("n", "loss_every"):
        if getattr(config, key) < 1:
            raise UserError("must be at least 1", key=key, found=getattr(config, key))
    for key in ("frames", "seed", "clip_skip", "width", "height"):
        if not 0 <= getattr(config, key) < 2**63:
            raise UserError("must be a number from 0 up", key=key, found=getattr(config, key))
    if wrong := [seed for seed in config.seeds if not 0 <= seed < 2**63]:
        raise UserError("must be numbers from 0 up", key="seeds", expected="below 2^63", found=wrong[:3])
    for key, value in ((f.name, getattr(config, f.name)) for f in fields(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError("must be a finite number", key=key, found=value)
    if config.frames and config.n > 1:
        raise UserError("frames and n exclude each other", key="frames", fix="n=1")
    if len(config.guidance_interval) not in (0, 2):
        raise UserError("an interval has two ends", key="guidance_interval", found=config.guidance_interval)


def _check_pictures(bundle: Bundle, config: GenerateConfig, inputs: Inputs) -> None:
    latents = (unet_of(bundle).config.channels_out, bundle.codec.latent_channels)
    if latents[0] != latents[1]:
        what = "the VAE's latents have another number of channels than the U-Net's"
        raise UserError(what, key="vae", expected=latents[0], found=latents[1])
    if inputs.mask is not None and inputs.image is None:
        raise UserError("a mask needs a picture", key="mask", fix="image=...")
    if config.strength is not None and inputs.image is None:
        raise UserError("strength needs a picture to start from", key="strength", fix="image=...")
    if wants_mask(bundle) and inputs.mask is None:
        raise UserError(
            "this is an inpainting U-Net: it needs a picture and a mask", key="mask", fix="image=... mask=..."
        )
    if inputs.tokens is not None:
        _check_tokens(bundle, inputs.tokens, inputs.mask)
    for key in ("original_size", "crop", "target_size"):
        for name in (key, f"negative_{key}"):
            if getattr(config, name) and not bundle.family.sizes:
                raise UserError(f"{bundle.family.name} models take no sizes", key=name, fix="leave it out")
            if len(getattr(config, name)) not in (0, 2):
                raise UserError("two numbers", key=name, expected="[height, width]", found=getattr(config, name))


def _check_tokens(bundle: Bundle, tokens: InpaintTokens, mask: Picture | None) -> None:
    if mask is None:
        raise UserError("inpainting tokens need a picture and a mask", key="tokens", fix="image=... mask=...")
    own, layer = unet_of(bundle).config, tokens.conditioning_image_proj
    if wants_mask(bundle):
        raise UserError("this U-Net reads the picture by itself, not by tokens", key="tokens", fix="leave them out")
    wanted, found = (own.channels_out, own.context_dim), (layer.in_features, layer.out_features)
    if wanted != found:
        words = "{} channels to {} features".format
        what, fix = "these inpainting tokens are of another U-Net", "give the one that was trained with them: unet=..."
        raise UserError(what, key="tokens", expected=words(*wanted), found=words(*found), fix=fix)


def unet_of(bundle: Bundle) -> SDUNet:
    """The network inside the denoiser."""
    return cast(SDUNet, bundle.denoiser.net)


def pictures_of(config: GenerateConfig, inputs: Inputs) -> int:
    """How many pictures are made at once."""
    if config.frames:
        return config.frames
    given = inputs.embeddings[0] if isinstance(inputs.embeddings, tuple) else inputs.embeddings
    return config.n * (len(config.prompt) if given is None else len(given["context"]))


def wants_mask(bundle: Bundle) -> bool:
    """Whether the U-Net itself takes the mask and the masked latent."""
    c = unet_of(bundle).config
    return c.channels_in > c.channels_out or c.pass_through > 0


def size_of(bundle: Bundle, config: GenerateConfig, inputs: Inputs) -> tuple[int, int]:
    """Width and height: as asked for, else the first given picture's, else the family's. UserError unless they suit."""
    controls = [c.image for c in inputs.controls if takes_pixels(c)]
    given = [inputs.image, *controls, *(a.image for a in inputs.adapters)]
    shown = next((p for p in given if p is not None), None)
    natural = (bundle.family.size,) * 2 if shown is None else size_of_picture(shown)
    size, factor = (config.width or natural[0], config.height or natural[1]), bundle.codec.factor
    for key, side in zip(("width", "height"), size):
        if side % factor or side < factor:
            near = max(factor, round(side / factor) * factor)
            raise UserError(f"must be a multiple of {factor}", key=key, found=side, fix=f"{key}={near}")
    return size


def takes_pixels(control: Control) -> bool:
    """Whether a control reads a picture; else it reads latents."""
    return control.net.control.hint_channels > 0


def size_of_picture(picture: Picture) -> tuple[int, int]:
    """Width and height."""
    if isinstance(picture, Image.Image):
        return picture.size
    if isinstance(picture, Tensor) and picture.is_floating_point():
        return picture.shape[-1], picture.shape[-2]
    if isinstance(picture, np.ndarray | Tensor):
        height, width = as_bytes(picture).shape[:2]
        return width, height
    if not len(picture):
        raise UserError("an empty list of pictures", key="image")
    return size_of_picture(picture[0])
