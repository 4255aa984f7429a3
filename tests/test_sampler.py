"""Samplers have their order, keep the distribution, and equal diffusers' and smalldiffusion's states step by step.

D is exact (a mixture of Gaussians), so every deviation is the sampler's. The references run in float64 (`in_float64`).
"""

import math
from functools import cache, partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from reference import in_float64, smalldiffusion
from scipy.integrate import quad, solve_ivp
from torch.testing import assert_close

from nanodiffusion import noise, sampler
from nanodiffusion.errors import UserError
from nanodiffusion.sampler import STEPS, ImageNoise, sample, start

F64 = torch.float64
MEAN, STD = 1.0, 0.3  # each coordinate of x0: +-MEAN with equal chance, plus N(0, STD^2)


def mixture(x, sigma):
    """E[x0 | x] of the mixture: (b ...), (b) -> (b ...)."""
    s2 = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1)) ** 2
    v = STD**2 + s2
    return (STD**2 * x + s2 * MEAN * torch.tanh(MEAN * x / v)) / v


def gaussian(x, sigma, mean=0.7, std=0.5):
    s2 = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1)) ** 2
    return (std**2 * x + s2 * mean) / (std**2 + s2)


def normal(seed, *shape, dtype=F64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(seed):
    """Unit noise from one generator, in the order in which it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def states(D, x, sigmas, step, noise=None):
    return torch.stack([state.x for state in sample(D, x, sigmas, step, noise or seeded(0))])


# -- order of convergence: log-uniform ladders from 5 to 0.3 on the mixture, against scipy at rtol 1e-13

HIGH, LOW = 5.0, 0.3
X_HIGH = HIGH * torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.7, 0.1]], dtype=F64)


def smooth(steps):
    return torch.linspace(math.log(HIGH), math.log(LOW), steps + 1, dtype=F64).exp()


def exact(x, s, s_next):
    """The solution of dx/dsigma = (x - D) / sigma."""

    def slope(sigma, flat):
        at = torch.from_numpy(flat).reshape(x.shape)
        return ((at - mixture(at, torch.full((len(x),), sigma, dtype=F64))) / sigma).flatten().numpy()

    flat = solve_ivp(slope, (s, s_next), x.flatten().numpy(), method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
    return torch.from_numpy(flat).reshape(x.shape)


@cache
def solution():
    return exact(X_HIGH, HIGH, LOW)


def observed_order(run, steps):
    few, many = (float((run(k) - solution()).norm()) for k in (steps, 2 * steps))
    return math.log2(few / many)


ORDERS = {  # name: (step, theory, steps)
    "euler": (sampler.euler, 1, 128),
    "ddim": (STEPS["ddim"], 1, 128),
    "gradient_estimation(2, 0)": (sampler.gradient_estimation, 1, 256),
    "heun": (sampler.heun, 2, 64),
    "rk4": (sampler.rk4, 4, 32),
    "lms order 2": (partial(sampler.lms, order=2), 2, 128),
    "dpmpp_2m": (sampler.dpmpp_2m, 2, 128),
    "dpmpp_2m_sde(eta=0)": (partial(sampler.dpmpp_2m_sde, eta=0.0), 2, 128),
    # UniPC-p: the predictor has order p, its corrector makes it p + 1 (Zhao et al. 2023, theorem 3.1)
    "unipc order 1": (partial(sampler.unipc, order=1), 2, 128),
    "unipc order 2": (partial(sampler.unipc, order=2), 3, 256),
}


@pytest.mark.parametrize("name", ORDERS)
def test_sampler_converges_at_its_order(name):
    step, theory, steps = ORDERS[name]
    run = lambda k: states(mixture, X_HIGH, smooth(k), step)[-1]
    assert observed_order(run, steps) == pytest.approx(theory, abs=0.1)


def after_exact_start(step, steps, warm, memorise):
    """The sampler from its `warm`-th step on, with what it would remember of an exact past."""
    levels = smooth(steps).tolist()
    x, history = X_HIGH, []
    for s, s_next in pairwise(levels[: warm + 1]):
        history.insert(0, (memorise(x, mixture(x, torch.full((3,), s, dtype=F64)), s), s))
        x = exact(x, s, s_next)
    memory = history
    for s, s_next in pairwise(levels[warm:]):
        x, _, memory = step(mixture, x, s, s_next, memory, None)
    return x


MULTISTEP = {  # a multistep method begins at order 1, which hides its order: here it begins with an exact past
    "lms order 4": (sampler.lms, 3, lambda x, x0, s: (x - x0) / s, 4, 256),
    "lms order 3": (partial(sampler.lms, order=3), 2, lambda x, x0, s: (x - x0) / s, 3, 256),
    "dpmpp_3m_sde(eta=0)": (partial(sampler.dpmpp_3m_sde, eta=0.0), 2, lambda x, x0, s: x0, 2, 128),
}


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_sampler_converges_at_its_order_after_an_exact_start(name):
    step, warm, memorise, theory, steps = MULTISTEP[name]
    order = observed_order(lambda k: after_exact_start(step, k, warm, memorise), steps)
    assert order == pytest.approx(theory, abs=0.1)


def test_unipc_of_order_three_converges_at_least_at_order_three():
    run = lambda k: states(mixture, X_HIGH, smooth(k), partial(sampler.unipc, order=3))[-1]
    assert observed_order(run, 128) > 2.9


# -- stochastic samplers keep the distribution

STOCHASTIC = {
    "ddpm": (STEPS["ddpm"], 400),
    "euler_ancestral": (STEPS["euler_ancestral"], 400),
    "ddim eta 0.5": (partial(sampler.ancestral, eta=0.5), 400),
    "gradient_estimation(1, 0.5)": (partial(sampler.gradient_estimation, gam=1.0, mu=0.5), 400),
    "heun churn": (partial(sampler.heun, churn=0.1), 100),
    "dpmpp_2m_sde": (sampler.dpmpp_2m_sde, 150),
    "dpmpp_2m_sde eta 0.5": (partial(sampler.dpmpp_2m_sde, eta=0.5), 150),
    "dpmpp_3m_sde": (sampler.dpmpp_3m_sde, 150),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_sampler_keeps_mean_and_variance_of_a_mixture(name):
    step, steps = STOCHASTIC[name]
    n, sigmas = 20_000, noise.karras(noise.log_linear(100, 0.01, 20.0), steps)
    x0 = torch.where(normal(1, n) > 0, MEAN, -MEAN) + STD * normal(2, n)
    x = states(mixture, (x0 + sigmas[0] * normal(3, n))[:, None], sigmas, step, seeded(4))[-1]
    variance = MEAN**2 + STD**2
    fourth = MEAN**4 + 6 * MEAN**2 * STD**2 + 3 * STD**4
    assert abs(float(x.mean())) < 4 * math.sqrt(variance / n)
    assert abs(float(x.square().mean()) - variance) < 4 * math.sqrt((fourth - variance**2) / n)


# -- the same states as diffusers, step by step

LDM = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PLAIN = {"clip_sample": False, **LDM}
KARRAS = {"use_karras_sigmas": True, **LDM}
DPM, UNIPC = partial(DPMSolverMultistepScheduler, **KARRAS), partial(UniPCMultistepScheduler, **KARRAS)
DIFFUSERS = {  # name: (step, scheduler, options of its step, whether its x is sqrt(abar) times ours)
    "ddim": (STEPS["ddim"], partial(DDIMScheduler, timestep_spacing="trailing", **PLAIN), {}, True),
    "ddim leading": (STEPS["ddim"], partial(DDIMScheduler, **PLAIN), {}, True),
    "ddim eta 0.5": (partial(sampler.ancestral, eta=0.5), partial(DDIMScheduler, **PLAIN), {"eta": 0.5}, True),
    "ddim eta 1": (partial(sampler.ancestral, eta=1.0), partial(DDIMScheduler, **PLAIN), {"eta": 1.0}, True),
    "ddpm": (STEPS["ddpm"], partial(DDPMScheduler, **PLAIN), {}, True),
    "ddpm as gradient estimation": (
        partial(sampler.gradient_estimation, gam=1.0, mu=0.5),
        partial(DDPMScheduler, **PLAIN),
        {},
        True,
    ),
    "euler": (sampler.euler, partial(EulerDiscreteScheduler, **KARRAS), {}, False),
    "euler_ancestral": (STEPS["euler_ancestral"], partial(EulerAncestralDiscreteScheduler, **LDM), {}, False),
    "heun": (sampler.heun, partial(HeunDiscreteScheduler, **KARRAS), {}, False),
    "lms": (sampler.lms, partial(LMSDiscreteScheduler, **KARRAS), {}, False),
    "lms order 2": (partial(sampler.lms, order=2), partial(LMSDiscreteScheduler, **KARRAS), {"order": 2}, False),
    "dpmpp_2m": (sampler.dpmpp_2m, DPM, {}, True),
    "dpmpp_2m_sde": (sampler.dpmpp_2m_sde, partial(DPM, algorithm_type="sde-dpmsolver++"), {}, True),
    "dpmpp_3m eta 0": (
        partial(sampler.dpmpp_3m_sde, eta=0.0),
        partial(DPM, solver_order=3, solver_type="heun", lower_order_final=False),
        {},
        True,
    ),
    "unipc": (sampler.unipc, UNIPC, {}, True),
    "unipc order 1": (partial(sampler.unipc, order=1), partial(UNIPC, solver_order=1), {}, True),
    # an order of 3 at the last step to 0 divides by infinity: theirs ends at sigma_min
    "unipc order 3": (
        partial(sampler.unipc, order=3),
        partial(
            UniPCMultistepScheduler,
            solver_order=3,
            lower_order_final=False,
            final_sigmas_type="sigma_min",
            **LDM,
        ),
        {},
        True,
    ),
}
HAS_SEED = (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler)


def diffusers_states(make, steps, x, options, scaled, seed):
    """(ladder, states): diffusers' own ladder and its x after every step, both as x = x0 + sigma eps."""
    with in_float64():
        scheduler = make()
        scheduler.set_timesteps(steps)
        if isinstance(scheduler, DDIMScheduler | DDPMScheduler):
            abar = scheduler.alphas_cumprod[scheduler.timesteps]
            sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1)])
        else:
            sigmas = scheduler.sigmas
            scheduler.set_begin_index(0)
        if isinstance(scheduler, HAS_SEED):
            options = {**options, "generator": torch.Generator().manual_seed(seed)}
        factor = (1 + sigmas**2).rsqrt() if scaled else torch.ones_like(sigmas)
        y, out = sigmas[0] * x * factor[0], []
        for i, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(y, t)
            x_i = y / factor[i]
            eps = (x_i - mixture(x_i, sigmas[i].expand(len(x)))) / sigmas[i]
            y = scheduler.step(eps, t, y, **options).prev_sample
            out.append(y / factor[i + 1])
    return sigmas, torch.stack(out)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_states_equal_diffusers(name, steps):
    step, make, options, scaled = DIFFUSERS[name]
    x = normal(9, 4, 3, 2)
    sigmas, want = diffusers_states(make, steps, x, options, scaled, seed=11)
    if name == "heun":  # its lists hold every level but the first twice
        sigmas, want = torch.cat([sigmas[:1], sigmas[1::2]]), torch.cat([want[1:-1:2], want[-1:]])
    assert_close(states(mixture, sigmas[0] * x, sigmas, step, seeded(11)), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gam", [1.0, 1.6, 2.0])
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.5])
def test_gradient_estimation_equals_smalldiffusion(gam, mu):
    with in_float64():
        torch.manual_seed(0)
        model = smalldiffusion().TimeInputMLP(hidden_dims=(16, 32, 16)).eval()
        schedule = smalldiffusion().ScheduleLogLinear(200, 0.02, 10)
        sigmas = torch.cat([schedule.sample_sigmas(20)[:-1], torch.zeros(1)])
        draw = seeded(1)
        model.rand_input = lambda b: draw(torch.empty(b, 2, dtype=F64))
        xt, cpu = sigmas[0] * normal(2, 6, 2), SimpleNamespace(device="cpu")
        want = torch.stack(list(smalldiffusion().samples(model, sigmas, gam, mu, xt=xt, accelerator=cpu)))
        step = partial(sampler.gradient_estimation, gam=gam, mu=mu)
        D = lambda x, s: x - s[:, None] * model(x, s[:, None])
        assert_close(states(D, xt, sigmas, step, seeded(1)), want, rtol=1e-10, atol=1e-10)


def karras_algorithm_2(x, sigmas, churn, s_min, s_max, s_noise, draw):
    """Karras et al. 2022, algorithm 2, line by line (S_churn / N = churn)."""
    for t, t_next in pairwise(sigmas.tolist()):
        gamma = churn if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        if gamma:
            x = x + math.sqrt(t_hat**2 - t**2) * s_noise * draw(x)
        d = (x - mixture(x, torch.tensor([t_hat]))) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next:
            d_next = (x_next - mixture(x_next, torch.tensor([t_next]))) / t_next
            x_next = x + (t_next - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    return x


def test_heun_with_churn_is_karras_algorithm_2():
    sigmas, x = noise.karras(noise.ldm(), 12), 14.6 * normal(0, 5, 3)
    options = {"churn": 0.3, "s_tmin": 0.05, "s_tmax": 5.0, "s_noise": 1.003}
    got = states(mixture, x, sigmas, partial(sampler.heun, **options), seeded(1))[-1]
    want = karras_algorithm_2(x, sigmas, 0.3, 0.05, 5.0, 1.003, seeded(1))
    assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_dpmpp_3m_sde_integrates_the_extrapolated_d():
    """D = f(-ln sigma) of degree 2: the mean is the exact integral, the curvature halved as published."""
    c0, c1, c2, eta = 0.3, -0.8, 0.5, 1.0
    levels = [3.0, 2.0, 1.1, 0.7]
    f = lambda u: c0 + c1 * u + c2 * u**2
    D = lambda x, s: f((1.1 / s).log()).to(x).reshape(-1, 1).expand_as(x)
    step, silent = partial(sampler.dpmpp_3m_sde, eta=eta), torch.zeros_like
    x = torch.tensor([[2.0]], dtype=F64)
    before, after = states(D, x, torch.tensor(levels, dtype=F64), step, silent)[-2:]
    h = math.log(1.1 / 0.7)
    kernel = lambda u: (1 + eta) * math.exp(-(1 + eta) * (h - u)) * (c0 + c1 * u + c2 / 2 * u**2)
    assert_close(after, math.exp(-(1 + eta) * h) * before + quad(kernel, 0, h)[0], rtol=1e-10, atol=1e-10)


def test_euler_in_flow_time_is_euler_in_sigma():
    t = torch.linspace(0.999, 0, 26, dtype=F64)
    y = normal(0, 5, 2)  # y = (1 - t) x0 + t eps, dy/dt = eps - x0
    x = y / (1 - t[0])
    for now, then in pairwise(t):
        sigma = now / (1 - now)
        x0 = mixture(y / (1 - now), sigma.expand(5))
        eps = (y - (1 - now) * x0) / now
        y = y + (then - now) * (eps - x0)
    assert_close(states(mixture, x, t / (1 - t), sampler.euler)[-1], y, rtol=1e-12, atol=1e-12)


def test_2m_sde_without_noise_is_2m():
    sigmas, x = noise.karras(noise.ldm(), 12), 14.6 * normal(0, 5, 3)
    sde = states(mixture, x, sigmas, partial(sampler.dpmpp_2m_sde, eta=0.0))
    assert_close(sde, states(mixture, x, sigmas, sampler.dpmpp_2m), rtol=1e-12, atol=1e-12)


# -- every step

ALL = {**STEPS, "heun_churn": partial(sampler.heun, churn=0.2), "unipc_3": partial(sampler.unipc, order=3)}
DETERMINISTIC = ["ddim", "gradient_estimation", "euler", "heun", "rk4", "lms", "dpmpp_2m", "unipc", "unipc_3"]
each_step = pytest.mark.parametrize("step", ALL.values(), ids=ALL)


@each_step
@pytest.mark.parametrize("sigma", [0.03, 14.6, 4095.0])
def test_one_step_to_zero_is_d(step, sigma):
    if step is ALL["heun_churn"]:
        step = partial(step, s_tmax=0.0)  # D at the churned level otherwise
    x = sigma * normal(0, 6, 3, dtype=torch.float32)
    (state,) = sample(mixture, x, torch.tensor([sigma, 0.0]), step)
    assert_close(state.x, mixture(x, torch.full((6,), sigma)), rtol=1e-6, atol=1e-6)
    assert torch.equal(state.x, state.x0)


@each_step
@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("schedule", ["ldm", "flow"])
def test_any_number_of_steps_gives_finite_states(step, steps, schedule):
    sigmas = noise.trailing(noise.SCHEDULES[schedule](1000), steps)
    out = states(mixture, sigmas[0] * normal(0, 2, 3, dtype=torch.float32), sigmas, step)
    assert len(out) == steps and bool(out.isfinite().all())
    assert out[-1].abs().max() < MEAN + 6 * STD


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [6, 12, 30])
def test_what_a_net_gets_wrong_is_not_blown_up_on_the_way_from_pure_noise(name, steps):
    sigmas = noise.trailing(noise.SCHEDULES["flow"](1000), steps)
    x, off = float(sigmas[0]) * normal(0, 6, 3), 0.01
    wrong = lambda x, sigma: gaussian(x, sigma) + off * torch.cos(5 * sigma.log()).reshape(-1, 1)
    right, found = (states(D, x, sigmas, ALL[name])[-1] for D in (gaussian, wrong))
    assert (found - right).abs().max() < 3 * off


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_thousand_steps_give_the_exact_flow_of_a_gaussian(name):
    sigmas, mean, std = noise.karras(noise.ldm(), 1000), 0.7, 0.5
    x = float(sigmas[0]) * normal(0, 6, 3)
    want = mean + (x - mean) * std / math.sqrt(std**2 + float(sigmas[0]) ** 2)
    assert_close(states(gaussian, x, sigmas, ALL[name])[-1], want, rtol=0, atol=5e-3)


@each_step
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_state_is_fp32_or_fp64_whatever_d_gives(step, dtype):
    x = 10 * normal(0, 4, 3).to(dtype)
    D = lambda x, s: gaussian(x, s).to(torch.bfloat16)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    for state in sample(D, x, noise.karras(noise.ldm(), 4), step):
        assert state.x.dtype == state.x0.dtype == want


@each_step
def test_d_is_asked_once_per_image_with_float64_levels_on_the_cpu(step):
    def D(x, sigma):
        assert sigma.shape == (5,) and sigma.dtype == F64 and sigma.device.type == "cpu"
        assert not torch.is_grad_enabled()
        return gaussian(x, sigma)

    states(D, normal(0, 5, 3), noise.karras(noise.ldm(), 4), step)
    assert torch.is_grad_enabled()


EVALUATIONS = {"heun": 2, "heun_churn": 2, "rk4": 4}


@pytest.mark.parametrize("name", ALL)
def test_evaluations_per_step(name):
    asked = []
    D = lambda x, s: (asked.append(float(s[0])), gaussian(x, s))[1]
    states(D, normal(0, 2, 3), noise.karras(noise.ldm(), 6), ALL[name])
    assert len(asked) == 5 * EVALUATIONS.get(name, 1) + 1


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "lms", "heun"])
def test_state_tells_x_x0_levels_and_step(name):
    sigmas, x = noise.karras(noise.ldm(), 5), 14.6 * normal(0, 4, 3)
    for k, state in enumerate(sample(mixture, x, sigmas, ALL[name])):
        assert (state.sigma, state.sigma_next, state.step) == (float(sigmas[k]), float(sigmas[k + 1]), k)
        assert_close(state.x0, mixture(x, sigmas[k].expand(4)), rtol=0, atol=0)
        x = state.x
    assert k == 4


@each_step
def test_sampling_leaves_its_inputs_alone(step):
    x, sigmas = 14.6 * normal(0, 4, 3), noise.karras(noise.ldm(), 4)
    before, seen = x.clone(), []
    for state in sample(mixture, x, sigmas, step):
        seen.append((state, state.x.clone(), state.x0.clone()))
    assert torch.equal(x, before)
    assert all(torch.equal(s.x, x) and torch.equal(s.x0, x0) for s, x, x0 in seen)


def test_the_loop_can_be_left_early():
    for state in sample(mixture, normal(0, 4, 3), noise.karras(noise.ldm(), 50)):
        if state.step == 2:
            break
    assert state.step == 2 and torch.is_grad_enabled()


# -- seeds and starts


@pytest.mark.parametrize("name", ["ddpm", "gradient_estimation", "heun_churn", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc"])
def test_an_image_is_the_same_alone_and_in_a_batch(name):
    seeds, sigmas = range(100, 108), noise.karras(noise.ldm(), 6)
    step = ALL[name] if name != "gradient_estimation" else partial(ALL[name], mu=0.5)

    def run(seeds):
        draw = ImageNoise(seeds)
        x, rest = start(sigmas, draw.draw(3, 8, 8))
        return states(mixture, x, rest, step, draw)[-1]

    batch = run(seeds)
    for i, seed in enumerate(seeds):
        assert_close(run([seed])[0], batch[i], rtol=0, atol=2e-6)
    assert not torch.allclose(batch[0], batch[1])


def test_image_noise_is_torchs_own_stream_of_each_seed():
    draw = ImageNoise([7, 8])
    first, second = draw.draw(2, 3), draw(torch.empty(2, 2, 3, dtype=F64))
    for i, seed in enumerate((7, 8)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first[i], torch.randn(2, 3, generator=generator))
        assert torch.equal(second[i], torch.randn(2, 3, generator=generator).double())
    assert second.dtype == F64


def test_a_seed_of_more_than_64_bits_is_said():
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(UserError, match="64 bits"):
            ImageNoise([0, seed])
    ImageNoise([2**64 - 1, -1])


def test_start_from_noise_is_the_whole_ladder():
    sigmas, eps = noise.karras(noise.ldm(), 10), normal(0, 4, 3)
    x, rest = start(sigmas, eps)
    assert_close(x, float(sigmas[0]) * eps)
    assert torch.equal(rest, sigmas)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.8, 8), (0.5, 5), (0.01, 1)])
def test_start_from_an_image_is_the_end_of_the_ladder(strength, steps):
    sigmas, eps, x0 = noise.karras(noise.ldm(), 10), normal(0, 4, 3), normal(1, 4, 3)
    x, rest = start(sigmas, eps, x0, strength)
    assert torch.equal(rest, sigmas[10 - steps :])
    assert_close(x, x0 + sigmas[10 - steps] * eps)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(UserError, match="strength"):
        start(noise.karras(noise.ldm(), 10), normal(0, 4, 3), normal(1, 4, 3), strength)
