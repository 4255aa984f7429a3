"""Guidance in D-space: the papers' formulas, diffusers' rescaling, analytic gradients of a loss."""

import itertools
import math
from functools import partial

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import nn
from torch.testing import assert_close

from nanodiffusion import guidance, noise
from nanodiffusion.denoiser import PREDICTIONS, Denoiser
from nanodiffusion.sampler import STEPS, euler, heun, sample

F64 = torch.float64
close = partial(assert_close, rtol=1e-12, atol=1e-12)


def normal(seed, *shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X, SIGMA = normal(0, 4, 3, 5), torch.full((4,), 2.0, dtype=F64)
COND, UNCOND = {"text": normal(1, 4, 5)}, {"text": normal(2, 4, 5)}


class Net(nn.Module):
    """Nonlinear in x and in its conditioning; remembers the batch sizes it was asked."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=F64))

    def forward(self, x, t, text):
        self.batches.append(len(x))
        return torch.sin(self.scale * x + text[:, None]) * (1 + t[:, None, None])


@pytest.fixture
def denoiser():
    return Denoiser(Net(), "v")


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_cfg_is_its_formula_in_one_batch(denoiser, scale):
    d_c, d_u = denoiser(X, SIGMA, COND), denoiser(X, SIGMA, UNCOND)
    denoiser.net.batches.clear()
    close(guidance.cfg(denoiser, COND, UNCOND, scale)(X, SIGMA), d_u + scale * (d_c - d_u))
    assert denoiser.net.batches == [8]


@pytest.mark.parametrize("name", PREDICTIONS)
def test_cfg_on_d_is_the_usual_cfg_on_the_networks_output(name):
    denoiser, scale = Denoiser(Net(), name), 5.0
    f_c, f_u = (denoiser.raw(X, SIGMA, cond) for cond in (COND, UNCOND))
    c_skip, c_out, _ = denoiser.prediction.coefficients(torch.tensor(2.0, dtype=F64))
    got = guidance.cfg(denoiser, COND, UNCOND, scale)(X, SIGMA)
    close(got, c_skip * X + c_out * (f_u + scale * (f_c - f_u)))


def test_scale_one_is_no_guidance_and_asks_once(denoiser):
    want = denoiser(X, SIGMA, COND)
    denoiser.net.batches.clear()
    assert torch.equal(guidance.cfg(denoiser, COND, UNCOND, 1.0)(X, SIGMA), want)
    assert denoiser.net.batches == [4]


@pytest.mark.parametrize(
    ("sigma", "guided"), [(0.1, False), (0.5, True), (1.0, True), (3.0, True), (3.1, False), (80.0, False)]
)
def test_outside_its_interval_cfg_is_the_conditional_d(denoiser, sigma, guided):
    level = torch.full((4,), sigma, dtype=F64)
    d_c, d_u = denoiser(X, level, COND), denoiser(X, level, UNCOND)
    got = guidance.cfg(denoiser, COND, UNCOND, 4.0, lo=0.5, hi=3.0)(X, level)
    close(got, d_u + 4 * (d_c - d_u) if guided else d_c)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescale_is_diffusers_formula_on_d(denoiser, rescale):
    d_c, d_u = denoiser(X, SIGMA, COND), denoiser(X, SIGMA, UNCOND)
    want = rescale_noise_cfg(d_u + 7.5 * (d_c - d_u), d_c, rescale)
    close(guidance.cfg(denoiser, COND, UNCOND, 7.5, rescale=rescale)(X, SIGMA), want)


def test_full_rescale_has_the_conditional_standard_deviation(denoiser):
    d = guidance.cfg(denoiser, COND, UNCOND, 7.5, rescale=1.0)(X, SIGMA)
    close(d.std((1, 2)), denoiser(X, SIGMA, COND).std((1, 2)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_autoguidance_moves_away_from_the_weak_model(denoiser, scale):
    main, weak = guidance.bind(denoiser, COND), guidance.bind(Denoiser(Net(), "eps"), COND)
    want = weak(X, SIGMA) + scale * (main(X, SIGMA) - weak(X, SIGMA))
    close(guidance.autoguide(main, weak, scale)(X, SIGMA), want)


def test_bind_fixes_the_conditioning(denoiser):
    close(guidance.bind(denoiser, COND)(X, SIGMA), denoiser(X, SIGMA, COND))


def test_unconditional_replace_the_labels_only():
    cond = {"label": torch.tensor([3, 1, 2]), "text": normal(0, 3, 2)}
    null = guidance.unconditional(cond, 10)
    assert torch.equal(null["label"], torch.tensor([10, 10, 10])) and null["text"] is cond["text"]
    assert torch.equal(cond["label"], torch.tensor([3, 1, 2]))


def test_zeros_replace_every_tensor_of_a_nested_conditioning():
    cond = {"text": normal(0, 3, 2), "hints": (normal(1, 3), [normal(2, 3, 4).float()])}
    zeros = guidance.zeros_like_cond(cond)
    assert torch.equal(zeros["text"], torch.zeros(3, 2, dtype=F64))
    assert torch.equal(zeros["hints"][0], torch.zeros(3, dtype=F64))
    assert torch.equal(zeros["hints"][1][0], torch.zeros(3, 4))


def test_cfg_batches_nested_conditioning():
    D = lambda x, s, cond: x * cond["hints"][0][:, None, None] + cond["label"][:, None, None]
    cond = {"label": torch.arange(4), "hints": (normal(0, 4),)}
    uncond = guidance.unconditional(cond, 9)
    want = D(X, SIGMA, uncond) + 3 * (D(X, SIGMA, cond) - D(X, SIGMA, uncond))
    close(guidance.cfg(D, cond, uncond, 3.0)(X, SIGMA), want)


# -- loss guidance: x0 - scale sigma^2 dloss/dx

TARGET, STD = normal(5, 4, 3, 5), 0.5


def gaussian(x, sigma):
    return STD**2 / (STD**2 + sigma.to(x)[:, None, None] ** 2) * x


def quadratic(x0):
    return ((x0 - TARGET.to(x0)) ** 2).flatten(1).sum(1)


@pytest.mark.parametrize("through_net", [False, True])
def test_loss_guidance_is_the_analytic_gradient_of_a_quadratic_loss(through_net):
    sigma = torch.tensor([0.1, 0.5, 2.0, 10.0], dtype=F64)
    s2 = sigma[:, None, None] ** 2
    x0, slope = gaussian(X, sigma), STD**2 / (STD**2 + s2)
    gradient = 2 * (x0 - TARGET) * (slope if through_net else 1)
    guided = guidance.loss_guidance(gaussian, quadratic, scale=0.05, through_net=through_net)
    close(guided(X, sigma), x0 - 0.05 * s2 * gradient)


@pytest.mark.parametrize("through_net", [False, True])
def test_loss_guidance_leaves_no_graph_and_no_gradients(denoiser, through_net):
    x = X.clone().requires_grad_()
    guided = guidance.loss_guidance(guidance.bind(denoiser, COND), quadratic, through_net=through_net)
    assert not guided(x, SIGMA).requires_grad
    assert x.grad is None and denoiser.net.scale.grad is None


def test_loss_guidance_differentiates_the_network_only_when_asked():
    seen = []
    D = lambda x, s: (seen.append(torch.is_grad_enabled()), gaussian(x, s))[1]
    for through_net in (False, True):
        guidance.loss_guidance(D, quadratic, through_net=through_net)(X, SIGMA)
    assert seen == [False, True]


def test_every_third_call_is_guided():
    guided = guidance.loss_guidance(gaussian, quadratic, scale=0.1, every=3)
    plain = gaussian(X, SIGMA)
    assert [not torch.equal(guided(X, SIGMA), plain) for _ in range(7)] == [True, False, False] * 2 + [True]


@pytest.mark.parametrize("through_net", [False, True])
@pytest.mark.parametrize("step", [euler, heun])
def test_loss_guidance_works_inside_the_sampler(step, through_net):
    D = guidance.loss_guidance(gaussian, quadratic, scale=0.02, through_net=through_net)
    sigmas = noise.karras(noise.log_linear(100, 0.02, 3.0), 20)
    *_, guided = sample(D, 3 * X, sigmas, step)
    *_, plain = sample(gaussian, 3 * X, sigmas, step)
    assert not guided.x.requires_grad
    assert bool((quadratic(guided.x) < quadratic(plain.x)).all())


def test_guidance_samples_the_tilted_gaussian():
    """With D_c, D_u of N(+-1, 1) equal widths, scale w gives exactly the law N(2w - 1, 1)."""
    D = lambda x, s, cond: (x + s.to(x)[:, None] ** 2 * cond["mean"][:, None]) / (1 + s.to(x)[:, None] ** 2)
    n, w, one = 6, 3.0, torch.ones(6, dtype=F64)
    x = 10 * normal(3, n, 2)
    guided = guidance.cfg(D, {"mean": one}, {"mean": -one}, w)
    *_, state = sample(guided, x, noise.karras(noise.log_linear(100, 0.002, 10.0), 400), heun)
    mean = 2 * w - 1
    assert_close(state.x, mean + (x - mean) / math.sqrt(1 + 10**2), rtol=0, atol=2e-3)


# -- keep: what is known is held in D

KNOWN, HOLE = normal(6, 2, 3, 5, 4), torch.zeros(2, 1, 5, 4, dtype=F64)
HOLE[0, :, 1:3, 2:], HOLE[1, :, :, 0] = 1, 1


def smooth(x, sigma):
    return torch.tanh(x + x.roll(1, -1)) / (1 + sigma.to(x)[:, None, None, None])


def test_keep_is_the_known_where_the_mask_is_0_and_d_where_it_is_1():
    x, sigma = normal(7, 2, 3, 5, 4), torch.full((2,), 2.0, dtype=F64)
    out, d = guidance.keep(smooth, KNOWN, HOLE)(x, sigma), smooth(x, sigma)
    hole = HOLE.expand_as(x) == 1
    assert torch.equal(out[~hole], KNOWN[~hole]) and torch.equal(out[hole], d[hole])
    soft = 0.3 * HOLE
    close(guidance.keep(smooth, KNOWN, soft)(x, sigma), KNOWN + soft * (d - KNOWN))


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "rk4", "lms", "dpmpp_2m", "unipc", "gradient_estimation"])
def test_under_keep_every_ode_step_is_a_step_with_the_known_blended_in_after_it(name):
    """Blending replaces x by KNOWN + sigma eps outside the hole, with the eps of the start (RePaint's, without renoising)."""
    eps, ladder = normal(8, 2, 3, 5, 4), torch.tensor([8.0, 5.0, 2.5, 1.0, 0.4, 0.0])
    start = KNOWN + 8 * eps
    D = guidance.keep(smooth, KNOWN, HOLE)
    for state in sample(D, start, ladder, STEPS[name]):
        outside = (KNOWN + state.sigma_next * eps) * (1 - HOLE)
        close(state.x * (1 - HOLE), outside, atol=1e-10)


def test_under_keep_a_multistep_solver_sees_inside_the_hole_what_blending_shows_it():
    eps, levels = normal(8, 2, 3, 5, 4), [8.0, 5.0, 2.5, 1.0, 0.4, 0.0]
    x, memory = KNOWN + 8 * eps, None
    for s, s_next in itertools.pairwise(levels):  # the plain solver, blended after every step
        x, _, memory = STEPS["dpmpp_2m"](smooth, x, s, s_next, memory, torch.zeros_like)
        x = HOLE * x + (1 - HOLE) * (KNOWN + s_next * eps)
    ladder = torch.tensor(levels, dtype=F64)
    *_, last = sample(guidance.keep(smooth, KNOWN, HOLE), KNOWN + 8 * eps, ladder, STEPS["dpmpp_2m"])
    close(last.x, x, atol=1e-10)


# -- stepwise: another denoiser for every step


@pytest.mark.parametrize(
    ("sigma", "step"), [(20.0, 0), (10.0, 0), (9.9, 0), (4.0, 1), (3.0, 1), (1.0, 2), (0.5, 2), (0.0, 2)]
)
@pytest.mark.parametrize("levels", [[10.0, 4.0, 1.0], [10.0, 4.0, 1.0, 0.0]])
def test_stepwise_asks_the_denoiser_of_the_step_a_level_belongs_to(levels, sigma, step):
    D = guidance.stepwise(levels, [lambda x, s, i=i: x + i for i in range(3)])
    assert torch.equal(D(torch.zeros(1), torch.tensor([sigma])), torch.full((1,), float(step)))


def test_a_solver_asks_the_denoiser_of_the_level_it_looks_at():
    asked, ladder = [], torch.tensor([9.0, 3.0, 1.0, 0.0])
    record = lambda i: lambda x, s: (asked.append(i), x)[1]
    [*sample(guidance.stepwise(ladder.tolist(), [record(i) for i in range(3)]), X, ladder, heun)]
    assert asked == [0, 1, 1, 2, 2]
