"""Moving averages of weights: how fast to forget (profiles), the average itself, any average afterwards.

average <- beta(k) average + (1 - beta(k)) weights        after optimizer step k = 1, 2, ...
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.shard import joined, local, part, sharded
from nanodiffusion.tensors import check_fit, load_tensors, load_weights, save_tensors

Profile = Callable[[int], float]  # optimizer steps done, from 1 -> beta in [0, 1]

SIGMA_REL_MAX = 12**-0.5  # of a uniform average, gamma = 0


# ---- profiles ------------------------------------------------------------------------------------


def constant(decay: float = 0.9999) -> Profile:
    """beta = decay: a memory of 1 / (1 - decay) steps that starts full of the initial weights."""
    _require(0 <= decay <= 1, "decay", "between 0 and 1", decay)
    return lambda step: decay


def ramped(decay: float = 0.9999) -> Profile:
    """beta = min(decay, (1 + k) / (10 + k)): the initial weights are forgotten within tens of steps."""
    _require(0 <= decay <= 1, "decay", "between 0 and 1", decay)
    return lambda step: min(decay, (1 + step) / (10 + step))


def warmup(decay: float = 0.9999, gamma: float = 1.0, power: float = 2 / 3) -> Profile:
    """beta = min(decay, 1 - (1 + k / gamma)^-power): with gamma 1, power 2/3 reaches 0.999 after 31,600 steps."""
    _require(0 <= decay <= 1, "decay", "between 0 and 1", decay)
    _require(gamma > 0 and power > 0, "gamma, power", "positive", (gamma, power))
    return lambda step: min(decay, 1 - (1 + step / gamma) ** -power)


def half_life(batch: int, images: float = 500_000, ramp: float | None = 0.05) -> Profile:
    """beta = 2^(-batch / h): a weight's share halves every h = min(images, ramp * images before this step) images.

    Step 1 takes the weights as they are; `ramp` None is h = images throughout. The rule of Karras et al. 2022 (EDM).
    """
    _require(batch > 0 and images > 0, "batch, images", "positive", (batch, images))

    def beta(step: int) -> float:
        h = images if ramp is None else min(images, ramp * batch * (step - 1))
        return 0.5 ** (batch / h) if h > 0 else 0.0

    return beta


def power(sigma_rel: float = 0.05) -> Profile:
    """beta = (1 - 1/k)^(gamma + 1): weights of step s count as s^gamma, so the memory grows with the run.

    `sigma_rel` is the width of that profile relative to the run. Karras et al. 2024 (EDM2), section 3.1.
    """
    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    return lambda step: (1 - 1 / step) ** exponent


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent of a relative width, the root gamma >= 0 of gamma + 1 = sigma_rel^2 (gamma + 2)^2 (gamma + 3).

    UserError: sigma_rel outside (0, 12^-1/2]. Karras et al. 2024, algorithm 2.
    """
    _require(0 < sigma_rel <= SIGMA_REL_MAX, "sigma_rel", f"above 0, at most {SIGMA_REL_MAX:.4f}", sigma_rel)
    t = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))


def gamma_to_sigma_rel(gamma: float) -> float:
    """The relative width (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2 of the profile s^gamma."""
    return (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5


def _require(fine: bool, key: str, expected: str, found: object) -> None:
    if not fine:
        raise UserError("this cannot be averaged with", key=key, expected=expected, found=found)


PROFILES: dict[str, Callable[..., Profile]] = {
    "constant": constant,
    "ramped": ramped,
    "warmup": warmup,
    "half_life": half_life,
    "power": power,
}


# ---- the average ---------------------------------------------------------------------------------


class EMA:
    """A moving average of a module's parameters in fp32, its buffers copied: `tensors`, by state_dict name.

    device: where it is kept, "" = where the module is; on "cpu" it costs a GPU no memory, and every update a copy of the
    weights. Of a sharded module (see shard.py) each process averages its own part, and `tensors` are these parts.
    """

    def __init__(self, module: nn.Module, profile: Profile, device: str = "") -> None:
        self.module, self.profile = module, profile
        self.live: dict[str, Any] = module.state_dict(keep_vars=True)
        averaged = {n: p for n, p in self.live.items() if isinstance(p, nn.Parameter) and p.is_floating_point()}
        self.tensors: dict[str, Tensor] = {
            name: local(tensor.detach()).to(
                device or tensor.device, torch.float32 if name in averaged else tensor.dtype, copy=True
            )
            for name, tensor in self.live.items()
        }
        self.sharded = any(map(sharded, averaged.values()))
        self._parameters = list(averaged.values())
        self._averages = [self.tensors[name] for name in averaged]
        self._buffers = [name for name, _ in module.named_buffers() if name in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after optimizer step `step` = 1, 2, ...: one fused lerp over all."""
        _require(step >= 1, "step", "1 or more", step)
        if self._averages:
            weights = [local(p).to(a) for p, a in zip(self._parameters, self._averages)]
            torch._foreach_lerp_(self._averages, weights, 1 - self.profile(step))
        for name in self._buffers:
            self.tensors[name].copy_(self.module.get_buffer(name))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], file: object = None) -> None:
        """Continue from saved `tensors`, which are whole. UserError: they belong to another network."""
        check_fit(self.live, tensors, file)
        for name, tensor in self.tensors.items():
            tensor.copy_(part(tensors[name], self.live[name]))

    def whole(self) -> dict[str, Tensor]:
        """`tensors`, of a sharded module put together: all its processes must ask at once."""
        return {name: joined(tensor, self.live[name]) for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give `module` the averaged weights, in its own dtypes. UserError: it is another network.

        Parts of a sharded one go to a module that is sharded alike, and to no other.
        """
        if not self.sharded:
            return load_weights(module, self.tensors)
        own = module.state_dict(keep_vars=True)
        check_fit(self.live, own)
        for name, tensor in own.items():
            local(tensor).copy_(self.tensors[name])

    @contextmanager
    def swap(self, module: nn.Module) -> Iterator[nn.Module]:
        """Within this block `module` has the averaged weights; after it, come what may, its own again."""
        live = module.state_dict(keep_vars=True)
        own = {name: local(tensor).detach().clone() for name, tensor in live.items()}
        try:
            self.copy_to(module)
            yield module
        finally:
            with torch.no_grad():
                for name, tensor in module.state_dict(keep_vars=True).items():
                    local(tensor).copy_(own[name])


# ---- any average afterwards ----------------------------------------------------------------------


class Snapshot(NamedTuple):
    """A power average of width `sigma_rel` as it stood after optimizer step `step`."""

    step: int
    sigma_rel: float
    tensors: Mapping[str, Tensor]


def save_snapshot(folder: str | Path, step: int, sigma_rel: float, tensors: Mapping[str, Tensor]) -> Path:
    """Write one snapshot into `folder`, atomically. UserError: full or unwritable disk."""
    path = Path(folder) / f"sigma-{sigma_rel:g}-step-{step:08d}.safetensors"
    save_tensors(path, tensors, {"step": step, "sigma_rel": sigma_rel})
    return path


def load_snapshots(folder: str | Path) -> list[Snapshot]:
    """All snapshots in `folder`, memory-mapped, by step and width. UserError: a damaged file."""
    return sorted((_load_snapshot(p) for p in Path(folder).glob("sigma-*.safetensors")), key=lambda s: s[:2])


def _load_snapshot(path: Path) -> Snapshot:
    tensors, meta = load_tensors(path)
    if not {"step", "sigma_rel"} <= meta.keys():
        raise UserError("not a snapshot of an average", file=path, expected="step and sigma_rel", found=sorted(meta))
    return Snapshot(meta["step"], meta["sigma_rel"], tensors)


def reconstruct(
    snapshots: Sequence[tuple[int, float, Mapping[str, Tensor]]], target_step: int, target_sigma_rel: float
) -> dict[str, Tensor]:
    """The power average of width `target_sigma_rel` at `target_step`, after training, from snapshots of others.

    Floats are summed in fp64 and come in fp32; the rest is copied from the snapshot nearest in time. UserError:
    fewer than two snapshots, none as late as the target, different names or shapes. Needs some six snapshots of each
    width before the target to be close. Karras et al. 2024, algorithm 3.
    """
    shots = [Snapshot(*s) for s in snapshots]
    _require(len(shots) >= 2, "snapshots", "two or more", len(shots))
    last = max(shot.step for shot in shots)
    _require(1 <= target_step <= last, "target_step", f"from 1 to the last snapshot, {last}", target_step)
    for shot in shots[1:]:
        check_fit(shots[0].tensors, shot.tensors, f"snapshot of step {shot.step}, sigma_rel {shot.sigma_rel:g}")
    weights = reconstruction_weights(shots, target_step, target_sigma_rel)
    near = min(shots, key=lambda shot: abs(shot.step - target_step)).tensors
    return {
        name: _combine([shot.tensors[name] for shot in shots], weights)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in near.items()
    }


def reconstruction_weights(
    snapshots: Sequence[tuple[int, float, Any]], target_step: int, target_sigma_rel: float
) -> np.ndarray:
    """Factors (n,) of the snapshots: their sum of profiles is, in least squares, nearest to the target's."""
    steps = np.array([s[0] for s in snapshots], dtype=np.float64)
    gammas = np.array([sigma_rel_to_gamma(s[1]) for s in snapshots])
    gram = _inner(steps[:, None], gammas[:, None], steps, gammas)
    target = _inner(steps, gammas, np.float64(target_step), np.float64(sigma_rel_to_gamma(target_sigma_rel)))
    scale = np.diag(gram) ** -0.5  # profiles of unit length: the steps of a run span orders of magnitude
    return scale * np.linalg.lstsq(scale[:, None] * gram * scale, scale * target, rcond=None)[0]


def _inner(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> np.ndarray:
    """Integral of p_a p_b over time, p_i(s) = (gamma_i + 1) s^gamma_i / t_i^(gamma_i + 1) on [0, t_i]."""
    later_gamma = np.where(t_a < t_b, gamma_b, gamma_a)
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**later_gamma / np.maximum(t_a, t_b)


def _combine(tensors: list[Tensor], weights: np.ndarray) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights):
        total.add_(tensor.double(), alpha=float(weight))
    return total.float()
