"""draw: the first step down from pure noise, samples of an analytic Gaussian, and what an image depends on."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from nanodiffusion.config import SampleConfig
from nanodiffusion.denoiser import PREDICTIONS, Denoiser
from nanodiffusion.draw import GAIN, bounded, draw, guided, make_ladder, shifted
from nanodiffusion.errors import UserError
from nanodiffusion.noise import LADDERS, SCHEDULES
from nanodiffusion.sampler import ImageNoise

pytestmark = pytest.mark.usefixtures("one_thread")
GAMMAS = ("gamma_linear", "gamma_cosine", "gamma_sigmoid")
SHAPE = (1, 2, 3)


class Gauss(nn.Module):
    """F of the best denoiser of N(0, std^2), D = std^2 / (std^2 + sigma^2) x, whatever it is to predict.

    It computes in float64 from its input; `dtype` rounds what goes in and out, `error` is added to what comes out.
    """

    takes, null_label = (), None

    def __init__(self, prediction: str, std: float = 1.0, dtype: torch.dtype | None = None, error: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.coefficients, self.std, self.dtype, self.error = PREDICTIONS[prediction].coefficients, std, dtype, error

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = (4 * t.double()).exp().reshape(-1, *[1] * (x.ndim - 1))
        c_skip, c_out, c_in = self.coefficients(sigma)
        x = (x if self.dtype is None else x.to(self.dtype)).double() / c_in
        F = (self.std**2 / (self.std**2 + sigma**2) * x - c_skip * x) / c_out
        F = F + self.error * torch.randn(F.shape, dtype=F.dtype, generator=torch.Generator().manual_seed(3))
        return (F if self.dtype is None else F.to(self.dtype)).float()


def run(net: nn.Module, prediction: str, schedule: str, n: int = 4, **sample) -> tuple[list, Tensor, list[float]]:
    """All states of n images, the unit noise they began from and the levels they went through."""
    config = SampleConfig(**{"sampler": {"name": "ddim"}, "ladder": {"name": "trailing"}, **sample})
    states = list(draw(Denoiser(net, prediction, "log"), SHAPE, SCHEDULES[schedule](), config, range(n)))
    return states, ImageNoise(range(n)).draw(*SHAPE), [states[0].sigma, *(s.sigma_next for s in states)]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# ---- the first step


@pytest.mark.parametrize("schedule", [*GAMMAS, "flow", "cosine_beta"])
@pytest.mark.parametrize("ladder", ["trailing", "linspace", "karras"])
@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("flaw", ["none", "bf16", "error"])
def test_the_first_step_amplifies_at_most_a_tenth_more_than_the_ideal(schedule, ladder, steps, prediction, flaw):
    """The ideal: std sqrt(std^2 + sigma^2) is x's size at every level of the probability flow."""
    flaws = {"none": {}, "bf16": {"dtype": torch.bfloat16}, "error": {"error": 0.01}}[flaw]
    net = Gauss(prediction, **flaws)
    states, noise, levels = run(net, prediction, schedule, 64, ladder={"name": ladder}, steps=steps)
    ideal = math.sqrt((1 + levels[1] ** 2) / (1 + levels[0] ** 2))
    assert rms(states[0].x) / rms(levels[0] * noise) <= 1.1 * ideal


@pytest.mark.parametrize("schedule", GAMMAS)
@pytest.mark.parametrize("std", [0.5, 1.0])
def test_the_first_step_is_the_analytic_one(schedule, std):
    states, noise, (s, r, *_) = run(Gauss("eps", std), "eps", schedule, steps=50)
    torch.testing.assert_close(states[0].x, s * noise * (std**2 + s * r) / (std**2 + s**2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 50, 200])
@pytest.mark.parametrize("schedule", [*GAMMAS, "ddpm", "ldm", "log_linear", "flow", "cosine_beta"])
def test_bounding_lowers_the_first_level_alone_and_only_of_predictions_that_grow(schedule, steps):
    for ladder in LADDERS:
        whole = make_ladder(SampleConfig(ladder={"name": ladder}, steps=steps), SCHEDULES[schedule]())
        for name in ("v", "flow", "edm", "x0", "x0_linear"):
            torch.testing.assert_close(bounded(whole, PREDICTIONS[name]), whole, rtol=0, atol=0)
        found = bounded(whole, PREDICTIONS["eps"])
        torch.testing.assert_close(found[1:], whole[1:], rtol=0, atol=0)
        assert float(found[1]) < float(found[0]) <= float(whole[0])
        assert float(found[0]) == float(whole[0]) or float(found[0]) >= GAIN * (1 - 1e-12)


def test_the_ladder_of_ddpm_and_stable_diffusion_is_as_it_was():
    for schedule in ("ddpm", "ldm", "log_linear"):
        for ladder in ("trailing", "leading", "linspace", "karras"):
            whole = make_ladder(SampleConfig(ladder={"name": ladder}, steps=20), SCHEDULES[schedule]())
            torch.testing.assert_close(bounded(whole, PREDICTIONS["eps"]), whole, rtol=0, atol=0)


# ---- a Gaussian


@pytest.mark.parametrize("schedule", GAMMAS)
@pytest.mark.parametrize("std", [1.0, 2.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_variance_of_ddim_on_a_gaussian_is_right_to_a_hundredth(schedule, std, prediction):
    states, noise, _ = run(Gauss(prediction, std), prediction, schedule, steps=len(SCHEDULES[schedule]()))
    torch.testing.assert_close(states[-1].x, std * noise, rtol=0.005, atol=0)  # hence its variance to 0.01


@pytest.mark.parametrize("schedule", GAMMAS)
@pytest.mark.parametrize("std", [0.5, 1.0])
@pytest.mark.parametrize(("sampler", "steps"), [("heun", 100), ("dpmpp_2m", 100), ("unipc", 50)])
def test_second_order_is_right_to_a_hundredth_in_fewer_steps(schedule, std, sampler, steps):
    sample = {"sampler": {"name": sampler}, "ladder": {"name": "karras", "sigma_min": 0.002, "sigma_max": 80.0}}
    states, noise, _ = run(Gauss("eps", std), "eps", schedule, 4, steps=steps, **sample)
    torch.testing.assert_close(states[-1].x, std * noise, rtol=0.005, atol=0)


@pytest.mark.parametrize("schedule", GAMMAS)
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_few_steps_of_ddim_shrink_by_the_cosines_of_their_angles(schedule, steps):
    """With tan a = sigma, each Euler step is the exact one times cos(a - a')."""
    states, noise, levels = run(Gauss("eps"), "eps", schedule, steps=steps)
    shrink = math.prod(math.cos(math.atan(s) - math.atan(r)) for s, r in pairwise(levels))
    start = levels[0] / math.sqrt(1 + levels[0] ** 2)
    torch.testing.assert_close(states[-1].x, start * shrink * noise, rtol=1e-3, atol=1e-4)


# ---- what an image depends on


class Told(nn.Module):
    """F = a value per class plus the mean of the text's vector, with nothing of x: D = x - sigma F is known."""

    takes, null_label = ("label", "pooled"), 3

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([0.1, 0.2, 0.4, 0.0]))

    def forward(self, x: Tensor, t: Tensor, label: Tensor, pooled: Tensor) -> Tensor:
        value = self.values[label] + pooled.mean(1)
        return value.reshape(-1, 1, 1, 1).expand_as(x)


def told(labels: list[int], texts: list[float], guidance: float = 1.0, seeds=None, **options) -> Tensor:
    config = SampleConfig(sampler={"name": "euler"}, ladder={"name": "karras"}, steps=4, guidance=guidance)
    cond = {"label": torch.tensor(labels), "pooled": torch.tensor(texts)[:, None].expand(-1, 2)}
    seeds = range(len(labels)) if seeds is None else seeds
    *_, last = draw(Denoiser(Told(), "eps"), SHAPE, SCHEDULES["log_linear"](), config, seeds, cond, **options)
    return last.x


def ideal(F: list[float], seeds=None) -> Tensor:
    """dx/dsigma = F from x = 10 eps down to 0."""
    noise = ImageNoise(range(len(F)) if seeds is None else seeds).draw(*SHAPE)
    return 10 * noise - 10 * torch.tensor(F).reshape(-1, 1, 1, 1)


def test_an_image_is_the_same_alone_and_in_a_batch():
    whole = told([0, 1, 2], [0.5, 0.0, -1.0])
    for i, (label, text) in enumerate(((0, 0.5), (1, 0.0), (2, -1.0))):
        torch.testing.assert_close(told([label], [text], seeds=[i])[0], whole[i], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole, ideal([0.6, 0.2, -0.6]), rtol=0, atol=1e-5)


def test_guidance_leads_away_from_nothing_or_from_what_is_negative():
    plain = told([1], [0.5], guidance=3.0)
    torch.testing.assert_close(plain, ideal([3 * 0.7 - 2 * 0.0]), rtol=0, atol=1e-4)
    away = told([1], [0.5], guidance=3.0, negative={"pooled": torch.full((1, 2), 0.3)})
    torch.testing.assert_close(away, ideal([3 * 0.7 - 2 * 0.3]), rtol=0, atol=1e-4)


class Outpaints(nn.Module):
    takes = ("concat",)


def test_nothing_can_be_left_out_of_a_model_that_is_told_only_what_is_known():
    cond = {"concat": torch.zeros(2, *SHAPE)}
    guided(Denoiser(Outpaints(), "eps"), cond, SampleConfig(guidance=1.0))
    with pytest.raises(UserError, match="guidance needs a class"):
        guided(Denoiser(Outpaints(), "eps"), cond, SampleConfig(guidance=3.0))


@pytest.mark.parametrize(("labels", "wrong"), [([-1, 2], -1), ([0, 7, 9], 7)])
def test_a_class_that_is_none_is_named(labels, wrong):
    cond = {"label": torch.tensor(labels), "pooled": torch.zeros(len(labels), 2)}
    with pytest.raises(UserError, match=f"found: {wrong}$"):
        guided(Denoiser(Told(), "eps"), cond, SampleConfig())


def test_noise_of_ones_own_takes_the_place_of_the_seeds():
    own = ImageNoise([7]).draw(*SHAPE)
    torch.testing.assert_close(told([0], [0.0], noise=own), ideal([0.1], [7]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_between_two_classes_the_estimate_is_their_weighted_mean(weight):
    other = {"label": torch.tensor([2]), "pooled": torch.zeros(1, 2)}
    found = told([0], [0.0], other=(other, torch.tensor([weight])))
    torch.testing.assert_close(found, ideal([(1 - weight) * 0.1 + weight * 0.4]), rtol=0, atol=1e-5)


def test_brightness_and_sharpness_move_channels_0_and_3():
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    moved = shifted(x, 0.5, -0.25)
    expected = x + torch.tensor([0.5, 0, 0, -0.25]).reshape(4, 1, 1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0)
    assert shifted(x) is x
