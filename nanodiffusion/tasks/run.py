"""Pictures from text, pictures, masks and controls: every task of Stable Diffusion as arguments of one function.

    for state in generate(bundle, "a castle by the sea", seed=7):
        ...
    pictures(bundle, state.x)[0].save("castle.png")

Each argument becomes a tensor of cond, a wrapper of the denoiser or another start on the ladder; the loop is the sampler's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nanodiffusion.draw import make_ladder, make_step, shifted
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import Bound, keep
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.noise import Schedule, given_sigmas, given_timesteps
from nanodiffusion.pretrained import Bundle
from nanodiffusion.sampler import ImageNoise, State, Step, sample, start
from nanodiffusion.show import to_uint8
from nanodiffusion.tasks.conditions import (
    Known,
    conditioning,
    denoiser_of,
    know,
    pixels,
    ready,
    rows,
    slerp,
    to_image,
    walk,
    with_known,
    with_loss,
)
from nanodiffusion.tasks.request import (
    AdapterInput,
    Control,
    Embeddings,
    GenerateConfig,
    Inputs,
    Loss,
    Picture,
    complete,
    settle,
)


@dataclass(frozen=True)
class Job:
    """A run that is ready: x (b c h w) at level sigmas[0], the bound denoiser D, the ladder and the step.

    config has every default filled in: it makes the same pictures again. seeds (b).
    """

    D: Bound
    x: Tensor
    sigmas: Tensor
    step: Step
    config: GenerateConfig
    seeds: list[int]
    bundle: Bundle
    nets: tuple[nn.Module, ...]  # what D calls

    def states(self) -> Iterator[State]:
        """The states after every step; each call starts again."""
        noise = ImageNoise(self.seeds)
        noise.draw(*self.x.shape[1:])  # that of the start
        shifts = self.config.brightness, self.config.sharpness
        with self.bundle.at_work(*self.nets):
            for state in sample(self.D, self.x, self.sigmas, self.step, noise):
                last = not state.sigma_next
                yield state._replace(x=shifted(state.x, *shifts)) if last else state


def generate(
    bundle: Bundle,
    prompt: str | Sequence[str] | None = None,
    *,
    config: GenerateConfig | None = None,
    embeddings: Embeddings | None = None,
    image: Picture | None = None,
    mask: Picture | None = None,
    controls: Sequence[Control] = (),
    adapters: Sequence[AdapterInput] = (),
    tokens: InpaintTokens | None = None,
    loss: Loss | None = None,
    noise: Tensor | None = None,
    **overrides: Any,
) -> Iterator[State]:
    """The sampler's states for a prompt or several: x and x0 (b c h w) are latents; picture i depends on its seed alone.

    overrides: fields of config. embeddings: cond, or (cond, uncond), as TextEncoder.encode gives them, for a prompt.
    image: PIL, uint8 or a tensor (b 3 H W) in [-1, 1] to start from; with mask (1 or white: to be made) to inpaint, by
    a U-Net of 9 channels, by `tokens` in the context, or by holding what is known. loss: decoded x0 (b 3 H W) in
    [-1, 1] -> (b), goes down. noise (b c h w): unit noise instead of the seeds'. UserError before anything is drawn.
    """
    inputs = Inputs(embeddings, image, mask, tuple(controls), tuple(adapters), tokens, loss, noise)
    return prepare(bundle, settle(config or GenerateConfig(), prompt=prompt, **overrides), inputs).states()


@torch.no_grad()
def prepare(bundle: Bundle, config: GenerateConfig, inputs: Inputs | None = None) -> Job:
    """Everything before the first step: text and pictures encoded, hints embedded, denoiser guided, start drawn."""
    inputs = inputs or Inputs()
    config = complete(bundle, config, inputs)
    step, sigmas = make_step(config), ladder_of(config, bundle.schedule)
    bundle.denoiser.eval()
    conds = conditioning(bundle, config, inputs.embeddings)
    b, words, _ = conds[0]["context"].shape
    known = know(bundle, config, inputs, b)
    conds = with_known(bundle, conds, known, inputs.tokens)
    unit, seeds = unit_noise(config, inputs.noise, known.shape)
    x, sigmas = begin(sigmas, unit, known, config.strength)
    D = denoiser_of(bundle, config, conds, sigmas, ready(bundle, config, inputs, known), words)
    D = with_loss(bundle, config, D, sigmas, inputs.loss)
    if known.held:
        D = keep(D, known.x0, known.mask)
    nets = (bundle.denoiser.net, *(c.net for c in inputs.controls))
    return Job(D, x.to(bundle.device), sigmas, step, config, seeds, bundle, nets)


# -- the start ---------------------------------------------------------------------------------------------------------


def ladder_of(config: GenerateConfig, schedule: Schedule) -> Tensor:
    """The noise levels before any slicing by strength: (k+1) float64."""
    if config.sigmas and config.timesteps:
        raise UserError("sigmas and timesteps exclude each other", key="timesteps", fix="leave one of them out")
    if config.sigmas:
        return given_sigmas(config.sigmas)
    return given_timesteps(schedule, config.timesteps) if config.timesteps else make_ladder(config, schedule)


def unit_noise(config: GenerateConfig, given: Tensor | None, shape: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The start's unit noise, and every picture's seed: shape (b c h w) -> (b c h w), b seeds.

    With frames there is one seed, or several: then the noise is on the great circles between theirs, and the first of
    them is the seed of what noise the steps want.
    """
    b, seeds = shape[0], list(config.seeds)
    if config.frames:
        keys = ImageNoise(seeds or [config.seed]).draw(*shape[1:])
        noise, seeds = walk(keys, b, slerp), [seeds[0] if seeds else config.seed] * b
    else:
        seeds = seeds or list(range(config.seed, config.seed + b))
        if len(seeds) != b:
            raise UserError("every picture has a seed", key="seeds", expected=f"{b} of them", found=len(seeds))
        noise = ImageNoise(seeds).draw(*shape[1:])
    if given is None:
        return noise, seeds
    if given.shape[1:] != noise.shape[1:] or len(given) not in (1, b):
        raise UserError("noise of another shape", key="noise", expected=tuple(shape), found=tuple(given.shape))
    return given.detach().cpu().float().expand(noise.shape), seeds


def begin(sigmas: Tensor, unit: Tensor, known: Known, strength: float | None) -> tuple[Tensor, Tensor]:
    """x (b c h w) to start from, on the CPU, and what of the ladder is left: unit noise (b c h w), sigmas (k+1).

    At full strength a masked picture starts from noise alone where it is to be made, and everywhere if the net inpaints.
    """
    if known.x0 is None or strength is None:
        return start(sigmas, unit)
    x0 = known.x0.cpu()
    return start(sigmas, unit, x0 * (1 - known.mask.cpu()) if known.held and strength == 1 else x0, strength)


# -- what comes out ----------------------------------------------------------------------------------------------------


def eps_of(before: Tensor, state: State) -> Tensor:
    """The noise that the step's denoiser saw, (x - x0) / sigma, in `before` (b ...), the x that the step began from."""
    return (before - state.x0) / state.sigma


def with_eps(job: Job) -> Iterator[tuple[State, Tensor]]:
    """Every state with the noise (b c h w) that was seen in it: decode it like a latent."""
    before = job.x
    for state in job.states():
        yield state, eps_of(before, state)
        before = state.x


@torch.no_grad()
def pictures(bundle: Bundle, x: Tensor, image: Picture | None = None, mask: Picture | None = None) -> list[Image.Image]:
    """Latents (b c h w) decoded; with the image and mask of inpainting, what was known is put back exactly."""
    made = to_uint8(to_image(bundle, x)).cpu().numpy()
    if image is not None and mask is not None:
        size, b = GenerateConfig(width=made.shape[2], height=made.shape[1]), len(made)
        each = lambda x, key: rows(x, replace(size, n=max(1, b // len(x))), b, key)
        known = to_uint8(each(pixels(image, size, "image", low=-1), "image")).numpy()
        made = paste(made, known, each(pixels(mask, size, "mask", 1), "mask")[:, 0].numpy())
    return [Image.fromarray(picture) for picture in made]


def paste(made: np.ndarray, known: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """known where the mask is 0, bit for bit; made where it is 1; their mean between.

    made, known (b H W 3) uint8; mask (b H W) in [0, 1], or uint8 of 0 to 255. known and mask may have one row for all.
    """
    m = mask[..., None].astype(np.float64) / (255 if mask.dtype == np.uint8 else 1)
    mean = known + m * (made.astype(np.float64) - known)
    return np.where(m == 0, known, mean.round().clip(0, 255).astype(np.uint8))
