"""Noise levels: schedules (tables of sigma), ladders (the levels a sampler visits), densities (the levels training draws).

Every level is a sigma of x = x0 + sigma * eps. A variance-preserving curve gamma(t), x_t = sqrt(gamma) b x0 + sqrt(1-gamma) eps,
and the linear path x_t = (1-t) x0 + t eps are changes of variable: divide x_t by the factor of x0.
Tables and ladders are float64 on the CPU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.errors import UserError, lookup

# A flow time of 1 - 2^-12; a VP curve that ends in pure noise (gamma = 0) is capped at the same level.
SIGMA_CAP = 4095.0


@dataclass(frozen=True)
class Schedule:
    """A table of increasing noise levels: sigmas (n) float64. Its clock is the fractional index t in [0, n-1]."""

    sigmas: Tensor

    def __post_init__(self) -> None:
        s = torch.as_tensor(self.sigmas, dtype=torch.float64, device="cpu")
        if s.ndim != 1 or len(s) < 2 or not bool(torch.isfinite(s).all()) or s[0] < 0 or not bool((s.diff() > 0).all()):
            raise UserError(
                "a schedule is a table of at least two finite, strictly increasing sigmas >= 0",
                key="sigmas",
                found=f"shape {tuple(s.shape)}: {s.flatten()[:4].tolist()} ...",
            )
        object.__setattr__(self, "sigmas", s)

    def __len__(self) -> int:
        return len(self.sigmas)

    def t(self, sigma: Tensor) -> Tensor:
        """Fractional index of sigma, linear in sigma between entries, clamped to the table: (...) -> (...)."""
        wide = torch.float32 if sigma.device.type == "mps" else torch.float64  # which knows no float64
        table = self.sigmas.to(sigma.device, wide)
        s = sigma.to(wide).clamp(table[0], table[-1])
        hi = torch.searchsorted(table, s.contiguous()).clamp(1, len(table) - 1)
        lo = table[hi - 1]
        return (hi - 1 + (s - lo) / (table[hi] - lo)).to(sigma.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """Inverse of `t`: fractional index (...) in [0, n-1] -> sigma (...) float64."""
        t = torch.as_tensor(t, dtype=torch.float64).clamp(0, len(self) - 1)
        lo = t.floor().long().clamp(max=len(self) - 2)
        return torch.lerp(self.sigmas[lo], self.sigmas[lo + 1], t - lo)


def from_betas(betas: Tensor) -> Schedule:
    """sigma = sqrt((1 - abar) / abar), abar = prod(1 - beta): betas (n) -> Schedule (Ho et al. 2020)."""
    abar = torch.cumprod(1 - betas.double(), 0)
    return Schedule(((1 - abar) / abar).sqrt())


def ddpm(n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Linear beta (Ho et al. 2020)."""
    return from_betas(torch.linspace(beta_start, beta_end, n, dtype=torch.float64))


def ldm(n: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Scaled-linear beta, linear in sqrt(beta) (Rombach et al. 2022; Stable Diffusion)."""
    return from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2)


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule shifted and stretched in sqrt(abar) so that it ends in noise alone (Lin et al. 2024, algorithm 1).

    Its last level would be infinite, and is `SIGMA_CAP`.
    """
    a = (1 + schedule.sigmas**2).rsqrt()
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return Schedule(_capped((1 - a**2).sqrt() / a))


def ldm_zero_snr(n: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """`ldm` that ends in noise alone; a net that predicts eps learns nothing there, one that predicts v does."""
    return zero_terminal_snr(ldm(n, beta_start, beta_end))


def sigmoid_beta(n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta = sigmoid(-6..6) scaled to [beta_start, beta_end] (Xu et al. 2022, GeoDiff)."""
    s = torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64))
    return from_betas(beta_start + (beta_end - beta_start) * s)


def cosine_beta(n: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """abar = cos^2((t + s) / (1 + s) pi/2), beta capped (Nichol & Dhariwal 2021, eq. 17)."""
    abar = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - abar[1:] / abar[:-1]).clamp(max=max_beta))


def log_linear(n: int = 200, sigma_min: float = 0.02, sigma_max: float = 10.0) -> Schedule:
    """Geometric from sigma_min to sigma_max."""
    return Schedule(torch.logspace(math.log10(sigma_min), math.log10(sigma_max), n, dtype=torch.float64))


def from_gamma(gamma: Callable[[Tensor], Tensor], n: int = 1000, input_scale: float = 1.0) -> Schedule:
    """sigma = sqrt((1 - gamma) / gamma) / b at t = k/n, k = 1..n, for gamma(t) falling from 1 and input scale b (Chen 2023).

    Levels beyond `SIGMA_CAP` (gamma -> 0 divides by nothing) become one last level at the cap.
    """
    g = gamma(torch.arange(1, n + 1, dtype=torch.float64) / n).clamp(min=1e-12, max=1 - 1e-12)
    return Schedule(_capped(((1 - g) / g).sqrt() / input_scale))


def _capped(sigmas: Tensor) -> Tensor:
    inside = sigmas[sigmas < SIGMA_CAP]
    return inside if len(inside) == len(sigmas) else torch.cat([inside, sigmas.new_tensor([SIGMA_CAP])])


def gamma_linear(n: int = 1000, input_scale: float = 1.0) -> Schedule:
    """gamma = 1 - t (Chen 2023)."""
    return from_gamma(lambda t: 1 - t, n, input_scale)


def cosine_curve(t: Tensor, start: float = 0.2, end: float = 1.0, tau: float = 2.0) -> Tensor:
    """gamma from cos(u pi/2)^(2 tau), u from start to end: t (...) in [0, 1] -> (...) (Chen 2023, algorithm 1)."""
    return _falling(lambda u: torch.cos(u * math.pi / 2) ** (2 * tau), t, start, end)


def sigmoid_curve(t: Tensor, start: float = 0.0, end: float = 3.0, tau: float = 0.7) -> Tensor:
    """gamma from sigmoid(u / tau), u from start to end: t (...) in [0, 1] -> (...) (Jabri et al. 2022; Chen 2023)."""
    return _falling(lambda u: torch.sigmoid(u / tau), t, start, end)


def _falling(f: Callable[[Tensor], Tensor], t: Tensor, start: float, end: float) -> Tensor:
    """f of start to end, rescaled to fall from 1 to 0."""
    v = f(start + t * (end - start))
    v_start, v_end = f(torch.tensor([start, end], dtype=torch.float64))
    return (v_end - v) / (v_end - v_start)


def gamma_cosine(
    n: int = 1000, start: float = 0.2, end: float = 1.0, tau: float = 2.0, input_scale: float = 1.0
) -> Schedule:
    """gamma of `cosine_curve`."""
    return from_gamma(lambda t: cosine_curve(t, start, end, tau), n, input_scale)


def gamma_sigmoid(
    n: int = 1000, start: float = 0.0, end: float = 3.0, tau: float = 0.7, input_scale: float = 1.0
) -> Schedule:
    """gamma of `sigmoid_curve`."""
    return from_gamma(lambda t: sigmoid_curve(t, start, end, tau), n, input_scale)


def flow(n: int = 1000, t_min: float = 0.001, t_max: float = 1.0) -> Schedule:
    """sigma = t / (1 - t) for t uniform in [t_min, t_max] on the linear path.

    Levels beyond `SIGMA_CAP` become one last level at the cap.
    """
    return Schedule(_capped(flow_sigma(torch.linspace(t_min, t_max, n, dtype=torch.float64))))


def flow_sigma(t: Tensor) -> Tensor:
    """Change of variable of the linear path, sigma = t / (1 - t), capped: (...) in [0, 1] -> (...)."""
    t = t.clamp(max=SIGMA_CAP / (1 + SIGMA_CAP))
    return t / (1 - t)


def user_sigmas(sigmas: Sequence[float] | Tensor) -> Schedule:
    """A table of your own: increasing sigmas (n)."""
    return Schedule(torch.as_tensor(sigmas, dtype=torch.float64))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "ddpm": ddpm,
    "ldm": ldm,
    "ldm_zero_snr": ldm_zero_snr,
    "sigmoid_beta": sigmoid_beta,
    "cosine_beta": cosine_beta,
    "log_linear": log_linear,
    "gamma_linear": gamma_linear,
    "gamma_cosine": gamma_cosine,
    "gamma_sigmoid": gamma_sigmoid,
    "flow": flow,
    "sigmas": user_sigmas,
}

# -- ladders: (schedule, steps) -> (steps + 1,) decreasing float64 ending in 0 -------------------------------------------


def _ladder(sigmas: Tensor) -> Tensor:
    s = torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64)])
    if len(s) < 2 or not bool(torch.isfinite(s).all()) or not bool((s.diff() < 0).all()):
        raise UserError("a ladder is finite and strictly decreasing", key="sigmas", found=s.tolist()[:6])
    return s


def _check_steps(steps: int, most: float = math.inf) -> None:
    if not 1 <= steps <= most:
        raise UserError("impossible number of sampling steps", key="steps", expected=f"1 to {most}", found=steps)


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """Every n/steps-th entry counted from the last one (Lin et al. 2023, table 2)."""
    n = len(schedule)
    _check_steps(steps, n)
    index = np.round(n * (1 - np.arange(steps) / steps)).astype(np.int64) - 1
    return _ladder(schedule.sigmas[torch.from_numpy(index)])


def leading(schedule: Schedule, steps: int, offset: int = 1) -> Tensor:
    """Entries offset + k * (n // steps): Stable Diffusion's original spacing (Lin et al. 2023, table 2).

    The offset shrinks where it would leave the table (steps = n).
    """
    n = len(schedule)
    _check_steps(steps, n)
    index = torch.arange(steps).flip(0) * (n // steps)
    return _ladder(schedule.sigmas[index + min(offset, n - 1 - int(index[0]))])


def linspace(schedule: Schedule, steps: int) -> Tensor:
    """Evenly spaced fractional indices, both ends included."""
    _check_steps(steps)
    return _ladder(schedule.sigma(torch.linspace(len(schedule) - 1, 0, steps, dtype=torch.float64)))


def _range(schedule: Schedule, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    lo = float(schedule.sigmas[0]) if sigma_min is None else sigma_min
    hi = float(schedule.sigmas[-1]) if sigma_max is None else sigma_max
    if not 0 < lo < hi:
        raise UserError("a ladder needs 0 < sigma_min < sigma_max", key="sigma_min", found=f"{lo} and {hi}")
    return lo, hi


def karras(
    schedule: Schedule,
    steps: int,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    _check_steps(steps)
    lo, hi = _range(schedule, sigma_min, sigma_max)
    return _ladder(torch.linspace(hi ** (1 / rho), lo ** (1 / rho), steps, dtype=torch.float64) ** rho)


def exponential(
    schedule: Schedule, steps: int, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """Evenly spaced in log sigma."""
    _check_steps(steps)
    lo, hi = _range(schedule, sigma_min, sigma_max)
    return _ladder(torch.linspace(math.log(hi), math.log(lo), steps, dtype=torch.float64).exp())


def shifted_flow(schedule: Schedule, steps: int, shift: float = 1.0) -> Tensor:
    """Flow times evenly spaced from the schedule's last to 0, then sigma multiplied by `shift`.

    t' = shift t / (1 + (shift - 1) t) is the same thing in flow time (Esser et al. 2024, eq. 23).
    """
    _check_steps(steps)
    last = float(schedule.sigmas[-1])
    t = torch.linspace(last / (1 + last), 0, steps + 1, dtype=torch.float64)[:-1]
    return _ladder(flow_sigma(t) * shift)


def power(schedule: Schedule, steps: int, exponent: float = 1.0, t_max: float = 0.99) -> Tensor:
    """Flow times 1 - (k/steps)^exponent, the first one t_max (transformer latent diffusion's ladder).

    Where the second one is above t_max already, the first is halfway from it to 1.
    """
    _check_steps(steps)
    t = 1 - (torch.arange(steps, dtype=torch.float64) / steps) ** exponent
    t[0] = t_max if steps == 1 or t[1] < t_max else (1 + t[1]) / 2
    return _ladder(flow_sigma(t))


def lcm(schedule: Schedule, steps: int, original: int = 50, of: str = "trailing") -> Tensor:
    """Evenly spaced entries of another ladder, the one of `original` levels that a model was distilled on (Luo et al. 2023).

    of: its name in `LADDERS`. 4 of 50 of a schedule of 1,000: timesteps 999, 759, 499, 259. Where more steps are asked for
    than it has levels, it is as long as they.
    """
    _check_steps(steps)
    levels = lookup(LADDERS, of, "ladder.of")(schedule, max(original, steps))[:-1]
    return _ladder(levels[torch.arange(steps) * len(levels) // steps])


def given_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    """A ladder of your own: strictly decreasing sigmas; the final 0 is added when it is missing."""
    s = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    return _ladder(s[:-1] if len(s) and s[-1] == 0 else s)


def given_timesteps(schedule: Schedule, timesteps: Sequence[float] | Tensor) -> Tensor:
    """The levels at (fractional) indices of the schedule, in any order, then 0."""
    t = torch.as_tensor(timesteps, dtype=torch.float64).sort(descending=True).values
    return given_sigmas(schedule.sigma(t))


LADDERS: dict[str, Callable[..., Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
    "shifted_flow": shifted_flow,
    "power": power,
    "lcm": lcm,
}

# -- densities: (n, generator) -> sigma (n) float32 on the generator's device --------------------------------------------

Density = Callable[[int, torch.Generator], Tensor]


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device)


def table_density(schedule: Schedule) -> Density:
    """Uniform over the entries of a schedule's table."""
    tables: dict[torch.device, Tensor] = {}

    def draw(n: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        if device not in tables:
            tables[device] = schedule.sigmas.float().to(device)
        table = tables[device]
        return table[torch.randint(len(table), (n,), generator=generator, device=device)]

    return draw


def log_normal(mean: float = -1.2, std: float = 1.2) -> Density:
    """ln sigma ~ N(mean, std^2) (Karras et al. 2022, table 1)."""
    return lambda n, g: torch.randn(n, generator=g, device=g.device).mul_(std).add_(mean).exp_()


def log_uniform(sigma_min: float = 0.02, sigma_max: float = 10.0) -> Density:
    """ln sigma uniform."""
    lo, hi = math.log(sigma_min), math.log(sigma_max)
    return lambda n, g: _uniform(n, g).mul_(hi - lo).add_(lo).exp_()


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """Flow time t = sigmoid(N(mean, std^2)), hence ln sigma = logit t ~ N(mean, std^2) (Esser et al. 2024, eq. 19)."""
    return lambda n, g: log_normal(mean, std)(n, g).clamp_(max=SIGMA_CAP)


def flow_uniform(t_min: float = 0.001, t_max: float = 1.0) -> Density:
    """Flow time uniform in [t_min, t_max] (Lipman et al. 2023)."""
    return lambda n, g: flow_sigma(_uniform(n, g).mul_(t_max - t_min).add_(t_min))


def beta_density(a: float = 1.0, b: float = 2.5, t_min: float = 1e-4) -> Density:
    """Flow time ~ Beta(a, b), not below t_min (transformer latent diffusion)."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        t = torch.from_numpy(np.random.default_rng(seed).beta(a, b, n))
        return flow_sigma(t.clamp(min=t_min)).float().to(generator.device)

    return draw


DENSITIES: dict[str, Callable[..., Density]] = {
    "table": table_density,
    "log_normal": log_normal,
    "log_uniform": log_uniform,
    "logit_normal": logit_normal,
    "flow_uniform": flow_uniform,
    "beta": beta_density,
}
