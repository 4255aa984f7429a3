"""Pictures from a denoiser: seeds and conditions -> noise, ladder, guidance, sampler states."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nanodiffusion.config import SampleConfig, make
from nanodiffusion.denoiser import Denoiser, Prediction, expand
from nanodiffusion.errors import UserError, workable
from nanodiffusion.guidance import Bound, bind, cfg
from nanodiffusion.noise import LADDERS, Schedule
from nanodiffusion.sampler import STEPS, ImageNoise, State, Step, sample, start


def make_ladder(config: SampleConfig, schedule: Schedule) -> Tensor:
    """The noise levels a SampleConfig visits: (steps + 1,) float64."""
    with workable("sample.ladder"):
        return make(LADDERS, config.ladder, "sample.ladder")(schedule, config.steps)


def make_step(config: SampleConfig) -> Step:
    """The sampler's step function."""
    return make(STEPS, config.sampler, "sample.sampler")


def check_step(config: SampleConfig) -> None:
    """UserError for a sampler whose options do not work: a few steps of it, on two numbers."""
    if config.sampler.get("order", 1) < 1:
        raise UserError("must be at least 1", key="sample.sampler.order", found=config.sampler["order"])
    x, ladder = torch.ones(1, 2), torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    with workable("sample.sampler"):
        *_, last = sample(lambda x, sigma: x / 2, x, ladder, make_step(config), torch.ones_like)
    if not last.x.isfinite().all():
        raise UserError("these options cannot work", key="sample.sampler", found=config.sampler)


def check_settings(config: SampleConfig, schedule: Schedule) -> None:
    """UserError for settings that no model could be sampled with."""
    check_step(config)
    make_ladder(config, schedule)
    if config.n < 1:
        raise UserError("must be at least 1", key="sample.n", found=config.n)
    if len(config.guidance_interval) not in (0, 2):
        raise UserError("an interval has two ends", key="sample.guidance_interval", found=config.guidance_interval)


def check_sampling(denoiser: Denoiser, config: SampleConfig, schedule: Schedule) -> None:
    """UserError, before any training, for what `draw` would refuse after it."""
    check_settings(config, schedule)
    guided(denoiser, {name: torch.zeros(0, dtype=torch.int64) for name in denoiser.takes}, config)


CALLED = {"label": "class", "pooled": "text", "concat": "known"}  # conditions as a user asks for them


def guided(
    denoiser: Denoiser,
    cond: Mapping[str, Tensor] | None,
    config: SampleConfig,
    negative: Mapping[str, Tensor] | None = None,
) -> Bound:
    """The denoiser bound to its conditions (each (b ...)) under the config's classifier-free guidance.

    negative: conditions (b ...) to be led away from, instead of none: the text that is not wanted.
    """
    takes, null = denoiser.takes, getattr(denoiser.net, "null_label", None)
    cond = dict(cond or {})
    if odd := [CALLED.get(name, name) for name in cond if name not in takes]:
        raise UserError(f"this model knows no {odd[0]}", key=odd[0], fix=f"leave {odd[0]} out")
    if not set(takes) - {"concat"} and config.guidance != 1:  # what is known is never left out
        raise UserError("guidance needs a class- or text-conditional model", key="guidance", found=config.guidance)
    classes = f"0 to {null} ({null} is the null class)"
    if missing := [name for name in takes if name not in cond]:
        called = CALLED.get(missing[0], missing[0])
        expected = classes if missing[0] == "label" else None
        raise UserError(f"this model is {called}-conditional", key=called, expected=expected)
    labels = cond.get("label", torch.zeros(0))
    if wrong := [label for label in labels.tolist() if not 0 <= label <= (null or 0)]:
        raise UserError("no such class", key="class", expected=classes, found=wrong[0])
    lo, hi = config.guidance_interval or (0.0, float("inf"))
    nothing = denoiser.unconditional(cond) | dict(negative or {})
    return cfg(denoiser, cond, nothing, config.guidance, lo, hi, config.guidance_rescale) if takes else bind(denoiser)


# What an error in F may have grown to, in units of x's own size, after the first step.
GAIN = 16.0


def bounded(ladder: Tensor, prediction: Prediction) -> Tensor:
    """The ladder (k+1), its first level lowered where the first step would blow up what the net gets wrong.

    Down from s to r, Euler turns an error e of F into |c_out(s)| (1 - r/s) e beside an x of size sqrt(1 + r^2). A net
    that predicts eps has c_out = -s: 50 DDIM steps of the linear gamma, from SIGMA_CAP to 7, would make 580 e of it.
    At most 16 e leaves x = s eps right to 1/256 of its variance. No other prediction is touched: its c_out is bounded.
    """
    first, second = ladder[0], ladder[1]
    c_out = prediction.coefficients(first)[1].abs()
    gain = float(c_out * (1 - second / first) / (1 + second**2).sqrt())
    return ladder if gain <= GAIN else torch.cat([first[None] * GAIN / gain, ladder[1:]])


def begin(
    denoiser: Denoiser,
    schedule: Schedule,
    config: SampleConfig,
    unit: Tensor,
    x0: Tensor | None = None,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """x (b ...) to start from, of unit noise (b ...), on the CPU, and the ladder (k+1) down from it; see `start`."""
    ladder = bounded(make_ladder(config, schedule), denoiser.prediction)
    return start(ladder, unit, None if x0 is None else x0.cpu(), strength)


def draw(
    denoiser: Denoiser,
    shape: Sequence[int],
    schedule: Schedule,
    config: SampleConfig,
    seeds: Sequence[int],
    cond: Mapping[str, Tensor] | None = None,
    x0: Tensor | None = None,
    strength: float = 1.0,
    negative: Mapping[str, Tensor] | None = None,
    noise: Tensor | None = None,
    other: tuple[Mapping[str, Tensor], Tensor] | None = None,
) -> Iterator[State]:
    """Sampler states of one batch; image i depends on seeds[i] and its condition alone, not on the batch or the device.

    shape: of one sample. cond: {"label": (b)}, {"pooled": (b d)}, ... as the net takes them; negative as in `guided`.
    x0 (b *shape) with strength starts from a picture (image to image). noise (b *shape): unit noise to start from
    instead of the seeds' own, which the steps go on with. other: further conditions, and how far (b) in [0, 1] the
    denoiser's estimate is moved to what it says of them: a way between classes, of which there is none half way.
    """
    device = next(denoiser.parameters()).device
    own = ImageNoise(seeds)
    unit = own.draw(*shape)
    x, ladder = begin(denoiser, schedule, config, unit if noise is None else noise, x0, strength)
    denoiser.eval()
    there = lambda given: {name: value.to(device) for name, value in (given or {}).items()}
    D = guided(denoiser, there(cond), config, there(negative))
    if other is not None:
        D = between(D, guided(denoiser, there(other[0]), config, there(negative)), other[1].to(device))
    return sample(D, x.to(device), ladder, make_step(config), own)


def between(D0: Bound, D1: Bound, weight: Tensor) -> Bound:
    """(1 - weight) D0 + weight D1, with each sample's own weight (b): E[x0 | x] of a mixture of two conditions."""
    return lambda x, sigma: torch.lerp(D0(x, sigma), D1(x, sigma), expand(weight, x).to(x))


def shifted(x: Tensor, brightness: float = 0.0, sharpness: float = 0.0) -> Tensor:
    """x (b c h w) with channels 0 and 3 of the latent moved: what transformer latent diffusion calls by these names."""
    if not (brightness or sharpness):
        return x
    shift = x.new_tensor([brightness, 0, 0, sharpness, *[0] * (x.shape[1] - 4)])
    return x + shift[:, None, None]


@lru_cache
def cycled(n: int, classes: int) -> Tensor:
    """Labels 0, 1, ..., classes-1, 0, ... (n): a grid with one column a class."""
    return torch.arange(n) % classes
