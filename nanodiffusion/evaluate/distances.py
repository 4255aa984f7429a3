"""Distances between two clouds of features: Fréchet's and the kernel's, in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nanodiffusion.errors import UserError

ROWS = 4096  # features that are taken into a factor at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (d) and covariance of n features, as a factor (r d) with covariance = factor^T factor; float64, r <= d."""

    mean: Tensor
    factor: Tensor
    n: int

    @cached_property
    def covariance(self) -> Tensor:
        """(d d), with n - 1 in the denominator."""
        return self.factor.T @ self.factor


def moments(x: Tensor) -> Moments:
    """Of features x (n d), n > 1, by QR decompositions: no covariance is formed, so none of the digits are lost."""
    if x.ndim != 2 or len(x) < 2:
        raise UserError("moments need two features or more", expected="(n d)", found=tuple(x.shape))
    x = x.double()
    mean = x.mean(0)
    factor = x.new_zeros(0, x.shape[1])
    for part in (x - mean).split(ROWS):
        factor = torch.linalg.qr(torch.cat([factor, part]), mode="r").R
    return Moments(mean, factor / (len(x) - 1) ** 0.5, len(x))


def from_covariance(mean: Tensor, covariance: Tensor, n: int = 0) -> Moments:
    """Moments from a mean (d) and a covariance (d d) that others have stored; n = 0: not known.

    Eigenvalues below what float64 resolves are rounding, and count as zero.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.T).double() / 2)
    values = torch.where(values > values.max() * len(values) * torch.finfo(values.dtype).eps, values, 0)
    return Moments(mean.double(), values.sqrt()[:, None] * vectors.T, n)


def frechet(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017, equation 6).

    With C = R^T R the last trace is the sum of the singular values of R1 R2^T: no root of a matrix is taken, and
    covariances without full rank are as exact as others.
    """
    root = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    return float((a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum() - 2 * root)


def kernel(x: Tensor, y: Tensor) -> float:
    """The unbiased squared MMD of features x (n d), y (m d) for k(x, y) = (x.y / d + 1)^3 (Binkowski et al. 2018)."""
    x, y = x.double(), y.double()
    n, m, d = len(x), len(y), x.shape[1]
    if min(n, m) < 2:
        raise UserError("a kernel distance needs two features or more on either side", found=f"{n} and {m}")
    inside = [((z @ z.T / d + 1) ** 3, len(z)) for z in (x, y)]
    own = sum((k.sum() - k.diagonal().sum()) / (k_n * (k_n - 1)) for k, k_n in inside)
    return float(own - 2 * ((x @ y.T / d + 1) ** 3).mean())


def kernel_subsets(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> Tensor:
    """Kernel distances (subsets) of random subsets, of `size` features or of all where there are fewer: their mean is KID."""
    g = torch.Generator().manual_seed(seed)
    size = min(size, len(x), len(y))
    chosen = lambda z: z[torch.randperm(len(z), generator=g)[:size]]
    return torch.tensor([kernel(chosen(x), chosen(y)) for _ in range(subsets)], dtype=torch.float64)
