"""Any latent diffusion model that the package diffusers loads, as this library's denoiser and codec, or smalldiffusion's model.

    python examples/diffusers_wrapper.py [MODEL ["PROMPT"]]      writes sample.png; needs diffusers and transformers

The networks stay diffusers' own: wrapped, they are called as ours are, so every sampler, ladder and guidance here works on
them. For Stable Diffusion and SDXL `nanodiffusion.pretrained.load.load_pretrained` gives the same numbers without diffusers.

text_guidance_scale is the usual one, D_u + scale (D_c - D_u), and 1 is none; in smalldiffusion's wrapper, where it was added
to 1, the same picture takes a scale smaller by one.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.compat.smalldiffusion import ModelMixin, ScheduleLDM, samples
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.distributed import pick_device
from nanodiffusion.errors import UserError, need
from nanodiffusion.guidance import bind, cfg
from nanodiffusion.pretrained.scheduler_config import read_scheduler
from nanodiffusion.show import grid


class DiffusersNet(nn.Module):
    """diffusers' U-Net called as ours: x (b c h w), t (b), context (b m d), pooled (b p), sizes (b 6) -> (b c h w)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(x, t, context, added_cond_kwargs=added, return_dict=False)[0]


class DiffusersCodec(nn.Module):
    """diffusers' VAE called as our codecs: scale and shift, from its config, are inside."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae, c = vae, vae.config
        self.scale, self.shift = c.scaling_factor, c.get("shift_factor") or 0.0
        self.factor = 2 ** (len(c.block_out_channels) - 1)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """x0 of an image, the mean's without noise: (b 3 H W) in [-1, 1], noise (b c h w) -> (b c h w)."""
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return ((z - self.shift) * self.scale).to(image.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        """The image of latents, about [-1, 1]: (b c h w) -> (b 3 H W)."""
        z = x0 / self.scale + self.shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.to(x0.dtype)


class ModelLatentDiffusion(nn.Module, ModelMixin):
    """A pretrained model by its name on the hub or its folder: `denoiser`, `codec` and `schedule` are this library's.

    As smalldiffusion's model it is called with x = x0 + sigma eps and gives eps, guided by `set_text_condition`; bound
    for this library's samplers it is `denoise`. Any batch and size of picture.
    """

    def __init__(self, model_key: str | Path, accelerator: Any = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        device = pick_device() if accelerator is None else accelerator.device
        self.pipe = load_pipeline(model_key).to(device, dtype)
        unet = self.pipe.unet
        self.schedule, prediction = read_scheduler(dict(self.pipe.scheduler.config), Path(model_key))
        self.denoiser = Denoiser(DiffusersNet(unet), prediction, "table", self.schedule)
        self.codec = DiffusersCodec(self.pipe.vae)
        self.input_dims = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.conds: list[dict[str, Tensor]] = []
        self.scale = 1.0
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def set_text_condition(
        self, prompt: str | list[str], negative_prompt: str = "", text_guidance_scale: float = 7.5
    ) -> None:
        """What to show, one prompt or one per picture, what not to, and the guidance scale, of which 1 is none."""
        wanted = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "device": self.pipe.device}
        against = [negative_prompt] * len(prompt) if isinstance(prompt, list) else negative_prompt
        found = self.pipe.encode_prompt(prompt=prompt, negative_prompt=against if negative_prompt else None, **wanted)
        names = ("context", "pooled")
        self.conds = [dict(zip(names, found[i::2])) for i in range(2)]  # diffusers returns cond, uncond, cond, uncond
        self.scale = text_guidance_scale

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x, text]: x (b c h w), sigma (b) -> (b c h w). UserError before there is a text."""
        if not self.conds:
            raise UserError("there is no prompt yet", key="prompt", fix="model.set_text_condition('a horse')")
        cond, uncond = ({key: self._rows(v, len(x)) for key, v in c.items()} | self._sizes(c, x) for c in self.conds)
        guided = bind(self.denoiser, cond) if self.scale == 1 else cfg(self.denoiser, cond, uncond, self.scale)
        return guided(x, sigma)

    def _rows(self, value: Tensor, b: int) -> Tensor:
        if len(value) not in (1, b):
            raise UserError("one prompt, or one per picture", key="prompt", expected=f"1 or {b}", found=len(value))
        return value.expand(b, *value.shape[1:])

    def _sizes(self, cond: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """SDXL is told the picture's size as the original's, uncropped, and as the one wanted."""
        h, w = (self.codec.factor * side for side in x.shape[2:])
        return {"sizes": torch.tensor([[h, w, 0, 0, h, w]] * len(x), device=x.device)} if "pooled" in cond else {}

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
        """eps of x (b c h w) at sigma () or (b 1 1 1) -> (b c h w); the text is not given here."""
        level = sigma.reshape(-1).expand(len(x))
        return (x - self.denoise(x, level)) / level[:, None, None, None]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images of latents, about [-1, 1]: (b c h w) -> (b 3 H W)."""
        return self.codec.decode(latents)


def load_pipeline(key: str | Path) -> Any:
    """diffusers' pipeline of a model, without the parts that only judge or read pictures."""
    pipeline = need("diffusers", "dev").DiffusionPipeline
    config = pipeline.load_config(key)
    unused = {part: None for part in ("safety_checker", "feature_extractor", "image_encoder") if part in config}
    unused |= {"requires_safety_checker": False} if "requires_safety_checker" in config else {}
    return pipeline.from_pretrained(key, **unused)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    schedule = ScheduleLDM(1000)
    model = ModelLatentDiffusion(given.get(1, "stabilityai/stable-diffusion-2-1-base"))
    model.set_text_condition(given.get(2, "An astronaut riding a horse"))
    *xts, x0 = samples(model, schedule.sample_sigmas(50))
    decoded = model.decode_latents(x0)
    grid(decoded.cpu(), scale=1).save("sample.png")
