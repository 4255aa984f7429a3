"""SDXL's denoising loop with nothing hidden: 20 Euler steps for two prompts, every x on the way decoded into one picture.

    python examples/one_file_denoise.py [MODEL [VAE]]      by default SDXL base and the VAE that half precision can run

MODEL and VAE are names on the hub, folders, or files. DEVICE in the environment says where to run, SIZE how large the
pictures are (by default the model's own size). Writes trajectory.png: a row per prompt, from noise at the left.
"""

import os
import sys

import torch

from nanodiffusion.guidance import cfg, zeros_like_cond
from nanodiffusion.noise import given_timesteps
from nanodiffusion.pretrained import load_codec, load_pretrained
from nanodiffusion.sampler import ImageNoise, euler, sample, start
from nanodiffusion.show import grid

PROMPTS = ["A cat", "A dog"]
GUIDANCE = 5.0
STEPS = 20

given = dict(enumerate(sys.argv))
model = given.get(1, "stabilityai/stable-diffusion-xl-base-1.0")
vae = given.get(2, "madebyollin/sdxl-vae-fp16-fix")
device = os.environ.get("DEVICE", "auto")

bundle = load_pretrained(model, device=device)
codec = load_codec(vae, device=device, family="sdxl")
denoiser, where = bundle.denoiser, next(bundle.denoiser.parameters()).device
side = int(os.environ.get("SIZE", bundle.family.size))

# What the net is told: the text, and the sizes the picture shall seem to have had. Without a prompt SDXL knows zeros.
with torch.no_grad():
    cond, _ = bundle.text.encode(PROMPTS)
uncond = zeros_like_cond(cond)
sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(PROMPTS), device=where)
D = cfg(denoiser, {**cond, "sizes": sizes}, {**uncond, "sizes": sizes}, GUIDANCE)

# The levels at t = 999, 949, ..., 49, then 0; unit noise times the first of them.
ladder = given_timesteps(bundle.schedule, range(999, -1, -1000 // STEPS))
noise = ImageNoise([0, 1]).draw(codec.latent_channels, side // codec.factor, side // codec.factor)
x, ladder = start(ladder, noise)

# x moves toward D(x, sigma), the picture that the net expects: one state a step.
xs = [x.to(where)]
for state in sample(D, xs[0], ladder, euler):
    xs.append(state.x)
    print(f"step {state.step + 1:2}: sigma {state.sigma:.3f} -> {state.sigma_next:.3f}")

with torch.no_grad():
    pictures = torch.stack([codec.decode(x) for x in xs], dim=1)  # (prompts steps+1 3 H W)
grid(pictures.flatten(0, 1).cpu(), columns=len(xs), scale=1).save("trajectory.png")
