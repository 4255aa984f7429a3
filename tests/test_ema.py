"""Averages against explicit sums over the trajectory, and reconstruction against averages tracked directly."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nanodiffusion.config import make
from nanodiffusion.ema import (
    EMA,
    PROFILES,
    gamma_to_sigma_rel,
    load_snapshots,
    power,
    reconstruct,
    reconstruction_weights,
    save_snapshot,
    sigma_rel_to_gamma,
)
from nanodiffusion.errors import UserError


class Point(nn.Module):
    """A net that is nothing but weights, moved along a given trajectory."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    @torch.no_grad()
    def move(self, weight: np.ndarray) -> None:
        self.weight.copy_(torch.from_numpy(weight))
        self.count += 1


def track(path: np.ndarray, *profiles) -> list[EMA]:
    """The averages of a trajectory (steps + 1, size), whose first point is the initialisation."""
    net = Point(path.shape[1])
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(path[0]))
    emas = [EMA(net, profile) for profile in profiles]
    for step, point in enumerate(path[1:], 1):
        net.move(point)
        for ema in emas:
            ema.update(step)
    return emas


def explicit_average(path: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """sum_s (1 - beta_s) prod_{u > s} beta_u theta_s, the initialisation with the product of all."""
    later = np.append(np.cumprod(beta[::-1])[::-1][1:], 1.0)
    share = np.concatenate([[np.prod(beta)], (1 - beta) * later])
    assert abs(share.sum() - 1) < 1e-12
    return share @ path


def walk(steps: int, size: int, seed: int = 0) -> np.ndarray:
    """Training in miniature: a random walk pulled towards a target, noisy at every step."""
    rng = np.random.default_rng(seed)
    path = np.zeros((steps + 1, size))
    target = rng.standard_normal(size)
    for k in range(steps):
        path[k + 1] = path[k] + 4 / steps * (target - path[k]) + 0.05 * rng.standard_normal(size)
    return path


K = np.arange(1, 401)
BETAS = {
    "constant": ({"decay": 0.99}, np.full(400, 0.99)),
    "ramped": ({"decay": 0.95}, np.minimum(0.95, (1 + K) / (10 + K))),
    "warmup": ({"decay": 0.98, "gamma": 2.0, "power": 0.75}, np.minimum(0.98, 1 - (1 + K / 2) ** -0.75)),
    "half_life": (
        {"batch": 10, "images": 150, "ramp": 0.1},
        np.where(K == 1, 0, 2 ** (-10 / np.maximum(np.minimum(150, 0.1 * 10 * (K - 1)), 1e-8))),
    ),
    "power": ({"sigma_rel": 0.1}, (1 - 1 / K) ** 7.9376872),  # gamma = 6.94 in the paper
}


@pytest.mark.parametrize("name", PROFILES)
def test_average_is_the_explicit_weighted_sum(name):
    options, beta = BETAS[name]
    path = walk(400, 7) + 3
    (ema,) = track(path, PROFILES[name](**options))
    assert_close(ema.tensors["weight"].double(), torch.from_numpy(explicit_average(path, beta)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(sigma_rel, gamma):
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.25, 0.288])
def test_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    """Measured on s^gamma over [0, 1]."""
    g = sigma_rel_to_gamma(sigma_rel)
    s = (np.arange(200_000) + 0.5) / 200_000
    share = s**g / np.sum(s**g)
    width = np.sqrt(np.sum(share * s**2) - np.sum(share * s) ** 2)
    assert width == pytest.approx(sigma_rel, rel=1e-6)
    assert gamma_to_sigma_rel(g) == pytest.approx(sigma_rel, rel=1e-12)


def test_widest_profile_is_the_uniform_average():
    assert sigma_rel_to_gamma(12**-0.5) == pytest.approx(0, abs=1e-12)
    path = walk(100, 3)
    (ema,) = track(path, power(12**-0.5))
    assert_close(ema.tensors["weight"].double(), torch.from_numpy(path[1:].mean(0)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_power_average_of_a_monomial_is_analytic(sigma_rel):
    """theta(s) = s^k averages to (gamma + 1) / (gamma + 1 + k) t^k, up to the O(1 / t) of discrete steps."""
    t, k, gamma = 2000, np.array([0.5, 1, 2, 3]), sigma_rel_to_gamma(sigma_rel)
    path = (np.arange(t + 1)[:, None] / t) ** k
    (ema,) = track(path, power(sigma_rel))
    expected = torch.from_numpy((gamma + 1) / (gamma + 1 + k))
    assert_close(ema.tensors["weight"].double(), expected, rtol=2 / t * 3, atol=0)


def test_update_averages_low_precision_weights_in_fp32_and_copies_buffers():
    net = Point(4, torch.bfloat16)
    ema = EMA(net, PROFILES["constant"](decay=0.999))
    for step in range(1, 101):
        net.move(np.ones(4))
        ema.update(step)
    assert ema.tensors.keys() == {"weight", "count"}
    assert_close(ema.tensors["weight"], torch.full((4,), 1 - 0.999**100), rtol=1e-4, atol=0)
    assert_close(ema.tensors["count"], torch.tensor(100))


def test_update_follows_a_module_that_moves_its_storage():
    net = Point(2)
    ema = EMA(net, PROFILES["constant"](decay=0.0))
    net.double().float().move(np.ones(2))
    ema.update(1)
    assert_close(ema.tensors, net.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_in_the_machines_memory_is_the_same(dtype):
    net = Point(5, dtype).cuda()
    here, there = (EMA(net, PROFILES["constant"](decay=0.5), device) for device in ("cpu", ""))
    for step in range(1, 4):
        net.move(np.linspace(0, step, 5))
        for ema in (here, there):
            ema.update(step)
    assert {t.device.type for t in here.tensors.values()} == {"cpu"}
    assert_close(here.tensors, {name: t.cpu() for name, t in there.tensors.items()})
    with here.swap(net):
        assert_close(net.weight.detach().cpu(), here.tensors["weight"].to(dtype))


def test_where_an_average_is_kept_can_be_said():
    ema = EMA(Point(5, torch.bfloat16), PROFILES["constant"](decay=0.5), "cpu")
    ema.module.move(np.ones(5))
    ema.update(1)
    assert_close(ema.tensors["weight"], torch.full((5,), 0.5))


def interrupted(ema: EMA, net: Point) -> None:
    with ema.swap(net):
        net.weight.data.add_(1)
        raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_puts_the_average_in_and_restores_exactly(dtype):
    net = Point(5, dtype)
    ema = EMA(net, PROFILES["constant"](decay=0.5))
    net.move(np.linspace(0, 1, 5))
    ema.update(1)
    own = {name: t.clone() for name, t in net.state_dict().items()}
    storage = net.weight.data_ptr()
    with ema.swap(net) as swapped:
        assert_close(swapped.weight.detach(), ema.tensors["weight"].to(dtype))
    assert_close(net.state_dict(), own, rtol=0, atol=0)
    with pytest.raises(KeyboardInterrupt):
        interrupted(ema, net)
    assert_close(net.state_dict(), own, rtol=0, atol=0)
    assert net.weight.data_ptr() == storage
    assert net.weight.requires_grad


def test_average_resumes_exactly_and_refuses_foreign_weights():
    path = walk(60, 6)
    (whole,) = track(path, PROFILES["warmup"]())
    (half,) = track(path[:31], PROFILES["warmup"]())
    net = Point(6)
    resumed = EMA(net, PROFILES["warmup"]())
    resumed.load(half.tensors)
    net.count.fill_(30)
    for step in range(31, 61):
        net.move(path[step])
        resumed.update(step)
    assert_close(resumed.tensors, whole.tensors, rtol=0, atol=0)
    with pytest.raises(UserError, match="another network"):
        resumed.load({"weight": torch.zeros(6)})
    with pytest.raises(UserError, match="shape"):
        resumed.copy_to(Point(7))


def test_net_without_parameters_and_tied_parameters_are_averaged():
    EMA(nn.Identity(), PROFILES["constant"]()).update(1)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    ema = EMA(net, PROFILES["constant"](decay=0.0))
    with torch.no_grad():
        net[0].weight.fill_(2)
    ema.update(1)
    assert_close(ema.tensors, net.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("powr", {}, "power"),
        ("power", {"sigma": 0.1}, "sigma_rel"),
        ("power", {"sigma_rel": 0.4}, "0.2887"),
        ("constant", {"decay": 1.5}, "between 0 and 1"),
        ("half_life", {}, "batch"),
        ("half_life", {"batch": 8, "images": 0}, "positive"),
    ],
)
def test_wrong_profile_is_a_user_error(name, options, says):
    with pytest.raises(UserError, match=says):
        make(PROFILES, {"name": name, **options}, "ema")()  # type: ignore[misc]


# ---- reconstruction ------------------------------------------------------------------------------


STEPS, TAKEN = 4096, range(256, 4097, 256)


@pytest.fixture(scope="module")
def tracked():
    """Snapshots of widths 0.05 and 0.10 every 256 of 4096 steps, and 0.07 tracked beside them at two of them."""
    path, net = walk(STEPS, 50), Point(50)
    emas = {sigma_rel: EMA(net, power(sigma_rel)) for sigma_rel in (0.05, 0.07, 0.10)}
    snapshots, reference = [], {}
    for step in range(1, STEPS + 1):
        net.move(path[step])
        for sigma_rel, ema in emas.items():
            ema.update(step)
            if step in TAKEN:
                copy = {name: t.clone() for name, t in ema.tensors.items()}
                if sigma_rel == 0.07:
                    reference[step] = copy
                else:
                    snapshots.append((step, sigma_rel, copy))
    return snapshots, reference


@pytest.mark.parametrize("step", [2048, 4096])
def test_reconstruction_equals_the_average_tracked_directly(tracked, step):
    """To 0.3% of the weights, and to 5% of what separates it from the nearest width that was tracked."""
    snapshots, reference = tracked
    expected = reference[step]["weight"]
    found = reconstruct(snapshots, step, 0.07)
    distance = min((t["weight"] - expected).norm() for s, _, t in snapshots if s == step)
    error = (found["weight"] - expected).norm()
    assert error < 0.003 * expected.norm()
    assert error < 0.05 * distance
    assert_close(found["count"], torch.tensor(step))


def test_reconstruction_of_a_snapshot_is_that_snapshot(tracked):
    snapshots, _ = tracked
    for chosen in (0, 9, len(snapshots) - 1):
        step, sigma_rel, tensors = snapshots[chosen]
        weights = reconstruction_weights(snapshots, step, sigma_rel)
        assert_close(weights, np.eye(len(snapshots))[chosen], rtol=0, atol=1e-6)
        assert_close(reconstruct(snapshots, step, sigma_rel), tensors, rtol=1e-5, atol=1e-6)


def test_reconstruction_survives_a_snapshot_taken_twice(tracked):
    snapshots, reference = tracked
    found = reconstruct([*snapshots, snapshots[-1]], STEPS, 0.07)
    assert_close(found["weight"], reference[STEPS]["weight"], rtol=0, atol=1e-3)


def test_inner_products_are_those_of_the_profiles():
    """The normal equations, built by quadrature instead of in closed form, have the same solution."""
    shots = [(300, 0.05, None), (300, 0.1, None), (1000, 0.05, None), (1000, 0.1, None)]
    s = np.linspace(0, 1000, 1_000_001)

    def profile(t, sigma_rel):
        g = sigma_rel_to_gamma(sigma_rel)
        return np.where(s <= t, (g + 1) * (s / t) ** g / t, 0)

    p = np.stack([profile(t, w) for t, w, _ in shots])
    expected = np.linalg.solve(p @ p.T, p @ profile(800, 0.08))
    assert_close(reconstruction_weights(shots, 800, 0.08), expected, rtol=1e-3, atol=1e-4)


def test_snapshots_come_back_from_the_disk(tmp_path, tracked):
    snapshots, _ = tracked
    for step, sigma_rel, tensors in reversed(snapshots[:6]):
        save_snapshot(tmp_path, step, sigma_rel, tensors)
    loaded = load_snapshots(tmp_path)
    assert [s[:2] for s in loaded] == [s[:2] for s in snapshots[:6]]
    for found, expected in zip(loaded, snapshots):
        assert_close(dict(found.tensors), expected[2], rtol=0, atol=0)


def test_impossible_reconstructions_are_user_errors(tracked):
    snapshots, _ = tracked
    with pytest.raises(UserError, match="two or more"):
        reconstruct(snapshots[:1], 256, 0.07)
    with pytest.raises(UserError, match="the last snapshot, 4096"):
        reconstruct(snapshots, 5000, 0.07)
    wrong = (512, 0.05, {"weight": torch.zeros(3), "count": torch.tensor(1)})
    with pytest.raises(UserError, match="shape"):
        reconstruct([*snapshots[:2], wrong], 256, 0.07)
