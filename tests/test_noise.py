"""Schedules, ladders and densities equal diffusers', smalldiffusion's and the papers' formulas, over whole tables.

The references run in float64 (`in_float64`), so that what is compared is the table and not their fp32 rounding.
"""

import math

import numpy as np
import pytest
import reference
import scipy.stats
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from reference import in_float64
from torch.testing import assert_close

from nanodiffusion import noise
from nanodiffusion.errors import UserError
from nanodiffusion.noise import DENSITIES, LADDERS, SCHEDULES, SIGMA_CAP, Schedule

F64 = torch.float64
BETAS = {
    "ddpm": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "ldm": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "sigmoid_beta": {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine_beta": {"beta_schedule": "squaredcos_cap_v2"},
}
SMALL = {
    "ddpm": "ScheduleDDPM",
    "ldm": "ScheduleLDM",
    "sigmoid_beta": "ScheduleSigmoid",
    "cosine_beta": "ScheduleCosine",
    "log_linear": "ScheduleLogLinear",
}


# -- schedules


@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize("name", BETAS)
def test_schedule_equals_diffusers(name, n):
    with in_float64():
        abar = DDPMScheduler(num_train_timesteps=n, **BETAS[name]).alphas_cumprod
    assert_close(SCHEDULES[name](n).sigmas, ((1 - abar) / abar).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [10, 200, 1000])
@pytest.mark.parametrize("name", SMALL)
def test_schedule_equals_smalldiffusion(name, n):
    with in_float64():
        want = getattr(reference.smalldiffusion(), SMALL[name])(n).sigmas
    assert_close(SCHEDULES[name](n).sigmas, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("t_max", [0.9, 1.0])
def test_flow_schedule_equals_smalldiffusions_times(t_max):
    with in_float64():
        t = reference.smalldiffusion().ScheduleFlow(1000, t_max=t_max).sigmas
    t = t.clamp(max=1 - 2**-12)  # t = 1 is pure noise: sigma infinite
    assert_close(noise.flow(1000, t_max=t_max).sigmas, t / (1 - t), rtol=1e-6, atol=0)


def gamma_by_formula(name, t):
    """Inventory N3, in numpy."""
    if name == "gamma_linear":
        return 1 - t
    start, end, tau = (0.2, 1.0, 2.0) if name == "gamma_cosine" else (0.0, 3.0, 0.7)
    if name == "gamma_cosine":
        f = lambda t: np.cos((t * (end - start) + start) * np.pi / 2) ** (2 * tau)
    else:
        f = lambda t: 1 / (1 + np.exp(-(t * (end - start) + start) / tau))
    return (f(1.0) - f(t)) / (f(1.0) - f(0.0))


@pytest.mark.parametrize("b", [0.5, 1.0])
@pytest.mark.parametrize("name", ["gamma_linear", "gamma_cosine", "gamma_sigmoid"])
def test_gamma_schedule_equals_the_formula_and_ends_at_the_cap(name, b):
    gamma = gamma_by_formula(name, np.arange(1, 1000) / 1000)
    sigmas = SCHEDULES[name](1000, input_scale=b).sigmas
    want = np.sqrt((1 - gamma) / gamma) / b
    assert_close(sigmas, torch.from_numpy(np.append(want[want < 4095], 4095)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["gamma_linear", "gamma_cosine", "gamma_sigmoid", "flow"])
@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_pure_noise_is_one_level_at_the_cap(name, n):
    sigmas = SCHEDULES[name](n).sigmas
    assert sigmas[-1] == SIGMA_CAP and sigmas[-2] < SIGMA_CAP


def test_the_cap_is_the_flow_time_one_minus_two_to_the_minus_twelve():
    assert SIGMA_CAP / (1 + SIGMA_CAP) == 1 - 2**-12
    assert noise.flow_sigma(torch.tensor([0.0, 0.5, 1.0], dtype=F64)).tolist() == [0, 1, SIGMA_CAP]


def test_ldm_has_the_inventorys_figures():
    ends = noise.ldm().sigmas[[0, -1]]
    assert_close(ends, torch.tensor([0.0291672, 14.6146], dtype=F64), rtol=0, atol=5e-5)
    fifteen = noise.linspace(noise.ldm(), 15)
    assert_close(fifteen[:2], torch.tensor([14.6146, 9.6826], dtype=F64), rtol=0, atol=1e-4)
    assert_close(noise.ldm().t(fifteen[:2]), torch.tensor([999, 927.642857], dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "ends"), [("ddpm", (0.01, 157.4)), ("cosine_beta", (None, 20291)), ("log_linear", (0.02, 10))]
)
def test_other_inventory_figures(name, ends):
    sigmas = SCHEDULES[name]().sigmas
    for end, want in zip((sigmas[0], sigmas[-1]), ends):
        assert want is None or float(end) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "sigmas"])
def test_clock_is_the_inverse_of_the_table(name):
    schedule = SCHEDULES[name](1000)
    n = len(schedule)
    t = torch.cat([torch.arange(n, dtype=F64), torch.linspace(0.1, n - 1.2, 777, dtype=F64)])
    levels = np.interp(t.numpy(), np.arange(n), schedule.sigmas.numpy())
    assert_close(schedule.sigma(t), torch.from_numpy(levels), rtol=1e-12, atol=0)
    assert_close(schedule.t(torch.from_numpy(levels)), t, rtol=0, atol=1e-7)


def test_clock_is_clamped_keeps_shape_and_dtype():
    schedule = noise.ldm()
    outside = torch.tensor([[1e-9, 0.0], [14.7, 1e9]])
    assert_close(schedule.t(outside), torch.tensor([[0.0, 0.0], [999.0, 999.0]]))
    assert schedule.sigma(torch.tensor([-1.0, 2000.0])).tolist() == schedule.sigmas[[0, -1]].tolist()


@pytest.mark.parametrize("bad", [[], [1.0], [2.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, math.inf], [[1.0, 2.0]]])
def test_a_schedule_is_a_strictly_increasing_table(bad):
    with pytest.raises(UserError, match="increasing"):
        noise.user_sigmas(bad)


def test_user_sigmas_are_taken_as_they_are():
    assert noise.user_sigmas([0.1, 0.5, 3]).sigmas.tolist() == [0.1, 0.5, 3]


# -- ladders

STEPS = [*range(1, 201), 250, 333, 500, 999, 1000]


def diffusers_ladder(steps, **config):
    with in_float64():
        scheduler = EulerDiscreteScheduler(**BETAS["ldm"], **config)
        scheduler.set_timesteps(steps)
    return scheduler.sigmas


@pytest.mark.parametrize("name", LADDERS)
def test_ladder_has_exactly_steps_plus_one_decreasing_levels_and_ends_in_zero(name):
    for schedule in (noise.ldm(), noise.log_linear(1000), noise.flow(1000), noise.gamma_cosine(1000)):
        for steps in (k for k in STEPS if k <= len(schedule)):
            ladder = LADDERS[name](schedule, steps)
            assert ladder.shape == (steps + 1,) and ladder.dtype == F64 and ladder.device.type == "cpu"
            assert bool((ladder.diff() < 0).all()) and ladder[-1] == 0


# Left out: one step of linspace, which diffusers starts at the smallest level, and 1000 steps of leading with offset 1,
# where it visits the last level twice.
@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, k) for k in (2, 7, 15, 30, 50, 200, 999) for name in ("leading", "linspace")]
    + [("leading", 1), ("linspace", 1000)],
)
def test_spacing_equals_diffusers(name, steps):
    want = diffusers_ladder(steps, timestep_spacing=name, steps_offset=1)
    assert_close(LADDERS[name](noise.ldm(), steps), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [0, 1])
def test_leading_offset_equals_diffusers(offset):
    want = diffusers_ladder(30, timestep_spacing="leading", steps_offset=offset)
    assert_close(noise.leading(noise.ldm(), 30, offset=offset), want, rtol=1e-6, atol=0)


# diffusers steps by a float arange: a level too many at 61, 103, 121 ... steps, ties rounded elsewhere at 48, 80 ...
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 15, 20, 25, 30, 50, 100, 200, 500, 1000])
def test_trailing_equals_diffusers(steps):
    want = diffusers_ladder(steps, timestep_spacing="trailing")
    assert_close(noise.trailing(noise.ldm(), steps), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_trailing_equals_smalldiffusion_at_every_step_count_up_to_its_final_level(name):
    with in_float64():
        theirs = getattr(reference.smalldiffusion(), SMALL[name])(1000)
    ours = SCHEDULES[name](1000)
    for steps in STEPS:
        ladder = noise.trailing(ours, steps)
        assert_close(ladder[:-1], theirs.sample_sigmas(steps)[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [2, 7, 30, 200])
@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("ends", [{}, {"sigma_min": 0.1, "sigma_max": 10.0}])
def test_karras_and_exponential_equal_diffusers(name, steps, ends):
    want = diffusers_ladder(steps, timestep_spacing="linspace", **{f"use_{name}_sigmas": True}, **ends)
    assert_close(LADDERS[name](noise.ldm(), steps, **ends), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28, 200])
def test_shifted_flow_equals_diffusers(steps, shift):
    with in_float64():
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        first = SIGMA_CAP / (1 + SIGMA_CAP)
        scheduler.set_timesteps(sigmas=np.linspace(first, 0, steps + 1)[:-1].tolist())
    t = scheduler.sigmas
    assert_close(noise.shifted_flow(noise.flow(1000), steps, shift), t / (1 - t), rtol=1e-6, atol=0)


def test_power_equals_the_seeds_levels():
    for steps, exponent in [(15, 1.0), (30, 1.0), (20, 1.5), (99, 1.0)]:
        t = np.array([1 - (k / steps) ** exponent for k in range(steps)])  # inventory T3
        t[0] = 0.99
        want = torch.from_numpy(np.append(t / (1 - t), 0))
        assert_close(noise.power(noise.flow(), steps, exponent), want, rtol=1e-12, atol=0)


def test_given_sigmas_get_their_final_zero_once():
    for given in ([5.0, 1.0], [5.0, 1.0, 0.0], torch.tensor([5.0, 1.0])):
        assert noise.given_sigmas(given).tolist() == [5.0, 1.0, 0.0]


def test_given_timesteps_are_levels_of_the_table_in_any_order():
    want = np.interp([999, 500.5, 0], np.arange(1000), noise.ldm().sigmas.numpy())
    ladder = noise.given_timesteps(noise.ldm(), [500.5, 0, 999])
    assert_close(ladder, torch.tensor([*want, 0.0], dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [[], [0.0], [1.0, 2.0], [1.0, 1.0], [1.0, -1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_a_ladder_is_finite_and_strictly_decreasing(bad):
    with pytest.raises(UserError, match="decreasing"):
        noise.given_sigmas(bad)


def test_repeated_timesteps_are_refused():
    with pytest.raises(UserError, match="decreasing"):
        noise.given_timesteps(noise.ldm(), [10, 10])


@pytest.mark.parametrize("steps", [0, -3])
@pytest.mark.parametrize("name", LADDERS)
def test_impossible_step_counts_are_refused(name, steps):
    with pytest.raises(UserError, match="steps"):
        LADDERS[name](noise.ldm(), steps)


@pytest.mark.parametrize("name", ["trailing", "leading"])
def test_more_steps_than_levels_are_refused(name):
    with pytest.raises(UserError, match="1 to 1000"):
        LADDERS[name](noise.ldm(), 1001)


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_impossible_ends_are_refused(name, ends):
    with pytest.raises(UserError, match="sigma_min"):
        LADDERS[name](noise.ldm(), 5, sigma_min=ends[0], sigma_max=ends[1])


# -- densities: kstest of 20,000 draws with a fixed seed


def draws(density, n=20_000, seed=0):
    return density(n, torch.Generator().manual_seed(seed))


def test_table_density_is_uniform_over_the_entries():
    schedule = noise.ldm(50)
    entries = (draws(noise.table_density(schedule))[:, None] == schedule.sigmas.float()).nonzero()[:, 1]
    assert len(entries) == 20_000
    assert scipy.stats.chisquare(np.bincount(entries, minlength=50)).pvalue > 0.01


TRUNCATED = scipy.stats.truncnorm(-math.inf, math.log(SIGMA_CAP))
LAWS = {  # the law of ln sigma, or of t = sigma / (1 + sigma)
    "log_normal": (noise.log_normal(-1.2, 1.2), "ln", scipy.stats.norm(-1.2, 1.2)),
    "log_uniform": (noise.log_uniform(0.02, 10.0), "ln", scipy.stats.uniform(math.log(0.02), math.log(500))),
    "logit_normal": (noise.logit_normal(0.5, 1.5), "ln", scipy.stats.norm(0.5, 1.5)),
    "flow_uniform": (noise.flow_uniform(0.001, 0.999), "t", scipy.stats.uniform(0.001, 0.998)),
    "beta": (noise.beta_density(1.0, 2.5), "t", scipy.stats.beta(1.0, 2.5)),
}


@pytest.mark.parametrize("name", LAWS)
def test_density_has_its_law(name):
    density, variable, law = LAWS[name]
    sigma = draws(density).double()
    value = sigma.log() if variable == "ln" else sigma / (1 + sigma)
    assert scipy.stats.kstest(value.numpy(), law.cdf).pvalue > 0.01


DEFAULTS = {name: make(*([noise.ldm()] if name == "table" else [])) for name, make in DENSITIES.items()}


@pytest.mark.parametrize("name", DEFAULTS)
def test_density_is_a_function_of_the_generator_only(name):
    torch.manual_seed(1)
    first = draws(DEFAULTS[name], 64, seed=5)
    before = torch.get_rng_state()
    np.random.seed(7)
    again, other = draws(DEFAULTS[name], 64, seed=5), draws(DEFAULTS[name], 64, seed=6)
    assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(other, first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DEFAULTS)
def test_density_is_fp32_positive_and_capped(name):
    sigma = draws(DEFAULTS[name])
    assert sigma.shape == (20_000,) and sigma.dtype == torch.float32
    assert bool((sigma > 0).all()) and bool((sigma <= SIGMA_CAP).all())


def test_logit_normal_and_flow_uniform_stop_at_the_cap():
    assert draws(noise.logit_normal(8.0, 3.0)).max() == SIGMA_CAP
    assert draws(noise.flow_uniform(0.999, 1.0)).max() == SIGMA_CAP


def test_laws_cover_every_density():
    assert set(LAWS) | {"table"} == set(DENSITIES)
    assert isinstance(noise.ldm(), Schedule)
