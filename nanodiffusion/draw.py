"""Pictures from a denoiser: seeds and labels -> noise, ladder, guidance, sampler states."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nanodiffusion.config import SampleConfig, make
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import Bound, bind, cfg, null_labels
from nanodiffusion.noise import LADDERS, Schedule
from nanodiffusion.sampler import STEPS, ImageNoise, State, Step, sample, start


def make_ladder(config: SampleConfig, schedule: Schedule) -> Tensor:
    """The noise levels a SampleConfig visits: (steps + 1,) float64."""
    return make(LADDERS, config.ladder, "sample.ladder")(schedule, config.steps)


def make_step(config: SampleConfig) -> Step:
    """The sampler's step function."""
    return make(STEPS, config.sampler, "sample.sampler")


def check_sampling(denoiser: Denoiser, config: SampleConfig, schedule: Schedule) -> None:
    """UserError, before any training, for what `draw` would refuse after it."""
    make_step(config)
    make_ladder(config, schedule)
    if config.n < 1:
        raise UserError("must be at least 1", key="sample.n", found=config.n)
    if len(config.guidance_interval) not in (0, 2):
        raise UserError("an interval has two ends", key="sample.guidance_interval", found=config.guidance_interval)
    null = getattr(denoiser.net, "null_label", None)
    guided(denoiser, None if null is None else torch.zeros(0, dtype=torch.int64), config)


def guided(denoiser: Denoiser, labels: Tensor | None, config: SampleConfig) -> Bound:
    """The denoiser bound to labels (b) under the config's classifier-free guidance."""
    null = getattr(denoiser.net, "null_label", None)
    if null is None:
        if labels is not None:
            raise UserError("this model knows no classes", key="class", fix="leave class out")
        if config.guidance != 1:
            raise UserError("guidance needs a class-conditional model", key="guidance", found=config.guidance)
        return bind(denoiser)
    if labels is None:
        raise UserError(
            "this model is class-conditional", key="class", expected=f"0 to {null} ({null} is the null class)"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= null:
        raise UserError(
            "no such class", key="class", expected=f"0 to {null} ({null} is the null class)", found=labels.max().item()
        )
    cond = {"label": labels}
    lo, hi = config.guidance_interval or (0.0, float("inf"))
    return cfg(denoiser, cond, null_labels(cond, null), config.guidance, lo, hi, config.guidance_rescale)


def draw(
    denoiser: Denoiser,
    shape: Sequence[int],
    schedule: Schedule,
    config: SampleConfig,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    x0: Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[State]:
    """Sampler states of one batch; image i depends on seeds[i] (and labels[i]) alone, not on the batch or the device.

    shape: of one sample. labels (b). x0 (b *shape) with strength starts from a picture (image to image).
    """
    device = next(denoiser.parameters()).device
    noise = ImageNoise(seeds)
    x, ladder = start(make_ladder(config, schedule), noise.draw(*shape), None if x0 is None else x0.cpu(), strength)
    denoiser.eval()
    D = guided(denoiser, None if labels is None else labels.to(device), config)
    return sample(D, x.to(device), ladder, make_step(config), noise)


@lru_cache
def cycled(n: int, classes: int) -> Tensor:
    """Labels 0, 1, ..., classes-1, 0, ... (n): a grid with one column a class."""
    return torch.arange(n) % classes
