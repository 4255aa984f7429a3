"""Every parameterisation is the paper's own: its input, its target, its loss, its exact answer (float64, 1e-12)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as tnf
from torch import nn
from torch.testing import assert_close

from nanodiffusion.denoiser import CLOCKS, DISTANCES, PREDICTIONS, WEIGHTS, Denoiser, edm
from nanodiffusion.errors import UserError
from nanodiffusion.noise import ldm

F64 = torch.float64
SIGMA = torch.tensor([0.02, 0.3, 1.0, 4.0, 14.6, 80.0], dtype=F64)
S = SIGMA[:, None, None]
DATA_STD, DATA_MEAN = 0.5, 0.3
close = partial(assert_close, rtol=1e-12, atol=1e-12)


def draw(seed, shape=(6, 3, 4)):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X0, EPS = draw(0), draw(1)
X = X0 + S * EPS
ABAR = 1 / (1 + S**2)  # the variance-preserving papers: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps
T = S / (1 + S)  # the linear path: x_t = (1 - t) x0 + t eps
VP = ABAR.sqrt() * X0 + (1 - ABAR).sqrt() * EPS
LINEAR = (1 - T) * X0 + T * EPS
KARRAS_IN = X / (S**2 + DATA_STD**2).sqrt()
KARRAS_SKIP = DATA_STD**2 / (S**2 + DATA_STD**2)
KARRAS_OUT = S * DATA_STD / (S**2 + DATA_STD**2).sqrt()

PAPERS = {  # name: (what the network sees, what it should answer)
    "eps": (VP, EPS),
    "x0": (VP, X0),
    "x0_linear": (LINEAR, X0),
    "v": (VP, ABAR.sqrt() * EPS - (1 - ABAR).sqrt() * X0),
    "flow": (LINEAR, EPS - X0),
    "edm": (KARRAS_IN, (X0 - KARRAS_SKIP * X) / KARRAS_OUT),
}


class Recorder(nn.Module):
    """Answers a fixed tensor and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, t, **cond):
        self.x, self.t, self.cond = x, t, cond
        return self.answer


@pytest.mark.parametrize("name", PREDICTIONS)
def test_network_input_is_the_papers_x_t(name):
    net = Recorder(X)
    Denoiser(net, name)(X, SIGMA)
    close(net.x, PAPERS[name][0])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_target_is_the_papers(name):
    close(Denoiser(nn.Identity(), name).target(X0, SIGMA, EPS), PAPERS[name][1])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_network_that_answers_the_papers_target_denoises_exactly(name):
    # x0 = x - sigma eps at sigma = 80 leaves 80 * 2^-53 and a few roundings
    assert_close(Denoiser(Recorder(PAPERS[name][1]), name)(X, SIGMA), X0, rtol=0, atol=1e-12 * 80)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_loss_is_torchs_distance_to_the_papers_target(name, distance):
    torch_loss = {"mse": tnf.mse_loss, "l1": tnf.l1_loss, "huber": tnf.huber_loss, "smooth_l1": tnf.smooth_l1_loss}
    answer, net_input = draw(2), PAPERS[name][0]
    net = Recorder(answer)
    loss = Denoiser(net, name).loss(X0, SIGMA, EPS, distance=distance)
    want = [torch_loss[distance](f, target) for f, target in zip(answer, PAPERS[name][1])]
    close(loss, torch.stack(want))
    close(net.x, net_input)


SNR = 1 / SIGMA**2
PAPER_WEIGHTS = {  # (weight, prediction): the papers' factor of |F - target|^2
    **{("one", p): torch.ones_like(SNR) for p in ("eps", "x0", "v")},
    # Ho et al. 2020: the simple eps loss, seen from the other targets (Salimans & Ho 2022, section 4)
    ("snr", "eps"): torch.ones_like(SNR),
    ("snr", "x0"): SNR,
    ("snr", "v"): SNR / (SNR + 1),
    # Hang et al. 2023, section 3.4
    ("min_snr", "eps"): SNR.clamp(max=5) / SNR,
    ("min_snr", "x0"): SNR.clamp(max=5),
    ("min_snr", "v"): SNR.clamp(max=5) / (SNR + 1),
    # Karras et al. 2022, table 1: lambda(sigma) on the x0 error, |eps error|^2 = SNR |x0 error|^2
    ("edm", "eps"): (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2 / SNR,
    ("edm", "x0"): (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2,
    ("edm", "v"): (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2 / (SNR + 1),
    # Kingma & Gao 2023: sigmoid(b - log SNR) on the eps error, b = 2
    ("sigmoid", "eps"): torch.sigmoid(2 - SNR.log()),
    ("sigmoid", "x0"): torch.sigmoid(2 - SNR.log()) * SNR,
    ("sigmoid", "v"): torch.sigmoid(2 - SNR.log()) * SNR / (SNR + 1),
    # Choi et al. 2022, eq. 8: 1 / (1 + SNR) on the eps error
    ("p2", "eps"): 1 / (1 + SNR),
    ("p2", "x0"): SNR / (1 + SNR),
    ("p2", "v"): SNR / (1 + SNR) ** 2,
}


@pytest.mark.parametrize(("weight", "name"), PAPER_WEIGHTS)
def test_weighted_loss_is_the_papers(weight, name):
    answer = draw(3)
    loss = Denoiser(Recorder(answer), name).loss(X0, SIGMA, EPS, weight=WEIGHTS[weight])
    error = ((answer - PAPERS[name][1]) ** 2).flatten(1).mean(1)
    assert_close(loss, PAPER_WEIGHTS[weight, name] * error, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize(("weight", "of_x0_error"), [("snr", SNR), ("min_snr", SNR.clamp(max=5))])
def test_a_weight_is_the_same_x0_loss_for_every_prediction(name, weight, of_x0_error):
    denoiser = Denoiser(Recorder(draw(4)), name)
    error = ((denoiser(X, SIGMA) - X0) ** 2).flatten(1).mean(1)
    loss = denoiser.loss(X0, SIGMA, EPS, weight=WEIGHTS[weight])
    assert_close(loss, of_x0_error * error, rtol=1e-10, atol=1e-12)


def test_edm_weight_makes_karras_loss_uniform():
    weight = WEIGHTS["edm"](SIGMA, KARRAS_OUT.flatten())
    close(weight, torch.ones_like(weight))


def test_edm_takes_the_data_std():
    net = Recorder(X)
    Denoiser(net, edm(2.0))(X, SIGMA)
    close(net.x, X / (S**2 + 4).sqrt())


@pytest.mark.parametrize("name", PREDICTIONS)
def test_guidance_in_d_space_equals_guidance_in_f_space(name):
    f_cond, f_uncond, scale = draw(5), draw(6), 7.5
    d_cond, d_uncond, d_guided = (
        Denoiser(Recorder(f), name)(X, SIGMA) for f in (f_cond, f_uncond, f_uncond + scale * (f_cond - f_uncond))
    )
    assert_close(d_uncond + scale * (d_cond - d_uncond), d_guided, rtol=1e-12, atol=1e-10)


class GaussianNet(nn.Module):
    """The optimal network for x0 ~ N(m, v), each written in its paper's own coordinates and clock."""

    def __init__(self, name):
        super().__init__()
        self.answer = getattr(self, name)

    def forward(self, x, t):
        return self.answer(x, t[:, None, None])

    def posterior(self, x_t, a, b):
        """E[x0 | a x0 + b eps] and E[eps | ...] by Gaussian conditioning."""
        m, v = DATA_MEAN, DATA_STD**2
        total = a**2 * v + b**2
        return m + a * v / total * (x_t - a * m), b / total * (x_t - a * m)

    def vp(self, x_t, t):
        sigma = (4 * t).exp()
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()

    def eps(self, x_t, t):
        return self.posterior(x_t, *self.vp(x_t, t))[1]

    def x0(self, x_t, t):
        return self.posterior(x_t, *self.vp(x_t, t))[0]

    def v(self, x_t, t):
        a, b = self.vp(x_t, t)
        x0, eps = self.posterior(x_t, a, b)
        return a * eps - b * x0

    def x0_linear(self, x_t, t):
        return self.posterior(x_t, 1 - t, t)[0]

    def flow(self, x_t, t):
        x0, eps = self.posterior(x_t, 1 - t, t)
        return eps - x0

    def edm(self, x_in, t):
        sigma = (4 * t).exp()
        x = x_in * (sigma**2 + DATA_STD**2).sqrt()
        x0, _ = self.posterior(x, torch.ones_like(sigma), sigma)
        return (x0 - KARRAS_SKIP * x) / KARRAS_OUT


@pytest.mark.parametrize("name", PREDICTIONS)
def test_denoiser_of_the_optimal_network_is_the_posterior_mean(name):
    clock = "flow" if name in ("flow", "x0_linear") else "log"
    v = DATA_STD**2
    want = (v * X + S**2 * DATA_MEAN) / (v + S**2)
    assert_close(Denoiser(GaussianNet(name), name, clock)(X, SIGMA), want, rtol=0, atol=1e-12 * 80)


@pytest.mark.parametrize(
    ("clock", "want"), [("log", SIGMA.log() / 4), ("flow", SIGMA / (1 + SIGMA)), (lambda s: 3 * s, 3 * SIGMA)]
)
def test_clock(clock, want):
    net = Recorder(X)
    Denoiser(net, "eps", clock)(X, SIGMA)
    close(net.t, want)


def test_table_clock_is_the_training_step():
    net, steps = Recorder(X), torch.tensor([0.0, 1.0, 10.0, 250.0, 500.5, 999.0], dtype=F64)
    Denoiser(net, "eps", "table", ldm())(X, ldm().sigma(steps))
    assert_close(net.t, steps, rtol=0, atol=1e-9)


def test_table_clock_needs_a_schedule():
    with pytest.raises(UserError, match="schedule"):
        Denoiser(nn.Identity(), "eps", "table")


@pytest.mark.parametrize(("options", "hint"), [({"prediction": "epss"}, "'eps'"), ({"clock": "logg"}, "'log'")])
def test_unknown_names_are_answered_with_the_nearest(options, hint):
    with pytest.raises(UserError, match=f"did you mean {hint}"):
        Denoiser(nn.Identity(), **options)


def test_unknown_distance_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'huber'"):
        Denoiser(Recorder(X)).loss(X0, SIGMA, EPS, distance="hubert")


def test_conditioning_reaches_the_network_unchanged():
    net, cond = Recorder(X), {"label": torch.arange(6), "text": draw(7, (6, 2))}
    denoiser = Denoiser(net)
    for call in (lambda: denoiser(X, SIGMA, cond), lambda: denoiser.loss(X0, SIGMA, EPS, cond)):
        call()
        assert net.cond.keys() == cond.keys() and all(net.cond[k] is cond[k] for k in cond)


def test_raw_is_the_networks_own_output():
    net = Recorder(draw(8))
    assert_close(Denoiser(net, "v").raw(X, SIGMA, {}), net.answer)
    close(net.x, VP)


def test_every_clock_and_distance_is_tested():
    assert set(CLOCKS) == {"log", "flow", "table"} and set(WEIGHTS) == {w for w, _ in PAPER_WEIGHTS}


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x, t):
        self.out = self.layer(x)
        return self.out


@pytest.mark.parametrize("name", PREDICTIONS)
def test_bf16_products_keep_the_dtype_of_x(name):
    x, x0, eps, sigma = X.float(), X0.float(), EPS.float(), SIGMA.float()
    net = Linear()
    low, full = Denoiser(net, name, precision=torch.bfloat16), Denoiser(net, name)
    d, loss = low(x, sigma), low.loss(x0, sigma, eps)
    assert net.out.dtype == torch.bfloat16
    assert d.dtype == loss.dtype == low.raw(x, sigma, {}).dtype == torch.float32
    assert_close(low.raw(x, sigma, {}), full.raw(x, sigma, {}), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_d_keeps_the_dtype_of_x_on_a_float64_ladder(dtype):
    d = Denoiser(Linear().to(dtype))(X.to(dtype), SIGMA)
    assert d.dtype == dtype


def test_loss_has_the_gradient_of_the_papers_loss():
    net, twin = Linear().double(), Linear().double()
    Denoiser(net, "eps").loss(X0, SIGMA, EPS).mean().backward()
    tnf.mse_loss(twin(VP, None), EPS).backward()
    close(net.layer.weight.grad, twin.layer.weight.grad)
