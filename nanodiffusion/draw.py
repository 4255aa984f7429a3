"""Pictures from a denoiser: seeds and conditions -> noise, ladder, guidance, sampler states."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nanodiffusion.config import SampleConfig, make
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import Bound, bind, cfg, unconditional
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
    guided(denoiser, {name: torch.zeros(0, dtype=torch.int64) for name in getattr(denoiser.net, "takes", ())}, config)


CALLED = {"label": "class", "pooled": "text", "concat": "known"}  # conditions as a user asks for them


def guided(denoiser: Denoiser, cond: Mapping[str, Tensor] | None, config: SampleConfig) -> Bound:
    """The denoiser bound to its conditions (each (b ...)) under the config's classifier-free guidance."""
    takes, null = getattr(denoiser.net, "takes", ()), getattr(denoiser.net, "null_label", None)
    cond = dict(cond or {})
    if odd := [CALLED.get(name, name) for name in cond if name not in takes]:
        raise UserError(f"this model knows no {odd[0]}", key=odd[0], fix=f"leave {odd[0]} out")
    if not takes and config.guidance != 1:
        raise UserError("guidance needs a class- or text-conditional model", key="guidance", found=config.guidance)
    classes = f"0 to {null} ({null} is the null class)"
    if missing := [name for name in takes if name not in cond]:
        called = CALLED.get(missing[0], missing[0])
        expected = classes if missing[0] == "label" else None
        raise UserError(f"this model is {called}-conditional", key=called, expected=expected)
    if (
        (labels := cond.get("label")) is not None
        and len(labels)
        and not 0 <= int(labels.min()) <= int(labels.max()) <= (null or 0)
    ):
        raise UserError("no such class", key="class", expected=classes, found=labels.max().item())
    lo, hi = config.guidance_interval or (0.0, float("inf"))
    nothing = unconditional(cond, null)
    return cfg(denoiser, cond, nothing, config.guidance, lo, hi, config.guidance_rescale) if takes else bind(denoiser)


def draw(
    denoiser: Denoiser,
    shape: Sequence[int],
    schedule: Schedule,
    config: SampleConfig,
    seeds: Sequence[int],
    cond: Mapping[str, Tensor] | None = None,
    x0: Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[State]:
    """Sampler states of one batch; image i depends on seeds[i] and its condition alone, not on the batch or the device.

    shape: of one sample. cond: {"label": (b)}, {"pooled": (b d)}, ... as the net takes them. x0 (b *shape) with strength
    starts from a picture (image to image).
    """
    device = next(denoiser.parameters()).device
    noise = ImageNoise(seeds)
    x, ladder = start(make_ladder(config, schedule), noise.draw(*shape), None if x0 is None else x0.cpu(), strength)
    denoiser.eval()
    D = guided(denoiser, {name: value.to(device) for name, value in (cond or {}).items()}, config)
    return sample(D, x.to(device), ladder, make_step(config), noise)


@lru_cache
def cycled(n: int, classes: int) -> Tensor:
    """Labels 0, 1, ..., classes-1, 0, ... (n): a grid with one column a class."""
    return torch.arange(n) % classes
