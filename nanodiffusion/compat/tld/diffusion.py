"""Pictures from a denoiser: tld.diffusion's DiffusionGenerator and DiffusionTransformer."""

import http.client
import math
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from nanodiffusion import denoiser as core
from nanodiffusion import noise, sampler
from nanodiffusion.compat import codecs
from nanodiffusion.compat.tld.configs import ClipConfig, DenoiserLoad, LTDConfig
from nanodiffusion.compat.tld.denoiser import Denoiser, read_weights
from nanodiffusion.distributed import pick_device
from nanodiffusion.draw import shifted
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import cfg, unconditional
from nanodiffusion.show import atomic, grid
from nanodiffusion.text.pooled import PooledText, open_text

T_MAX = 0.99  # the first noise level
CLIPS = {"ViT-L/14": "openai/clip-vit-large-patch14", "ViT-B/32": "openai/clip-vit-base-patch32"}


class _Told(nn.Module):
    """A model of that system as a core net: its clock has two axes and the net's precision."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
        return self.model(x, t[:, None].to(x.dtype), pooled)


def _net(model: Any) -> nn.Module:
    """The model as the core calls it; our own keeps its clock in full precision."""
    return model if "pooled" in getattr(model, "takes", ()) else _Told(model)


def make_ladder(n_iter: int, exponent: float = 1.0, noise_levels: Sequence[float] | None = None) -> Tensor:
    """The core's levels: of n_iter noise levels 1 - (k/n_iter)^exponent, or of those given, the first at most 0.99.

    noise_levels fall within (0, 1]; the 0 in which they end is added. -> (n_iter + 1) float64. UserError: they do not.
    """
    if noise_levels is None:
        return noise.power(noise.flow(), n_iter, exponent, T_MAX)
    t = torch.tensor([float(level) for level in noise_levels], dtype=torch.float64)
    t[:1] = t[:1].clamp(max=T_MAX)
    if len(t) < 1 or not bool((t.diff() < 0).all()) or not 0 <= float(t[-1]) <= float(t[0]):
        raise UserError("noise levels fall from 1 towards 0", key="noise_levels", found=list(noise_levels)[:6])
    return noise.given_sigmas(noise.flow_sigma(t))


@dataclass
class DiffusionGenerator:
    """Draws with a model and a VAE: a codec of ours, or diffusers'. model_dtype: what the model is cast to."""

    model: Any
    vae: Any
    device: torch.device | str
    model_dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        n_iter: int = 30,
        num_imgs: int = 16,
        class_guidance: float = 3,
        seed: int = 10,
        scale_factor: float = 8,
        img_size: int = 32,
        sharp_f: float = 0.1,
        bright_f: float = 0.1,
        exponent: float = 1,
        seeds: Tensor | None = None,
        noise_levels: Sequence[float] | None = None,
        use_ddpm_plus: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Images about [-1, 1] (b 3 H W) on the CPU, and their x0 (b c h w), of pooled texts labels (b d).

        DPM-Solver++(2M), or DDIM without use_ddpm_plus, guided on x0 away from zeros. seeds (b c h w): the noise to start
        from. sharp_f, bright_f: shifts of channels 3 and 0. UserError: as many labels as pictures are needed; the levels.
        """
        ladder = make_ladder(n_iter, exponent, noise_levels)
        shape = (getattr(self.model, "n_channels", 4), img_size, img_size)
        unit = sampler.ImageNoise(range(seed, seed + num_imgs)).draw(*shape) if seeds is None else seeds.float()
        if len(labels) != len(unit):
            raise UserError("every picture has a label of its own", key="labels", expected=len(unit), found=len(labels))
        model = self.model.to(self.device, self.model_dtype).eval()
        D = self._guided(model, labels.to(self.device, torch.float32), class_guidance)
        # It starts from x_t = eps at t = 0.99; the core's x is x_t / (1 - t) = (1 + sigma) x_t.
        x = (1 + float(ladder[0])) * unit.to(self.device)
        step = sampler.dpmpp_2m if use_ddpm_plus else sampler.euler
        *_, last = sampler.sample(D, x, ladder, step)
        x0 = shifted(last.x, bright_f, sharp_f)
        return codecs.decode(self.vae, x0 * scale_factor).cpu(), x0

    def pred_image(self, noisy_image: Tensor, labels: Tensor, noise_level: float, class_guidance: float) -> Tensor:
        """The guided x0 of x_t (b c h w) at one noise level, labels (b d) with as many zeros after them -> (b c h w)."""
        D = self._guided(self.model, labels[: len(noisy_image)].to(self.device), class_guidance)
        sigma = noise.flow_sigma(torch.full((len(noisy_image),), float(noise_level), dtype=torch.float64))
        return D((noisy_image.to(self.device) * (1 + sigma[0])).float(), sigma)

    def _guided(self, model: Any, labels: Tensor, scale: float) -> Any:
        D = core.Denoiser(_net(model), "x0_linear", "flow")
        cond = {"pooled": labels}
        return cfg(D, cond, unconditional(cond), scale)


def encode_text(label: str | Sequence[str], model: PooledText) -> Tensor:
    """Pooled texts by an encoder of `open_text`: one text or b -> (b d) float32 on the CPU."""
    return model.encode([label] if isinstance(label, str) else list(label))


def open_clip(config: ClipConfig, device: str | torch.device = "cpu") -> PooledText:
    """The text encoder that a config names, on a CPU in float32."""
    dtype = config.clip_dtype if torch.device(device).type == "cuda" else torch.float32
    return open_text(CLIPS.get(config.clip_model_name, config.clip_model_name), device, dtype)


def find_weights(load: DenoiserLoad) -> Path:
    """The file of weights, fetched where it is not there. UserError: none is named, or it cannot be had."""
    if not load.local_filename:
        fix = (
            'DenoiserLoad(local_filename="weights.safetensors"); DiffusionGenerator(Denoiser(...), ...) for random ones'
        )
        found = f"file_url={load.file_url!r} without a local_filename" if load.file_url else "neither"
        expected = "a local_filename, and a file_url where it is to be fetched"
        raise UserError(
            "no weights, which would give noise", key="denoiser_load", expected=expected, found=found, fix=fix
        )
    file = Path(load.local_filename)
    if not file.exists():
        if not load.file_url:
            raise UserError("there are no weights", file=file, key="local_filename", fix="file_url=..., where it is")
        download_file(load.file_url, file)
    return file


def download_file(url: str, filename: str | Path) -> None:
    """Fetch a file, which appears whole or not at all. UserError: it cannot be had."""
    with atomic(filename) as part, open(part, "wb") as out:
        for block in _blocks(url, filename):
            out.write(block)


def _blocks(url: str, filename: str | Path) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            while block := answer.read(1 << 20):
                yield block
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise UserError("the download failed", file=url, expected=f"a copy at {filename}", found=e) from None


class DiffusionTransformer:
    """Text to pictures: net, VAE and text encoder as an LTDConfig names them. UserError: no weights, not these weights."""

    def __init__(self, cfg: LTDConfig) -> None:
        device = pick_device()
        self.cfg, load = cfg, cfg.denoiser_load
        model = Denoiser(**asdict(cfg.denoiser_cfg))
        read_weights(model, find_weights(load))
        self.clip_model = open_clip(cfg.clip_cfg, device)
        self.diffuser = DiffusionGenerator(model, _open_vae(cfg, device), device, load.dtype)

    def generate_image_from_text(
        self,
        prompt: str,
        class_guidance: float = 6,
        seed: int = 11,
        num_imgs: int = 1,
        img_size: int | None = None,
        n_iter: int = 15,
    ) -> Image.Image:
        """A grid of pictures of a prompt; img_size in latent pixels, None for the net's own, another one resizes the net."""
        net = self.diffuser.model
        side = img_size or net.image_size
        out, _ = replace(self.diffuser, model=net.at_size(side)).generate(
            labels=encode_text([prompt] * num_imgs, self.clip_model),
            num_imgs=num_imgs,
            img_size=side,
            class_guidance=class_guidance,
            seed=seed,
            n_iter=n_iter,
            scale_factor=self.cfg.vae_cfg.vae_scale_factor,
            sharp_f=0,
            bright_f=0,
        )
        return grid(out.clamp(-1, 1), columns=max(1, math.isqrt(num_imgs)), scale=1)


def _open_vae(cfg: LTDConfig, device: torch.device) -> Any:
    if not cfg.vae_cfg.vae_name:
        from nanodiffusion.codec import PixelCodec

        return PixelCodec(cfg.denoiser_cfg.n_channels)
    from nanodiffusion.pretrained import load_codec  # slow to import

    return load_codec(cfg.vae_cfg.vae_name, cfg.vae_cfg.vae_dtype, str(device)).eval()
