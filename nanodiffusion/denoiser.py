"""D(x, sigma, cond) -> E[x0 | x]: the one contract. x = x0 + sigma * eps, whatever the network was trained to predict.

    D = c_skip(sigma) * x + c_out(sigma) * F(c_in(sigma) * x, c_noise(sigma), **cond)

A parameterisation is a row of `PREDICTIONS`; c_noise, the network's clock, is a row of `CLOCKS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as tnf
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nanodiffusion.errors import UserError, lookup
from nanodiffusion.guidance import unconditional
from nanodiffusion.noise import Schedule

Cond = Mapping[str, Any]
Coefficients = tuple[Tensor, Tensor, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of a config's `precision`


@dataclass(frozen=True)
class Prediction:
    """What F predicts, as sigma -> (c_skip, c_out, c_in). (Karras et al. 2022, table 1 and eq. 7)."""

    name: str
    coefficients: Callable[[Tensor], Coefficients]

    @property
    def options(self) -> dict[str, float]:
        """What it was made with: sigma_data of edm."""
        return getattr(self.coefficients, "keywords", {})


def _eps(s: Tensor) -> Coefficients:
    return torch.ones_like(s), -s, (s**2 + 1).rsqrt()


def _x0(s: Tensor) -> Coefficients:
    return torch.zeros_like(s), torch.ones_like(s), (s**2 + 1).rsqrt()


def _x0_linear(s: Tensor) -> Coefficients:
    return torch.zeros_like(s), torch.ones_like(s), 1 / (1 + s)


def _v(s: Tensor) -> Coefficients:
    c_in = (s**2 + 1).rsqrt()
    return c_in**2, -s * c_in, c_in


def _flow(s: Tensor) -> Coefficients:
    c_in = 1 / (1 + s)
    return c_in, -s * c_in, c_in


def _edm(s: Tensor, sigma_data: float) -> Coefficients:
    c_in = (s**2 + sigma_data**2).rsqrt()
    return (sigma_data * c_in) ** 2, s * sigma_data * c_in, c_in


def edm(sigma_data: float = 0.5) -> Prediction:
    """The preconditioning of Karras et al. 2022 for data of standard deviation `sigma_data`."""
    return Prediction("edm", partial(_edm, sigma_data=sigma_data))


PREDICTIONS = {
    "eps": Prediction("eps", _eps),  # Ho et al. 2020: the noise
    "x0": Prediction("x0", _x0),  # the clean sample, from a variance-preserving input
    "x0_linear": Prediction("x0_linear", _x0_linear),  # the clean sample, from (1-t) x0 + t eps
    "v": Prediction("v", _v),  # Salimans & Ho 2022: alpha eps - sigma x0
    "flow": Prediction("flow", _flow),  # Lipman et al. 2023, Liu et al. 2023: eps - x0
    "edm": edm(),  # Karras et al. 2022, sigma_data = 0.5
}


def log_clock(sigma: Tensor) -> Tensor:
    """c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
    return sigma.log() / 4


def flow_clock(sigma: Tensor) -> Tensor:
    """The time of the linear path, t = sigma / (1 + sigma) in [0, 1)."""
    return sigma / (1 + sigma)


CLOCKS: dict[str, Callable[[Tensor], Tensor] | None] = {"log": log_clock, "flow": flow_clock, "table": None}

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": partial(tnf.mse_loss, reduction="none"),
    "l1": partial(tnf.l1_loss, reduction="none"),
    "huber": partial(tnf.huber_loss, reduction="none"),
    "smooth_l1": partial(tnf.smooth_l1_loss, reduction="none"),
}


def as_float(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floating point in that dtype; whatever else, as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def mean_within(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the channels and the pixels of mask (b 1 h w), 0 where there are none: x (b c h w) -> (b)."""
    return (x * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) * x.shape[1]).clamp(min=1)


def expand(s: Tensor, x: Tensor) -> Tensor:
    """(b) -> (b 1 ... 1) with the rank of x."""
    return s.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """A network as a denoiser; the only place that knows parameterisation, clock and precision.

    net: called as net(x (b ...), t (b), **cond) -> F (b ...).
    prediction: a row or a name of `PREDICTIONS`. clock: a name of `CLOCKS` or a function sigma (b) -> t (b);
    "table" is the fractional index into `schedule`.
    precision: dtype of the network's products, by autocast; at float32, a network whose weights are bf16 or fp16 runs in
    that. x and D keep x's dtype.
    """

    def __init__(
        self,
        net: nn.Module,
        prediction: str | Prediction = "eps",
        clock: str | Callable[[Tensor], Tensor] = "log",
        schedule: Schedule | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.net, self.precision = net, precision
        self.prediction = lookup(PREDICTIONS, prediction, "prediction") if isinstance(prediction, str) else prediction
        row = lookup(CLOCKS, clock, "clock") if isinstance(clock, str) else clock
        if row is None and schedule is None:
            raise UserError("the clock 'table' needs a schedule", key="schedule", fix="Denoiser(..., schedule=ldm())")
        self.clock = row or (schedule.t if schedule else log_clock)

    def raw(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The network's own output F: x (b ...), sigma (b) -> (b ...) in x's dtype."""
        return self._net(self.prediction.coefficients(expand(sigma, x))[2] * x, self.clock(sigma), cond)

    def _net(self, scaled: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.half is not None and self.precision == torch.float32:
            half = partial(as_float, dtype=self.half)
            return self.net(half(scaled), t, **tree_map(half, dict(cond))).to(scaled.dtype)
        if self.precision == torch.float32:
            return self.net(scaled, t, **cond)
        with torch.autocast(scaled.device.type, self.precision):
            return self.net(scaled, t, **cond).to(scaled.dtype)

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the conditions that the net is trained with, for those of ours that say so."""
        return getattr(self.net, "takes", ())

    def unconditional(self, cond: Cond) -> dict[str, Any]:
        """What it is trained to see instead of these conditions (b ...); guidance leads away from it."""
        return unconditional(cond, getattr(self.net, "null_label", None))

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of the network's weights where that is half precision: then x and cond are rounded to it, t is not."""
        first = next(self.net.parameters(), None)
        return first.dtype if first is not None and first.dtype in (torch.bfloat16, torch.float16) else None

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        """E[x0 | x]: x (b ...), sigma (b) on any device -> (b ...)."""
        t, sigma = self.clock(sigma).to(x.device, x.dtype), sigma.to(x.device, x.dtype)
        c_skip, c_out, c_in = self.prediction.coefficients(expand(sigma, x))
        return c_skip * x + c_out * self._net(c_in * x, t, cond or {})

    def target(self, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """What F should be, (x0 - c_skip x) / c_out, with x0's and eps' parts apart so that nothing cancels."""
        s = expand(sigma, x0)
        return _target(self.prediction.coefficients(s), x0, s, eps)

    def loss(
        self,
        x0: Tensor,
        sigma: Tensor,
        eps: Tensor,
        cond: Cond | None = None,
        distance: str = "mse",
        weight: Callable[[Tensor, Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Distance between F and its target per sample: x0, eps (b ...), sigma (b) -> (b).

        With weight None (1) it is each paper's own simple loss. weight(sigma, c_out) (b) multiplies it; see `WEIGHTS`.
        mask (b 1 h w) in [0, 1]: which pixels count.
        """
        s = expand(sigma, x0)
        _, c_out, c_in = found = self.prediction.coefficients(s)
        out = self._net(c_in * (x0 + s * eps), self.clock(sigma), cond or {})
        each = lookup(DISTANCES, distance, "loss")(out, _target(found, x0, s, eps))
        per_sample = each.flatten(1).mean(1) if mask is None else mean_within(each, mask)
        return per_sample if weight is None else per_sample * weight(sigma, c_out.flatten())


def _target(coefficients: Coefficients, x0: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    c_skip, c_out, _ = coefficients
    return ((1 - c_skip) / c_out) * x0 - (c_skip * s / c_out) * eps


# Weights are functions (sigma (b), c_out (b)) -> (b) on the F-space loss. |D - x0|^2 = c_out^2 |F - target|^2, so a weight
# that a paper gives on the x0 error is multiplied by c_out^2, one on the eps error by (c_out / sigma)^2.


def snr_weight(sigma: Tensor, c_out: Tensor) -> Tensor:
    """SNR = 1 / sigma^2 on the x0 error: the simple eps loss, whatever is predicted."""
    return (c_out / sigma) ** 2


def min_snr_weight(sigma: Tensor, c_out: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023, eq. 8)."""
    return c_out**2 * (sigma**-2).clamp(max=gamma)


def edm_weight(sigma: Tensor, c_out: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the x0 error (Karras et al. 2022, table 1)."""
    return c_out**2 * (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def sigmoid_weight(sigma: Tensor, c_out: Tensor, bias: float = 2.0) -> Tensor:
    """sigmoid(bias - log SNR) on the eps error (Kingma & Gao 2023, section 4; Hoogeboom et al. 2024)."""
    return (c_out / sigma) ** 2 * torch.sigmoid(bias + 2 * sigma.log())


def p2_weight(sigma: Tensor, c_out: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """1 / (k + SNR)^gamma on the eps error (Choi et al. 2022, eq. 8)."""
    return (c_out / sigma) ** 2 / (k + sigma**-2) ** gamma


WEIGHTS: dict[str, Callable[..., Tensor] | None] = {
    "one": None,
    "snr": snr_weight,
    "min_snr": min_snr_weight,
    "edm": edm_weight,
    "sigmoid": sigmoid_weight,
    "p2": p2_weight,
}
