"""williamberman's nano-diffusion (SDXL) on this core: its names, argument orders and meanings; change the import lines only.

    from models import SDXLUNet, SDXLVae        ->  from nanodiffusion.compat.nano_sdxl import SDXLUNet, SDXLVae
    from diffusion import sdxl_diffusion_loop   ->  from nanodiffusion.compat.nano_sdxl import sdxl_diffusion_loop

or one line for both, `from nanodiffusion.compat.nano_sdxl import *`. Nets are the core's with that system's constructors
and calls; `net.core` is the same net, with the same tensors, called as the core calls it.

Where it has a defect, this follows the core: `device` is where the weights go; a missing weight is an error and never
garbage; negative prompts are a text or a list, also beside given embeddings, and no list is changed; the picture has the
size of x_T, or of the control image; the Runge-Kutta midpoint is one of sigma; an adapter's four maps act where diffusers
has them act; ControlNets of another precision than the U-Net's work; pickles are never opened. Further: the state between
steps is float32; prompts cut at 77 tokens say so; pictures are rounded, not truncated, to bytes; and nothing that is loaded
wants gradients until told to. Where weights come alone, their shapes tell the architecture: heads have 64 features.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nanodiffusion import noise, sampler
from nanodiffusion.codec import SDXL_VAE, AutoencoderKL, AutoencoderKLConfig
from nanodiffusion.data.conditioning import to_unit
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.guidance import bind, cfg
from nanodiffusion.nets.adapter import ADAPTER_SDXL, Adapter, AdapterConfig
from nanodiffusion.nets.controlnet import Controlled, ControlNet, ControlNetConfig, control_strengths
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.nets.sd_layers import Run, call, recompute
from nanodiffusion.nets.sd_unet import SDXL, SDUNet, SDUNetConfig
from nanodiffusion.pretrained import Part
from nanodiffusion.pretrained import architecture as arch
from nanodiffusion.pretrained.hub import locate
from nanodiffusion.pretrained.weights import load as load_weights
from nanodiffusion.pretrained.weights import source_of
from nanodiffusion.show import to_uint8
from nanodiffusion.text import CLIP_BIGG, CLIP_L, CLIPText, CLIPTokenizer, TextConfig
from nanodiffusion.text.prompts import TextEncoder, TextPart

__all__ = [
    "SDXLAdapter",
    "SDXLCLIPOne",
    "SDXLCLIPTwo",
    "SDXLControlNet",
    "SDXLUNet",
    "SDXLUNetInpainting",
    "SDXLUNetInpaintingCrossAttentionConditioning",
    "SDXLVae",
    "euler_ode_solver",
    "heun_ode_solver",
    "make_clip_tokenizer",
    "make_clip_tokenizer_from_hub",
    "make_clip_tokenizer_one",
    "make_clip_tokenizer_one_from_hub",
    "make_clip_tokenizer_two",
    "make_clip_tokenizer_two_from_hub",
    "make_sigmas",
    "rk4_ode_solver",
    "sdxl_diffusion_loop",
    "sdxl_eps_theta",
    "sdxl_eps_theta_",
    "sdxl_eps_theta_controlnet",
    "sdxl_eps_theta_unet_inpainting",
    "sdxl_eps_theta_unet_inpainting_cross_attention_conditioning",
    "sdxl_text_conditioning",
    "set_attention_checkpoint_kv",
    "set_attention_implementation",
    "set_with_tqdm",
]

BASE, FP16_FIX = "stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix"
SIDE = 128  # of the latent, where neither x_T nor a control image tells it
FACTOR = 2 ** (len(SDXL_VAE.widths) - 1)  # pixels per latent pixel
MICRO_CONDITIONING = (1024, 1024, 0, 0, 1024, 1024)
STEPS = 50
INPAINT, CONTROL = replace(SDXL, channels_in=9), ControlNetConfig(SDXL)
END_ID, BANG_ID = 49407, 0  # what pads the prompts of the two encoders

Device = str | int | torch.device
EpsTheta = Callable[..., Tensor]

# -- switches ------------------------------------------------------------------------------------------------------------


@dataclass
class _Switches:
    tqdm: bool = False
    checkpoint: bool = False


_switches = _Switches()


def set_attention_implementation(impl: str) -> None:
    """ "xformers" or "torch_2.0_scaled_dot_product": torch's own, whose fused kernels are those of both, serves either."""
    lookup(dict.fromkeys(("xformers", "torch_2.0_scaled_dot_product")), impl, "attention implementation")


def set_attention_checkpoint_kv(it: bool) -> None:
    """Whether U-Nets and ControlNets compute keys, values and all else in their blocks again for the gradient."""
    _switches.checkpoint = it


def set_with_tqdm(it: bool) -> None:
    """Whether the solvers show a progress bar."""
    _switches.tqdm = it


def _run(net: Any) -> Run:
    again = (net.checkpointing or _switches.checkpoint) and torch.is_grad_enabled()
    return recompute if again else call


# -- tokenizers ----------------------------------------------------------------------------------------------------------


class _Tokenizer(CLIPTokenizer):
    def encode_batch(self, texts: Iterable[str]) -> list[Any]:
        """One object per text whose `ids` are 77 numbers."""
        return [SimpleNamespace(ids=row) for row in self(list(texts)).tolist()]


def make_clip_tokenizer(vocab_file: str | Path, merges_file: str | Path, pad_token_id: int) -> CLIPTokenizer:
    """CLIP's tokenizer, 77 ids a text; the padding's own word ("!" for 0) stays an ordinary one in a text."""
    return _Tokenizer.from_files(vocab_file, merges_file, pad_token_id, special_pad=False)


def make_clip_tokenizer_one(vocab_file: str | Path, merges_file: str | Path) -> CLIPTokenizer:
    """The tokenizer of CLIP-L, padded by the end token."""
    return _Tokenizer.from_files(vocab_file, merges_file)


def make_clip_tokenizer_two(vocab_file: str | Path, merges_file: str | Path) -> CLIPTokenizer:
    """The tokenizer of OpenCLIP-bigG, padded by 0."""
    return make_clip_tokenizer(vocab_file, merges_file, BANG_ID)


def _vocabulary() -> tuple[Path, Path]:
    names = ("vocab.json", "merges.txt")
    folder = locate(f"{BASE}/tokenizer", lambda files: [name for name in names if name in files]).path
    return folder / names[0], folder / names[1]


def make_clip_tokenizer_one_from_hub() -> CLIPTokenizer:
    """`make_clip_tokenizer_one` with the vocabulary of SDXL base, from the hub or its cache."""
    return make_clip_tokenizer_one(*_vocabulary())


def make_clip_tokenizer_two_from_hub() -> CLIPTokenizer:
    """`make_clip_tokenizer_two` with the vocabulary of SDXL base, from the hub or its cache."""
    return make_clip_tokenizer_two(*_vocabulary())


def make_clip_tokenizer_from_hub(pad_token_id: int = END_ID) -> CLIPTokenizer:
    """`make_clip_tokenizer` with the vocabulary of SDXL base: a name that only that system's README has."""
    return make_clip_tokenizer(*_vocabulary(), pad_token_id)


# -- nets ----------------------------------------------------------------------------------------------------------------


class _Published(nn.Module):
    """What all nets here share. A class names the core's net that it is, and how layouts calls and describes it."""

    _core: type[nn.Module]
    _component: str
    _words: str
    _of_shapes: Callable[[Mapping[str, tuple[int, ...]]], Any]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def core(self) -> Any:
        """The same net, with the same tensors, called as the core calls it."""
        view = copy.copy(self)
        view.__class__ = self._core  # type: ignore[assignment]
        return view

    @classmethod
    def load(cls, load_from: str | Path, device: Device = "cpu", strict: bool = True) -> Self:
        """The net with the weights of a safetensors file, in the file's dtype; its shapes tell the architecture.

        strict=False lets names be missing, whose weights then start at random, or superfluous. UserError: another file.
        """
        source = source_of(load_from)
        if strict:
            part = Part(cls._component, cls._words, source, None)
            config = part.described(cls._of_shapes)
            return part.load(lambda: cls(config), None, torch.device(device))
        tensors = source.tensors()
        net = cls(cls._of_shapes(source.shapes))
        net.load_state_dict(tensors, strict=False)
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
        return net.to(device, dtype).eval().requires_grad_(False)


class _OfBase(_Published):
    """A part of SDXL base, which it finds on the hub."""

    _file: str

    @classmethod
    def load_fp32(cls, device: Device = "cpu") -> Self:
        """That of SDXL base, from the hub or its cache."""
        return cls.load(_from_hub(BASE, f"{cls._file}.safetensors"), device)

    @classmethod
    def load_fp16(cls, device: Device = "cpu") -> Self:
        """The same in half precision."""
        return cls.load(_from_hub(BASE, f"{cls._file}.fp16.safetensors"), device)


def _from_hub(name: str, file: str) -> Path:
    return locate(f"{name}/{file}", list).path


class _CLIP(_OfBase, CLIPText):
    _core, _component, _words = CLIPText, "text", "CLIP text encoder"

    def forward(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        encoded = CLIPText.forward(self, input_ids)
        return encoded.pooled, list(encoded.layers[1:])


class SDXLCLIPOne(_CLIP):
    """CLIP-L: ids (b n) -> pooled (b d), the output of every layer (b n d)."""

    _file, _of_shapes = "text_encoder/model", staticmethod(partial(arch.text_of_shapes, activation=CLIP_L.activation))

    def __init__(self, config: TextConfig = CLIP_L) -> None:
        super().__init__(config)


class SDXLCLIPTwo(_CLIP):
    """OpenCLIP-bigG, whose pooled output is projected: ids (b n) -> pooled (b p), the output of every layer (b n d)."""

    _file, _of_shapes = (
        "text_encoder_2/model",
        staticmethod(partial(arch.text_of_shapes, activation=CLIP_BIGG.activation)),
    )

    def __init__(self, config: TextConfig = CLIP_BIGG) -> None:
        super().__init__(config)


def sdxl_text_conditioning(
    text_encoder_one: SDXLCLIPOne, text_encoder_two: SDXLCLIPTwo, text_input_ids_one: Tensor, text_input_ids_two: Tensor
) -> tuple[Tensor, Tensor]:
    """What both encoders give to the U-Net: ids (b n) of each -> context (b n d), pooled (b p)."""
    _, one = text_encoder_one(text_input_ids_one)
    pooled, two = text_encoder_two(text_input_ids_two)
    return torch.cat([one[-2], two[-2]], dim=2), pooled


class SDXLVae(_Published, AutoencoderKL):
    """SDXL's autoencoder; its latents are scaled. `core.encode` takes noise instead of a generator."""

    _core, _component, _words = AutoencoderKL, "vae", "KL autoencoder"
    _of_shapes = staticmethod(partial(arch.vae_of_shapes, scale=SDXL_VAE.scale))

    def __init__(self, config: AutoencoderKLConfig = SDXL_VAE) -> None:
        super().__init__(config)

    @classmethod
    def load_fp16_fix(cls, device: Device = "cpu") -> Self:
        """The variant that half precision can run, from the hub or its cache; its weights are float32."""
        return cls.load(_from_hub(FP16_FIX, "diffusion_pytorch_model.safetensors"), device)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:  # type: ignore[override]
        """A sample of the latents of an image: (b 3 H W) in [-1, 1] -> (b c h w)."""
        shape = (len(x), self.latent_channels, *(side // self.factor for side in x.shape[2:]))
        return AutoencoderKL.encode(self, x, _normal(shape, generator, x.device, self.dtype))

    @staticmethod
    def input_pil_to_tensor(x: Any, include_batch_dim: bool = True) -> Tensor:
        """A PIL image, or bytes (h w 3) -> (1 3 h w) float32 in [-1, 1]; without the 1 if so told."""
        image = to_unit(x) * 2 - 1
        return image if include_batch_dim else image[0]

    @staticmethod
    def output_tensor_to_pil(x_pred: Tensor) -> list[Image.Image]:
        """Images (b 3 h w), about [-1, 1] -> PIL images."""
        return [Image.fromarray(picture) for picture in to_uint8(x_pred).cpu().numpy()]


class SDXLUNet(_OfBase, SDUNet):
    """SDXL's U-Net. x_t is already divided by sqrt(sigma^2 + 1)."""

    _core, _component, _words, _file = SDUNet, "unet", "U-Net", "unet/diffusion_pytorch_model"
    _of_shapes = staticmethod(arch.unet_of_shapes)
    run = property(_run)

    def __init__(self, config: SDUNetConfig = SDXL) -> None:
        super().__init__(config)

    def forward(  # type: ignore[override]
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        micro_conditioning: Tensor,
        pooled_encoder_hidden_states: Tensor,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        add_to_down_block_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """eps: x_t (b c h w), t (1) or (b), context (b m d), sizes (b 6), pooled (b p) -> (b c h w)."""
        middle = mid_block_additional_residual
        residuals = () if middle is None else (*(down_block_additional_residuals or ()), middle)
        given = (encoder_hidden_states, pooled_encoder_hidden_states, micro_conditioning)
        features = add_to_down_block_outputs or ()
        return SDUNet.forward(self, x_t, t.expand(len(x_t)), *given, features=features, residuals=residuals)


class SDXLUNetInpainting(SDXLUNet):
    """SDXL's U-Net told mask and masked latent in 5 channels more of x_t, which start at zero where the file has 4."""

    def __init__(self, config: SDUNetConfig = INPAINT) -> None:
        super().__init__(config)

    @classmethod
    def load(cls, load_from: str | Path, device: Device = "cpu", strict: bool = True) -> Self:
        """As SDXLUNet's, of 9 channels or of 4."""
        net = super().load(load_from, device, strict)
        c = net.config
        if c.channels_in > c.channels_out:
            return net
        with torch.device("meta"):
            wide = cls(replace(c, channels_in=2 * c.channels_out + 1))
        more = net.conv_in.weight.new_zeros(c.widths[0], c.channels_out + 1, 3, 3)
        weights = {**net.state_dict(), "conv_in.weight": torch.cat([net.conv_in.weight, more], dim=1)}
        wide.load_state_dict(weights, assign=True)
        return wide.eval().requires_grad_(False)


class SDXLUNetInpaintingCrossAttentionConditioning(SDXLUNet):
    """SDXL's U-Net told mask and masked latent as further tokens of the context, one per pixel."""

    positions = False

    def __init__(self, config: SDUNetConfig = SDXL) -> None:
        super().__init__(config)
        tokens = InpaintTokens(config.context_dim, config.channels_out)
        self.conditioning_image_proj = tokens.conditioning_image_proj
        self.conditioning_image_mask_embeddings = tokens.conditioning_image_mask_embeddings

    @classmethod
    def load(cls, load_from: str | Path, device: Device = "cpu", strict: bool = True) -> Self:
        """Its own file, or with strict=False SDXL's U-Net, beside which the tokens start at random."""
        if not strict:
            return super().load(load_from, device, strict)
        source = source_of(load_from)
        return load_weights(lambda: cls(arch.unet_of_shapes(source.shapes)), source, None, torch.device(device))

    @classmethod
    def load_fp32(cls, device: Device = "cpu") -> Self:
        """SDXL base's U-Net and new tokens."""
        return cls.load(_from_hub(BASE, f"{cls._file}.safetensors"), device, strict=False)

    @classmethod
    def load_fp16(cls, device: Device = "cpu") -> Self:
        """The same in half precision."""
        return cls.load(_from_hub(BASE, f"{cls._file}.fp16.safetensors"), device, strict=False)

    def context(self, text: Tensor, conditioning_image: Tensor, conditioning_image_mask: Tensor) -> Tensor:
        """The text's tokens (b m d), then the picture's: latent (b c h w), mask (b 1 h w) -> (b m+h*w d)."""
        more = InpaintTokens.forward(self, conditioning_image, conditioning_image_mask)  # type: ignore[arg-type]
        return torch.cat([text, more.to(text).expand(len(text), -1, -1)], dim=1)

    def forward(  # type: ignore[override]
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        micro_conditioning: Tensor,
        pooled_encoder_hidden_states: Tensor,
        conditioning_image: Tensor,
        conditioning_image_mask: Tensor,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        add_to_down_block_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """eps, as SDXLUNet's: conditioning_image, the masked latent (b c h w), and its mask (b 1 h w) beside."""
        context = self.context(encoder_hidden_states, conditioning_image, conditioning_image_mask)
        added = (down_block_additional_residuals, mid_block_additional_residual, add_to_down_block_outputs)
        return super().forward(x_t, t, context, micro_conditioning, pooled_encoder_hidden_states, *added)


class _Guest(ControlNet):
    """A ControlNet in its own precision beside a U-Net in another."""

    def forward(self, x: Tensor, t: Tensor, hint: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        dtype = self.conv_in.weight.dtype
        own = [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in (hint, *given)]
        return tuple(residual.to(x.dtype) for residual in super().forward(x.to(dtype), t, *own))  # type: ignore[arg-type]


class SDXLControlNet(_Published, ControlNet):
    """SDXL's ControlNet. x_t is already divided by sqrt(sigma^2 + 1); `from_unet` copies the encoder of a U-Net."""

    _core, _component, _words = _Guest, "controlnet", "ControlNet"
    _of_shapes = staticmethod(arch.controlnet_of_shapes)
    run = property(_run)

    def __init__(self, config: ControlNetConfig = CONTROL) -> None:
        super().__init__(config)

    def forward(  # type: ignore[override]
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        micro_conditioning: Tensor,
        pooled_encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
    ) -> dict[str, Any]:
        """Residuals of the skips and the middle: as SDXLUNet's, and an image (b 3 H W) in [0, 1]."""
        given = (encoder_hidden_states, pooled_encoder_hidden_states, micro_conditioning)
        hint = ControlNet.embed(self, controlnet_cond)
        *skips, middle = ControlNet.forward(self, x_t, t.expand(len(x_t)), hint, *given)
        return {"down_block_res_samples": skips, "mid_block_res_sample": middle}


class SDXLAdapter(_Published, Adapter):
    """SDXL's T2I-Adapter: image (b 3 H W) in [0, 1] -> four maps for `add_to_down_block_outputs`."""

    _core, _component, _words = Adapter, "adapter", "T2I-Adapter"
    _of_shapes = staticmethod(arch.adapter_of_shapes)

    def __init__(self, config: AdapterConfig = ADAPTER_SDXL) -> None:
        super().__init__(config)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return list(Adapter.forward(self, x))


# -- levels and solvers --------------------------------------------------------------------------------------------------


def make_sigmas(
    beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000, device: Device | None = None
) -> Tensor:
    """SDXL's noise levels, increasing: -> (n) float32."""
    return noise.ldm(num_train_timesteps, beta_start, beta_end).sigmas.float().to(device)


def euler_ode_solver(eps_theta: EpsTheta, timesteps: Tensor, sigmas: Tensor, x_T: Tensor) -> Tensor:
    """x (b ...) at sigma 0 by Euler steps down sigmas[timesteps]; eps_theta(x_t=, t=, sigma=) with t and sigma (1)."""
    return _solve(sampler.euler, eps_theta, timesteps, sigmas, x_T)


def heun_ode_solver(eps_theta: EpsTheta, timesteps: Tensor, sigmas: Tensor, x_T: Tensor) -> Tensor:
    """The same by Heun's steps, the last by Euler's."""
    return _solve(sampler.heun, eps_theta, timesteps, sigmas, x_T)


def rk4_ode_solver(eps_theta: EpsTheta, timesteps: Tensor, sigmas: Tensor, x_T: Tensor) -> Tensor:
    """The same by Runge-Kutta steps of order 4, the last by Euler's; between two levels t is fractional."""
    return _solve(sampler.rk4, eps_theta, timesteps, sigmas, x_T)


def _solve(step: sampler.Step, eps_theta: EpsTheta, timesteps: Tensor, sigmas: Tensor, x_T: Tensor) -> Tensor:
    table, times = _levels(sigmas, timesteps)
    ladder = noise.given_sigmas(table[times])
    # where rounding has made neighbours equal, this still tells them apart
    known = dict(zip(ladder.tolist(), times.tolist()))

    def D(x: Tensor, level: Tensor) -> Tensor:
        s = float(level[0])
        t = known.get(s, np.interp(s, table.numpy(), np.arange(len(table))))
        at = torch.tensor([t], dtype=torch.int64 if isinstance(t, int) else torch.float32, device=x.device)
        return x - s * eps_theta(x_t=x, t=at, sigma=torch.tensor([s], dtype=x.dtype, device=x.device))

    x = x_T
    for state in tqdm(sampler.sample(D, x_T, ladder, step), total=len(times), disable=not _switches.tqdm):
        x = state.x
    return x.to(x_T.dtype)


def _levels(sigmas: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """All levels (n) float64 and the indices (k) of those to visit, falling, on the CPU; UserError on other indices."""
    table, times = sigmas.detach().double().cpu(), timesteps.detach().cpu()
    if times.ndim != 1 or times.is_floating_point() or not len(times) or times.min() < 0 or times.max() >= len(table):
        found = times.flatten()[:6].tolist()
        expected = f"whole numbers from 0 to {len(table) - 1}"
        raise UserError("timesteps are indices into sigmas", key="timesteps", expected=expected, found=found)
    return table, times.sort(descending=True).values


def _normal(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Unit noise drawn where the generator is."""
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)


# -- eps by the core's denoiser and guidance -----------------------------------------------------------------------------

Text = tuple[Tensor, Tensor]  # context (b m d), pooled (b p)


class _EpsTheta:
    """eps_theta(x_t (b c h w), t and sigma (1) or (b)) -> (b c h w), guided; everything else is prepared once."""

    def __init__(self, net: nn.Module, cond: dict[str, Any], uncond: dict[str, Any] | None, scale: float) -> None:
        self.t = self.sigma = torch.zeros(1)
        self.denoiser = Denoiser(net, "eps", self._clock)
        self.guided = bind(self._eps, cond) if uncond is None else cfg(self._eps, cond, uncond, scale)

    def _clock(self, sigma: Tensor) -> Tensor:
        wide = torch.promote_types(sigma.dtype, torch.float32)  # bfloat16 would make 1,000 of 999
        return _repeat(self.t, len(sigma)).to(sigma.device, wide)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
        self.t, self.sigma = t.reshape(-1), sigma.reshape(-1)
        # eps is affine in D at one level, so that the core's guidance serves it as it is; the level here plays no part
        return self.guided(x_t, torch.ones(len(x_t)))

    def _eps(self, x: Tensor, _: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self.denoiser.raw(x, _repeat(self.sigma, len(x)).to(x), cond)


def _repeat(values: Tensor, n: int) -> Tensor:
    return values.repeat(n // len(values))


def _prepare(
    unet: SDXLUNet, shared: dict[str, Any], text: Text, negative: Text | None, scale: float, controlnet: Any = None
) -> _EpsTheta:
    """shared: what cond and uncond have in common; negative None: zeros."""
    net = unet.core if controlnet is None else Controlled(unet.core, [controlnet.core])
    cond = {**shared, **_named(unet, text)}
    if scale <= 1:
        return _EpsTheta(net, cond, None, scale)
    other = _named(unet, negative or (torch.zeros_like(text[0]), torch.zeros_like(text[1])))
    if any(other[key].shape[1:] != cond[key].shape[1:] for key in other):
        expected, found = (tuple(c["context"].shape) for c in (cond, other))
        raise UserError("prompts and negative ones differ in shape", expected=expected, found=found)
    return _EpsTheta(net, cond, {**shared, **{k: _rows(v, len(cond[k]), "negative") for k, v in other.items()}}, scale)


def _named(unet: SDXLUNet, text: Text) -> dict[str, Any]:
    return {key: value.to(unet.device, unet.dtype) for key, value in zip(("context", "pooled"), text)}


def _rows(x: Tensor, b: int, key: str) -> Tensor:
    if len(x) not in (1, b):
        raise UserError("one for all pictures, or one each", key=key, expected=f"1 or {b}", found=len(x))
    return x.expand(b, *x.shape[1:])


def _shared(
    unet: SDXLUNet,
    b: int,
    micro_conditioning: Any,
    controlnet: SDXLControlNet | None = None,
    image: Tensor | None = None,
    maps: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """cond of b pictures beside the text: sizes, of a ControlNet the hint and strengths, of an adapter the features."""
    sizes = torch.as_tensor(micro_conditioning).to(unet.device, torch.int64)
    shared: dict[str, Any] = {"sizes": _rows(sizes.reshape(-1, sizes.shape[-1]), b, "micro_conditioning")}
    if controlnet is not None:
        hint = controlnet.embed(_image(image).to(controlnet.device)).to(unet.device)
        strengths = control_strengths(1.0, b, controlnet.count).to(unet.device)
        shared |= {"hints": (_rows(hint, b, "images"),), "strengths": (strengths,)}
    if maps is not None:
        shared["features"] = tuple(_rows(m.to(unet.device, unet.dtype), b, "images") for m in maps)
    return shared


@torch.no_grad()
def sdxl_eps_theta(
    x_t: Tensor,
    t: Tensor,
    sigma: Tensor,
    unet: SDXLUNet,
    encoder_hidden_states: Tensor,
    pooled_encoder_hidden_states: Tensor,
    negative_encoder_hidden_states: Tensor | None,
    negative_pooled_encoder_hidden_states: Tensor | None,
    micro_conditioning: Tensor,
    guidance_scale: float,
    controlnet: SDXLControlNet | None = None,
    controlnet_cond: Tensor | None = None,
    add_to_down_block_outputs: Sequence[Tensor] | None = None,
) -> Tensor:
    """eps of x_t (b c h w) at level sigma and its index t, (1) or (b), under guidance u + scale (c - u) if scale > 1.

    Negative embeddings of None are zeros. controlnet_cond (b 3 H W) in [0, 1]; the last: an adapter's maps.
    """
    shared = _shared(unet, len(x_t), micro_conditioning, controlnet, controlnet_cond, add_to_down_block_outputs)
    text = (encoder_hidden_states, pooled_encoder_hidden_states)
    negative = _pair(negative_encoder_hidden_states, negative_pooled_encoder_hidden_states)
    return _prepare(unet, shared, text, negative, guidance_scale, controlnet)(x_t, t, sigma)


def _pair(context: Tensor | None, pooled: Tensor | None) -> Text | None:
    """Both or neither."""
    if context is None or pooled is None:
        if context is not pooled:
            raise UserError(
                "embeddings come as a pair",
                key="pooled_encoder_hidden_states",
                expected="both of encoder_hidden_states and pooled_encoder_hidden_states, or neither",
            )
        return None
    return context, pooled


# The same with fewer arguments: the U-Net alone, and with a ControlNet.
sdxl_eps_theta_ = sdxl_eps_theta_controlnet = sdxl_eps_theta


@torch.no_grad()
def sdxl_eps_theta_unet_inpainting(
    x_t: Tensor,
    t: Tensor,
    sigma: Tensor,
    unet: SDXLUNetInpainting,
    encoder_hidden_states: Tensor,
    pooled_encoder_hidden_states: Tensor,
    negative_encoder_hidden_states: Tensor | None,
    negative_pooled_encoder_hidden_states: Tensor | None,
    micro_conditioning: Tensor,
    inpainting_conditioning: Tensor,
    guidance_scale: float = 5.0,
) -> Tensor:
    """`sdxl_eps_theta` of the 9-channel U-Net: inpainting_conditioning is mask ++ masked latent (b 5 h w)."""
    concat = _rows(inpainting_conditioning.to(unet.device, unet.dtype), len(x_t), "inpainting_conditioning")
    shared = {**_shared(unet, len(x_t), micro_conditioning), "concat": concat}
    text = (encoder_hidden_states, pooled_encoder_hidden_states)
    negative = _pair(negative_encoder_hidden_states, negative_pooled_encoder_hidden_states)
    return _prepare(unet, shared, text, negative, guidance_scale)(x_t, t, sigma)


@torch.no_grad()
def sdxl_eps_theta_unet_inpainting_cross_attention_conditioning(
    x_t: Tensor,
    t: Tensor,
    sigma: Tensor,
    unet: SDXLUNetInpaintingCrossAttentionConditioning,
    encoder_hidden_states: Tensor,
    pooled_encoder_hidden_states: Tensor,
    negative_encoder_hidden_states: Tensor | None,
    negative_pooled_encoder_hidden_states: Tensor | None,
    micro_conditioning: Tensor,
    conditioning_image: Tensor,
    conditioning_image_mask: Tensor,
    guidance_scale: float = 5.0,
) -> Tensor:
    """`sdxl_eps_theta` with the masked latent (b c h w) and mask (b 1 h w) in the context, without a prompt too."""
    shared = _shared(unet, len(x_t), micro_conditioning)
    text = (encoder_hidden_states, pooled_encoder_hidden_states)
    negative = _pair(negative_encoder_hidden_states, negative_pooled_encoder_hidden_states)
    both = (text, negative or (torch.zeros_like(text[0]), torch.zeros_like(text[1])))
    cond, uncond = ((unet.context(c, conditioning_image, conditioning_image_mask), pooled) for c, pooled in both)
    return _prepare(unet, shared, cond, uncond, guidance_scale)(x_t, t, sigma)


# -- the loop ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sdxl_diffusion_loop(
    prompts: str | Sequence[str] | None = None,
    unet: Any = None,
    tokenizer_one: CLIPTokenizer | None = None,
    text_encoder_one: SDXLCLIPOne | None = None,
    tokenizer_two: CLIPTokenizer | None = None,
    text_encoder_two: SDXLCLIPTwo | None = None,
    images: Tensor | None = None,
    controlnet: SDXLControlNet | None = None,
    adapter: SDXLAdapter | None = None,
    sigmas: Tensor | None = None,
    timesteps: Tensor | None = None,
    x_T: Tensor | None = None,
    micro_conditioning: Tensor | None = None,
    guidance_scale: float = 5.0,
    generator: torch.Generator | None = None,
    negative_prompts: str | Sequence[str] | None = None,
    sampler: Callable[..., Tensor] = euler_ode_solver,
    encoder_hidden_states: Tensor | None = None,
    pooled_encoder_hidden_states: Tensor | None = None,
) -> Tensor:
    """Latents (b 4 h w) of b prompts, or of given embeddings (b m d) and (b p), for `SDXLVae.decode`.

    images (1 or b, 3, H, W) in [0, 1]: of controlnet and adapter, which may act together. sigmas (n) increasing, in any
    precision; timesteps (k), indices into them, by default 50 evenly spaced. x_T (b 4 h w): unit noise times
    sqrt(sigmas[last]^2 + 1), by default drawn by the generator, on any device. micro_conditioning (1 or b, 6): height and
    width before cropping, top, left, height, width; by default for 1024. Guidance is u + scale (c - u) if the scale is
    above 1; u is of the negative prompts, else of zeros. sampler(eps_theta=, timesteps=, sigmas=, x_T=).
    """
    encoders = (tokenizer_one, text_encoder_one, tokenizer_two, text_encoder_two)
    given = _pair(encoder_hidden_states, pooled_encoder_hidden_states)
    text, negative = _text(prompts, negative_prompts if guidance_scale > 1 else None, encoders, given)
    sizes = MICRO_CONDITIONING if micro_conditioning is None else micro_conditioning
    shared = _shared(_unet(unet), len(text[0]), sizes, controlnet, images, _maps(adapter, images))
    eps_theta = _prepare(unet, shared, text, negative, guidance_scale, controlnet)
    sigmas, timesteps = _defaults(unet, sigmas, timesteps)
    start = _start(unet, len(text[0]), images, sigmas, timesteps, generator) if x_T is None else x_T
    x_0 = sampler(eps_theta=eps_theta, timesteps=timesteps, sigmas=sigmas, x_T=start.to(unet.device))
    return x_0.to(unet.dtype if x_T is None else x_T.dtype)


def _unet(unet: SDXLUNet | None) -> SDXLUNet:
    if unet is None:
        raise UserError("there is no U-Net", key="unet", found="None", fix="unet=SDXLUNet.load_fp32()")
    return unet


def _defaults(unet: SDXLUNet, sigmas: Tensor | None, timesteps: Tensor | None) -> tuple[Tensor, Tensor]:
    sigmas = make_sigmas(device=unet.device) if sigmas is None else sigmas
    every = partial(torch.linspace, 0, len(sigmas) - 1, STEPS, dtype=torch.int64, device=unet.device)
    return sigmas, every() if timesteps is None else timesteps


def _maps(adapter: SDXLAdapter | None, images: Tensor | None) -> list[Tensor] | None:
    if adapter is None:
        return None
    return adapter(_image(images).to(adapter.device))


def _image(image: Tensor | None) -> Tensor:
    if image is None:
        fix = "images=tensor (b 3 H W) in [0, 1]"
        raise UserError("a ControlNet or adapter needs an image", key="images", found="None", fix=fix)
    return image


def _start(
    unet: SDXLUNet,
    b: int,
    images: Tensor | None,
    sigmas: Tensor,
    timesteps: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """What a variance-preserving process ends in, in float32; the noise is drawn in the U-Net's own dtype."""
    table, times = _levels(sigmas, timesteps)
    size = (SIDE, SIDE) if images is None else tuple(side // FACTOR for side in images.shape[-2:])
    unit = _normal((b, unet.config.channels_out, *size), generator, unet.device, unet.dtype)
    return unit.float() * float(table[times[0]].square() + 1) ** 0.5


def _text(prompts: Any, negative: Any, encoders: Sequence[Any], given: Text | None) -> tuple[Text, Text | None]:
    """The prompts' embeddings, or those given, and the negative prompts', or None."""
    if given is None and prompts is None:
        raise UserError("there is no prompt", key="prompts", expected="a text, a list of texts, or embeddings")
    if given is None:
        cond, uncond = _encoder(encoders).encode(prompts, negative, emphasis="off", max_chunks=1)
    else:
        cond = {"context": given[0], "pooled": given[1]}
        uncond = None if negative is None else _encoder(encoders).encode(negative, emphasis="off", max_chunks=1)[0]
    return _both(cond), None if uncond is None else _both(uncond)


def _both(cond: Mapping[str, Tensor]) -> Text:
    return cond["context"], cond["pooled"]


def _encoder(encoders: Sequence[Any]) -> TextEncoder:
    names = ("tokenizer_one", "text_encoder_one", "tokenizer_two", "text_encoder_two")
    missing = [name for name, part in zip(names, encoders) if part is None]
    if missing:
        raise UserError("prompts need both tokenizers and text encoders", key=missing[0], found="None")
    one, net_one, two, net_two = encoders
    parts = [TextPart(one, net_one.core, -2, False), TextPart(two, net_two.core, -2, False, pooled=True)]
    return TextEncoder(parts)
