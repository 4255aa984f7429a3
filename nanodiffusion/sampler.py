"""One loop; a sampler is a step function (D, x, s, s_next, memory, noise) -> (x, x0, memory). Knows nobody.

Every step solves dx/dsigma = (x - D(x, sigma)) / sigma from s to s_next, or the reverse SDE with the same marginals.
s and s_next are Python floats, so that no step waits for a device; the D it is given takes (x, sigma (b) on the CPU).
A step must work for s_next = 0 and with memory None (the first step).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.errors import UserError

D = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]
Step = Callable[[D, Tensor, float, float, Any, Noise], tuple[Tensor, Tensor, Any]]


class State(NamedTuple):
    """After a step: x (b ...) at level sigma_next, and x0 (b ...), the denoiser's estimate made at level sigma."""

    x: Tensor
    x0: Tensor
    sigma: float
    sigma_next: float
    step: int


def denoise(D: D, x: Tensor, s: float) -> Tensor:
    """D at one level for the whole batch, in x's dtype."""
    x0 = D(x, torch.full((len(x),), s, dtype=torch.float64))
    return x0 if x0.dtype == x.dtype else x0.to(x.dtype)


def _toward(x0: Tensor, x: Tensor, ratio: float) -> Tensor:
    """x0 + ratio (x - x0): the exact move to another level along a straight line; ratio 0 gives x0 itself."""
    return torch.lerp(x0, x, ratio) if ratio else x0


def _mean(x0: Tensor, *others: tuple[Tensor, float]) -> Tensor:
    """x0 + sum of w (other - x0) over (other, w): D, extrapolated from its values at other levels."""
    (first, w), *rest = others
    out = torch.lerp(x0, first, w)
    for other, w in rest:
        out.add_(other, alpha=w).add_(x0, alpha=-w)
    return out


def euler(D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise) -> tuple[Tensor, Tensor, Any]:
    """Euler in sigma; the same as DDIM with eta = 0 (Song et al. 2021, eq. 13) and as Euler in flow time."""
    x0 = denoise(D, x, s)
    return _toward(x0, x, s_next / s), x0, memory


def ancestral(
    D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise, eta: float = 1.0
) -> tuple[Tensor, Tensor, Any]:
    """Euler down to a lower level, then fresh noise back up to s_next: DDIM(eta) in sigma.

    Its noise eta^2 s_next^2 (1 - s_next^2 / s^2) is DDIM's eq. 16 divided by abar (Song et al. 2021);
    eta = 1 is DDPM's posterior (Ho et al. 2020, eq. 7) and k-diffusion's ancestral Euler.
    """
    x0 = denoise(D, x, s)
    up = min(eta * s_next * math.sqrt(1 - (s_next / s) ** 2), s_next)
    x = _toward(x0, x, math.sqrt(s_next**2 - up**2) / s)
    return (x.add(noise(x), alpha=up) if up else x), x0, memory


def gradient_estimation(
    D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise, gam: float = 2.0, mu: float = 0.0
) -> tuple[Tensor, Tensor, Any]:
    """eps extrapolated from two steps, down to s_p with s_next = s^mu s_p^(1-mu), noise up (Permenter & Yuan 2024).

    (gam, mu) = (1, 0) is DDIM, (1, 1/2) DDPM on a fine ladder, (2, 0) the accelerated sampler.
    """
    x0 = denoise(D, x, s)
    offset = x - x0  # s eps
    s_down = (s_next / s**mu) ** (1 / (1 - mu))
    up = math.sqrt(max(s_next**2 - s_down**2, 0.0))
    x = _toward(x0, x, s_down / s)
    if memory is not None:
        previous, s_previous = memory
        h = (gam - 1) * (s_down - s)
        x = x.add(offset, alpha=h / s).add_(previous, alpha=-h / s_previous)
    return (x.add(noise(x), alpha=up) if up else x), x0, (offset, s)


PURE = 100.0  # a level above which x is noise to 1e-4 of its variance, and sigma no time to average slopes over


def heun(
    D: D,
    x: Tensor,
    s: float,
    s_next: float,
    memory: Any,
    noise: Noise,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> tuple[Tensor, Tensor, Any]:
    """Heun's second-order step; with churn the stochastic sampler (Karras et al. 2022, algorithms 1 and 2).

    Euler to 0, and from above `PURE`: there the second estimate would count s / (2 s_next) times, 187 where flow begins.

    churn: gamma = min(S_churn / steps, sqrt(2) - 1), by which noise first raises levels within [s_tmin, s_tmax].
    """
    if churn and s_tmin <= s <= s_tmax:
        x = x.add(noise(x), alpha=s_noise * s * math.sqrt((1 + churn) ** 2 - 1))
        s = s * (1 + churn)
    x0 = denoise(D, x, s)
    x1 = _toward(x0, x, s_next / s)
    if s_next == 0 or s > PURE:
        return x1, x0, memory
    # x + h/2 ((x - x0)/s + (x1 - D(x1))/s_next) is a straight move too, toward a mean of both estimates.
    return _toward(torch.lerp(x0, denoise(D, x1, s_next), s / (2 * s_next)), x, s_next / s), x0, memory


def rk4(D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise) -> tuple[Tensor, Tensor, Any]:
    """The classical fourth-order Runge-Kutta step, midpoint in sigma; Euler to 0, where the slope is singular, and as `heun`."""
    x0 = denoise(D, x, s)
    if s_next == 0 or s > PURE:
        return _toward(x0, x, s_next / s), x0, memory
    h, mid = s_next - s, (s + s_next) / 2
    slope = lambda x, s: (x - denoise(D, x, s)).div_(s)
    k1 = (x - x0).div_(s)
    k2 = slope(x.add(k1, alpha=h / 2), mid)
    k3 = slope(x.add(k2, alpha=h / 2), mid)
    k4 = slope(x.add(k3, alpha=h), s_next)
    return x.add(k1.add_(k2, alpha=2).add_(k3, alpha=2).add_(k4), alpha=h / 6), x0, memory


@lru_cache
def _gauss(order: int) -> tuple[tuple[float, float], ...]:
    """(place in [0, 1], weight) of the quadrature that is exact for polynomials of degree < order."""
    places, weights = np.polynomial.legendre.leggauss((order + 1) // 2)
    return tuple(((1 + x) / 2, w / 2) for x, w in zip(places.tolist(), weights.tolist()))


@lru_cache(maxsize=4096)
def _adams_weights(nodes: tuple[float, ...], s_next: float) -> tuple[float, ...]:
    """Integrals from nodes[0] to s_next of the Lagrange basis polynomials of the nodes."""
    h, out = s_next - nodes[0], []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        scale = math.prod(node - other for other in others)
        points = ((nodes[0] + u * h, w) for u, w in _gauss(len(nodes)))
        out.append(sum(w * math.prod(s - other for other in others) for s, w in points) * h / scale)
    return tuple(out)


def lms(
    D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise, order: int = 4
) -> tuple[Tensor, Tensor, Any]:
    """Linear multistep: the integral of the polynomial through `order` slopes (Adams-Bashforth, uneven steps)."""
    x0 = denoise(D, x, s)
    history = [((x - x0).div_(s), s), *(memory or [])][:order]
    x = _toward(x0, x, s_next / s)  # the weights sum to s_next - s: Euler, then what the older slopes change
    if memory:
        first, *older = _adams_weights(tuple(node for _, node in history), s_next)
        x = x.add(history[0][0], alpha=first - (s_next - s))
        for (slope, _), w in zip(history[1:], older):
            x.add_(slope, alpha=w)
    return x, x0, history


def dpmpp_2m(D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise) -> tuple[Tensor, Tensor, Any]:
    """DPM-Solver++(2M), exponential integrator in -ln sigma (Lu et al. 2022b, algorithm 2); first order to 0."""
    x0 = denoise(D, x, s)
    mean = x0
    if memory is not None and s_next > 0:
        previous, s_previous = memory
        r = math.log(s_previous / s) / math.log(s / s_next)
        mean = torch.lerp(previous, x0, 1 + 1 / (2 * r))
    return _toward(mean, x, s_next / s), x0, (x0, s)


def dpmpp_2m_sde(
    D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise, eta: float = 1.0
) -> tuple[Tensor, Tensor, Any]:
    """SDE-DPM-Solver++(2M), midpoint form (Lu et al. 2022b, section 5); eta = 0 is `dpmpp_2m`."""
    x0 = denoise(D, x, s)
    if s_next == 0:
        return x0, x0, (x0, s)
    h = math.log(s / s_next)
    mean = x0
    if memory is not None:
        previous, s_previous = memory
        mean = torch.lerp(previous, x0, 1 + h / (2 * math.log(s_previous / s)))
    x = _toward(mean, x, math.exp(-(1 + eta) * h))
    up = s_next * math.sqrt(-math.expm1(-2 * eta * h))
    return (x.add(noise(x), alpha=up) if up else x), x0, (x0, s)


@lru_cache(maxsize=4096)
def _3m_weights(levels: tuple[float, ...], h: float, a: float) -> tuple[float, ...]:
    """How much each older D counts beside that of levels[0] over a step h in -ln sigma with exponent a = (1 + eta) h.

    With slopes d = (x0 - x1)/r0, e = (x1 - x2)/r1 and c = (d - e)/(r0 + r1) the step adds phi2 (d + r0 c) - phi3 c.
    """
    phi2 = math.expm1(-a) / a + 1
    scale = -math.expm1(-a)
    r0 = math.log(levels[1] / levels[0]) / h
    if len(levels) == 2:
        return (-phi2 / r0 / scale,)
    r1 = math.log(levels[2] / levels[1]) / h
    curvature = (phi2 * r0 - (phi2 / a - 0.5)) / (r0 + r1)
    return -((phi2 + curvature) / r0 + curvature / r1) / scale, curvature / r1 / scale


def dpmpp_3m_sde(
    D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise, eta: float = 1.0
) -> tuple[Tensor, Tensor, Any]:
    """The three-step SDE solver of the same family, as published (k-diffusion): D extrapolated in -ln sigma.

    Its curvature term is half of the parabola's own integral; it converges at order 2, with a smaller error than 2M.
    """
    x0 = denoise(D, x, s)
    history = [(x0, s), *(memory or [])][:3]
    if s_next == 0:
        return x0, x0, history
    h = math.log(s / s_next)
    mean, levels = x0, tuple([level for _, level in history])
    if memory:
        weights = _3m_weights(levels, h, (1 + eta) * h)
        mean = _mean(x0, *[(other, w) for (other, _), w in zip(history[1:], weights)])
    x_next = _toward(mean, x, math.exp(-(1 + eta) * h))
    up = s_next * math.sqrt(-math.expm1(-2 * eta * h))
    return (x_next.add(noise(x), alpha=up) if up else x_next), x0, history


@lru_cache(maxsize=4096)
def _unipc_weights(levels: tuple[float, ...], s_next: float) -> tuple[float, ...]:
    """How much each other D counts beside that of levels[0] on the way to s_next, the last level when correcting.

    rho / r with sum_k rho_k r_k^(i-1) = B(h)^-1 i! phi_{i+1}(-h) and B(h) = e^-h - 1, data prediction with "bh2".
    """
    h = math.log(levels[0] / s_next)
    ratios = [math.log(levels[0] / s) / h for s in levels[1:]]
    if len(ratios) == 1:
        return (0.5 / ratios[0],)  # in prediction of order 2 and correction of order 1 the paper does not solve
    hh = -h
    phi, factorial, rows, right = math.expm1(hh) / hh - 1, 1.0, [], []
    for i in range(1, len(ratios) + 1):
        rows.append([r ** (i - 1) for r in ratios])
        right.append(phi * factorial / math.expm1(hh))
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    return tuple((np.linalg.solve(np.array(rows), np.array(right)) / np.array(ratios)).tolist())


def unipc(
    D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise, order: int = 2
) -> tuple[Tensor, Tensor, Any]:
    """UniPC in data prediction with B2(h): correct x with the D just computed at it, then predict (Zhao et al. 2023).

    memory: (x before the last prediction, history of (D, s) newest first). One evaluation a step; first order to 0.
    """
    x0 = denoise(D, x, s)
    x_previous, history = (x, []) if memory is None else memory
    if history:  # UniC: the same step again, with the new estimate among the nodes
        x = _unipc_move(x_previous, [*history, (x0, s)], s)
    history = [(x0, s), *history][:order]
    if s_next == 0:
        return x0, x0, (x, history)
    return _unipc_move(x, history, s_next), x0, (x, history)


def _unipc_move(x: Tensor, history: list[tuple[Tensor, float]], s_next: float) -> Tensor:
    """From the level of history[0] to s_next, whose own D comes last in the history when it corrects."""
    (x0, s), *others = history
    if not others:
        return _toward(x0, x, s_next / s)
    # B(h) = s_next / s - 1, so the paper's correction is one of the D that x moves toward.
    weights = _unipc_weights(tuple([level for _, level in history]), s_next)
    return _toward(_mean(x0, *[(other, w) for (other, _), w in zip(others, weights)]), x, s_next / s)


def lcm(D: D, x: Tensor, s: float, s_next: float, memory: Any, noise: Noise) -> tuple[Tensor, Tensor, Any]:
    """The estimate with fresh noise of level s_next, for consistency models (Song et al. 2023, algorithm 1; Luo et al. 2023).

    A consistency model's D is where x's trajectory ends. The skip that published latent ones are sampled with, of
    sigma_data = 0.5 over ten times the time step, moves D by less than 1e-5 of x on their own ladder: it is left out.
    """
    x0 = denoise(D, x, s)
    return (x0.add(noise(x), alpha=s_next) if s_next else x0), x0, memory


STEPS: dict[str, Step] = {
    "ddpm": ancestral,
    "ddim": partial(ancestral, eta=0.0),
    "gradient_estimation": gradient_estimation,
    "euler": euler,
    "euler_ancestral": ancestral,
    "heun": heun,
    "rk4": rk4,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "lcm": lcm,
}


class ImageNoise:
    """Unit noise, one seed per image, drawn in fp32 on the CPU: image i is the same alone, in a batch, anywhere."""

    def __init__(self, seeds: Sequence[int]) -> None:
        if wrong := [s for s in seeds if not -(2**63) <= s < 2**64]:
            raise UserError("a seed has 64 bits", key="seed", expected="0 to 2^64 - 1", found=wrong[0])
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def draw(self, *shape: int) -> Tensor:
        """The next noise of every image: (b, *shape) fp32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(*x.shape[1:]).to(x)


def start(sigmas: Tensor, noise: Tensor, x0: Tensor | None = None, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Initial x and the ladder to follow: (k+1), noise (b ...) -> x (b ...), (<= k+1).

    Without x0, pure noise at sigmas[0]. With x0, image to image: the last `strength` in (0, 1] of the steps,
    started from x0 + sigma * noise (Meng et al. 2022, SDEdit).
    """
    steps = len(sigmas) - 1
    if not 0 < strength <= 1:
        raise UserError("impossible strength", key="strength", expected="0 < strength <= 1", found=strength)
    rest = sigmas if x0 is None else sigmas[steps - max(1, round(steps * strength)) :]
    x = float(rest[0]) * noise
    return (x if x0 is None else x0 + x), rest


@torch.no_grad()
def sample(D: D, x: Tensor, sigmas: Tensor, step: Step = dpmpp_2m, noise: Noise = torch.randn_like) -> Iterator[State]:
    """Yield the state after every step: x (b ...) at level sigmas[0], sigmas (k+1) decreasing to 0 -> k states.

    D: (x, sigma (b) float64 on the CPU) -> E[x0 | x]. The state is fp32 (fp64 if x is).
    """
    x = x if x.dtype == torch.float64 else x.float()
    levels = sigmas.double().tolist()
    memory = None
    for k, (s, s_next) in enumerate(pairwise(levels)):
        x, x0, memory = step(D, x, s, s_next, memory, noise)
        yield State(x, x0, s, s_next, k)
