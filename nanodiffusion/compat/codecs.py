"""Unscaled latents and images in [-1, 1], by a codec of ours or by a VAE of diffusers: whatever a script has loaded."""

from typing import Any

import torch
from torch import Tensor

from nanodiffusion.errors import UserError


def scaling(vae: Any) -> tuple[float, float]:
    """Scale and shift of x0 = (z - shift) * scale, by the names that codecs of ours and of diffusers give them."""
    config = getattr(vae, "config", None)
    value = lambda *names: next((v for name in names if (v := getattr(config, name, None)) is not None), None)
    return value("scale", "scaling_factor") or 1.0, value("shift", "shift_factor") or 0.0


def decode(vae: Any, z: Tensor) -> Tensor:
    """The images of unscaled latents, about [-1, 1]: z (b c h w) -> (b 3 H W) float32, where z is.

    UserError: vae is neither a codec nor a VAE.
    """
    _check(vae, "decode")
    scale, shift = scaling(vae)
    first = next(vae.parameters(), z)
    # A codec of ours takes x0 and unscales it itself; a VAE of diffusers takes z and answers with a record.
    given = ((z - shift) * scale if hasattr(vae, "factor") else z).to(first.device, first.dtype)
    out = vae.decode(given)
    return (out[0] if not torch.is_tensor(out) else out).to(z.device, torch.float32)


def encode(vae: Any, images: Tensor) -> Tensor:
    """Unscaled latents, a sample of the posterior (torch's generator draws): images (b 3 H W) in [-1, 1] -> (b c h w).

    UserError: vae is neither a codec nor a VAE; the image does not divide.
    """
    _check(vae, "encode")
    first = next(vae.parameters(), images)
    given = images.to(first.device, first.dtype)
    if not hasattr(vae, "factor"):
        return vae.encode(given).latent_dist.sample().to(images.device, torch.float32)
    scale, shift = scaling(vae)
    shape = (len(images), vae.latent_channels, *(side // vae.factor for side in images.shape[2:]))
    return (vae.encode(given, torch.randn(shape)) / scale + shift).to(images.device, torch.float32)


def _check(vae: Any, method: str) -> None:
    if not callable(getattr(vae, method, None)):
        raise UserError("this is no VAE", key="vae", expected=f"something with .{method}", found=type(vae).__name__)
