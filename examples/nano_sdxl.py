"""SDXL in the names of williamberman's nano-diffusion: its README's inference sections, and the one it left empty.

    python examples/nano_sdxl.py basic      or: batched fp16 seeded heun timesteps controlnet adapter

Pictures go into the current folder. The weights come from the hub, or from its cache where there is no network. In the
environment, DEVICE says where to run (cuda) and SIZE how large the control pictures are, and what is made with them (1024).
Scripts written for that system only need their import lines changed, to the one below or to
`from nanodiffusion.compat.nano_sdxl import *`.
"""

import os
import sys
from typing import Any

import torch

from nanodiffusion.compat.nano_sdxl import (
    SDXLAdapter,
    SDXLCLIPOne,
    SDXLCLIPTwo,
    SDXLControlNet,
    SDXLUNet,
    SDXLVae,
    heun_ode_solver,
    make_clip_tokenizer_one_from_hub,
    make_clip_tokenizer_two_from_hub,
    make_sigmas,
    sdxl_diffusion_loop,
    set_with_tqdm,
)

device = os.environ.get("DEVICE", "cuda")
size = int(os.environ.get("SIZE", "1024"))


def load_fp32() -> tuple[dict[str, Any], SDXLVae]:
    """What every run needs, in full precision: the loop's arguments, and the VAE."""
    parts = {
        "unet": SDXLUNet.load_fp32(device=device),
        "tokenizer_one": make_clip_tokenizer_one_from_hub(),
        "text_encoder_one": SDXLCLIPOne.load_fp32(device=device),
        "tokenizer_two": make_clip_tokenizer_two_from_hub(),
        "text_encoder_two": SDXLCLIPTwo.load_fp32(device=device),
    }
    return parts, SDXLVae.load_fp16_fix(device=device)


def load_fp16() -> tuple[dict[str, Any], SDXLVae]:
    """The same in half precision. The VAE's weights are published in full precision, so it is cast by hand."""
    parts = {
        "unet": SDXLUNet.load_fp16(device=device),
        "tokenizer_one": make_clip_tokenizer_one_from_hub(),
        "text_encoder_one": SDXLCLIPOne.load_fp16(device=device),
        "tokenizer_two": make_clip_tokenizer_two_from_hub(),
        "text_encoder_two": SDXLCLIPTwo.load_fp16(device=device),
    }
    return parts, SDXLVae.load_fp16_fix(device=device).to(torch.float16)


def save(vae: SDXLVae, latents: torch.Tensor, name: str) -> None:
    """Latents (b 4 h w) as name_0.png, name_1.png, ..."""
    for i, picture in enumerate(vae.output_tensor_to_pil(vae.decode(latents))):
        picture.save(f"{name}_{i}.png")


def basic() -> None:
    """One prompt."""
    parts, vae = load_fp32()
    save(vae, sdxl_diffusion_loop("horse", **parts), "basic")


def batched() -> None:
    """Several prompts at once."""
    parts, vae = load_fp32()
    save(vae, sdxl_diffusion_loop(["horse", "cow", "dog"], **parts), "batched")


def fp16() -> None:
    """Half precision."""
    parts, vae = load_fp16()
    save(vae, sdxl_diffusion_loop("horse", **parts), "fp16")


def seeded() -> None:
    """The same picture every time."""
    parts, vae = load_fp32()
    generator = torch.Generator(device).manual_seed(0)
    save(vae, sdxl_diffusion_loop("horse", **parts, generator=generator), "seeded")


def heun() -> None:
    """A solver of second order: two evaluations a step."""
    parts, vae = load_fp32()
    save(vae, sdxl_diffusion_loop("horse", **parts, sampler=heun_ode_solver), "heun")


def timesteps() -> None:
    """20 steps instead of 50: timesteps are increasing indices into the noise levels."""
    parts, vae = load_fp32()
    unet = parts["unet"]
    sigmas = make_sigmas(device=unet.device).to(unet.dtype)
    steps = torch.linspace(0, len(sigmas) - 1, 20, dtype=torch.long, device=unet.device)
    save(vae, sdxl_diffusion_loop("horse", **parts, sigmas=sigmas, timesteps=steps), "timesteps")


def edges() -> torch.Tensor:
    """The edges of a photograph, white on black: (1 3 size size) in [0, 1]."""
    import cv2
    import numpy as np
    from huggingface_hub import hf_hub_download
    from PIL import Image

    file = hf_hub_download("williamberman/misc", "bright_room_with_chair.png", repo_type="dataset")
    photograph = np.array(Image.open(file).convert("RGB").resize((size, size)))
    lines = torch.from_numpy(cv2.Canny(photograph, 100, 200)).float() / 255
    return lines.expand(1, 3, -1, -1).to(device)


def controlnet() -> None:
    """A ControlNet draws along the edges."""
    from huggingface_hub import hf_hub_download

    parts, vae = load_fp32()
    file = hf_hub_download("diffusers/controlnet-canny-sdxl-1.0", "diffusion_pytorch_model.safetensors")
    net = SDXLControlNet.load(file, device=device)
    save(vae, sdxl_diffusion_loop("a beautiful room", **parts, controlnet=net, images=edges()), "controlnet")


def adapter() -> None:
    """A T2I-Adapter does it with a sixteenth of the weights, and once for all steps; it may join a ControlNet."""
    from huggingface_hub import hf_hub_download

    parts, vae = load_fp32()
    file = hf_hub_download("TencentARC/t2i-adapter-canny-sdxl-1.0", "diffusion_pytorch_model.safetensors")
    net = SDXLAdapter.load(file, device=device)
    save(vae, sdxl_diffusion_loop("a beautiful room", **parts, adapter=net, images=edges()), "adapter")


EXAMPLES = (basic, batched, fp16, seeded, heun, timesteps, controlnet, adapter)

if __name__ == "__main__":
    names = {example.__name__: example for example in EXAMPLES}
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python {sys.argv[0]} {' | '.join(names)}")
    set_with_tqdm(True)
    names[sys.argv[1]]()
