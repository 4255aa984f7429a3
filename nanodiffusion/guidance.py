"""Guidance maps denoisers to a denoiser. In D-space, which is exact because D is affine in F at fixed (x, sigma).

A bound denoiser is (x (b ...), sigma (b)) -> x0 (b ...), what a sampler takes.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Bound = Callable[[Tensor, Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def bind(denoiser: Denoise, cond: dict[str, Any] | None = None) -> Bound:
    """The denoiser with its conditioning fixed."""
    return lambda x, sigma: denoiser(x, sigma, cond or {})


def zeros_like_cond(cond: dict[str, Any]) -> dict[str, Any]:
    """The unconditional input of models trained with zeros in place of their conditioning."""
    return tree_map(torch.zeros_like, cond)


def unconditional(cond: Mapping[str, Any], null_label: int | None = None) -> dict[str, Any]:
    """What a model of ours is trained to see instead of a condition: the null class, no text (zeros), all else as it is."""
    nothing = {"label": partial(torch.full_like, fill_value=null_label or 0), "pooled": torch.zeros_like}
    return {key: nothing[key](value) if key in nothing else value for key, value in cond.items()}


def cfg(
    denoiser: Denoise,
    cond: dict[str, Any],
    uncond: dict[str, Any],
    scale: float,
    lo: float = 0.0,
    hi: float = math.inf,
    rescale: float = 0.0,
) -> Bound:
    """D_u + scale (D_c - D_u) for lo <= sigma <= hi, D_c elsewhere (Ho & Salimans 2022; Kynkäänniemi et al. 2024).

    scale 1 is no guidance. uncond: null class, zeros or a negative prompt, of cond's structure; both in one batch.
    rescale in [0, 1]: how far each sample's standard deviation is brought back to D_c's (Lin et al. 2023, eq. 15-16).
    """
    both = tree_map(lambda c, u: torch.cat([c, u]), cond, uncond)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        if scale == 1 or not lo <= float(sigma[0]) <= hi:
            return denoiser(x, sigma, cond)
        d_c, d_u = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return _rescaled(torch.lerp(d_u, d_c, scale), d_c, rescale)

    return guided


def _rescaled(d: Tensor, reference: Tensor, amount: float) -> Tensor:
    if not amount:
        return d
    dims = tuple(range(1, d.ndim))
    ratio = reference.std(dims, keepdim=True) / d.std(dims, keepdim=True)
    return d * (1 + amount * (ratio - 1))


def autoguide(main: Bound, weak: Bound, scale: float) -> Bound:
    """Guidance by a weaker version of the same model, D_w + scale (D - D_w) (Karras et al. 2024a)."""
    return lambda x, sigma: torch.lerp(weak(x, sigma), main(x, sigma), scale)


def loss_guidance(
    D: Bound, loss: Callable[[Tensor], Tensor], scale: float = 1.0, every: int = 1, through_net: bool = False
) -> Bound:
    """D moved down the gradient of a loss of the clean estimate, x0 - scale sigma^2 dloss/dx, on every `every`-th call.

    loss: x0 (b ...) -> (b); decode inside it to guide on pixels. through_net: differentiate the network too
    (diffusion posterior sampling, Chung et al. 2023), else dloss/dx0 stands for dloss/dx.
    """
    calls = 0

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if (calls - 1) % every:
            return D(x, sigma)
        leaf = x.detach().requires_grad_(through_net)
        with torch.set_grad_enabled(through_net):
            x0 = D(leaf, sigma)
        with torch.enable_grad():
            wrt = leaf if through_net else (x0 := x0.detach().requires_grad_())
            (gradient,) = torch.autograd.grad(loss(x0).sum(), wrt)
        variance = sigma.to(x).square().reshape(-1, *[1] * (x.ndim - 1))
        return (x0 - scale * variance * gradient).detach()

    return guided


def keep(D: Bound, x0_known: Tensor, mask: Tensor) -> Bound:
    """D where mask (b 1 h w) is 1, x0_known (b c h w) where it is 0, their mean between: inpainting with any model.

    A step of an ODE solver moves x straight toward a mean of its D, so what is known stays x0_known + sigma eps, with one
    eps: the same as blending it in again after every step (as in Lugmayr et al. 2022, without their resampling).
    """

    def kept(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(x0_known.to(x), D(x, sigma), mask.to(x).expand_as(x))

    return kept


def stepwise(levels: Sequence[float], denoisers: Sequence[Bound]) -> Bound:
    """Another denoiser for every step of a ladder: the i-th where levels[i+1] < sigma <= levels[i].

    levels (k) or (k+1), decreasing; denoisers (k). Above the first and below the last level the nearest step's.
    A function of sigma alone, so that a solver may ask within or twice per step. Repeat a denoiser for a window.
    """
    falling = [-float(level) for level in levels][: len(denoisers)]

    def chosen(x: Tensor, sigma: Tensor) -> Tensor:
        step = bisect_right(falling, -float(sigma[0])) - 1
        return denoisers[max(step, 0)](x, sigma)

    return chosen
