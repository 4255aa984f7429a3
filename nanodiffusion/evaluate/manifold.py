"""How much of one cloud of features lies within another: precision, recall, density, coverage; and classes told apart."""

from typing import NamedTuple

import torch
from torch import Tensor

from nanodiffusion.errors import UserError

ROWS = 1024  # of a table of distances at a time
TIE = 1e-12  # of the largest squared norm: squared distances that differ by less are the same, but for rounding


class Inside(NamedTuple):
    """For each real feature (n): its k-neighbourhood holds a generated one. For each generated one (m): how many hold it."""

    covered: Tensor
    holders: Tensor


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (n m) by |x|^2 + |y|^2 - 2 x.y."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def radii(x: Tensor, k: int) -> Tensor:
    """Squared distances (n) of features x (n d) to their k-th nearest other."""
    if len(x) <= k:
        raise UserError(f"neighbourhoods of {k} need more features", expected=f"{k + 1} or more", found=len(x))
    found = []
    for start in range(0, len(x), ROWS):
        squared = _squared(x[start : start + ROWS], x)
        squared[torch.arange(len(squared)), torch.arange(start, start + len(squared))] = torch.inf
        found.append(squared.kthvalue(k, 1).values)
    return torch.cat(found)


def inside(real: Tensor, fake: Tensor, k: int) -> Inside:
    """Which features of `fake` (m d) lie in the balls around `real` (n d) that reach to their k-th neighbour."""
    mean = real.double().mean(0)
    real, fake = real.double() - mean, fake.double() - mean
    reach = radii(real, k) + TIE * max(real.square().sum(1).max(), fake.square().sum(1).max())
    held = [_squared(part, fake) <= reach_of[:, None] for part, reach_of in zip(real.split(ROWS), reach.split(ROWS))]
    covered = torch.cat([part.any(1) for part in held])
    return Inside(covered, torch.stack([part.sum(0) for part in held]).sum(0))


def precision_terms(real: Tensor, fake: Tensor, k: int = 3) -> Tensor:
    """Of each of `fake` (m d), 1 if it lies in the real manifold (m); precision is the mean (Kynkäänniemi et al. 2019)."""
    return (inside(real, fake, k).holders > 0).double()


def recall_terms(real: Tensor, fake: Tensor, k: int = 3) -> Tensor:
    """Of each of `real` (n d), 1 if it lies in the generated manifold (n); recall is the mean."""
    return precision_terms(fake, real, k)


def density_terms(real: Tensor, fake: Tensor, k: int = 5) -> Tensor:
    """Of each of `fake` (m d), the real neighbourhoods that hold it, over k (m); density is the mean (Naeem et al. 2020)."""
    return inside(real, fake, k).holders.double() / k


def coverage_terms(real: Tensor, fake: Tensor, k: int = 5) -> Tensor:
    """Of each of `real` (n d), 1 if its neighbourhood holds a generated one (n); coverage is the mean (Naeem et al. 2020)."""
    return inside(real, fake, k).covered.double()


class Discriminant(NamedTuple):
    """Linear discriminant analysis: the class with the largest x . weight + bias; weight (d k), bias (k)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Features (n d) -> classes (n)."""
        return (x.double() @ self.weight + self.bias).argmax(1)


def discriminant(x: Tensor, labels: Tensor, classes: int, shrink: float = 1e-3) -> Discriminant:
    """Fitted to features x (n d) of labels (n): one covariance for all classes, `shrink` of its mean variance added."""
    x = x.double()
    known = [k for k in range(classes) if bool((labels == k).any())]
    means = torch.stack([x[labels == k].mean(0) for k in known])
    place = torch.full((classes,), -1).index_copy(0, torch.tensor(known), torch.arange(len(known)))
    rest = x - means[place[labels]]
    covariance = rest.T @ rest / len(x)
    covariance += (shrink * covariance.diagonal().mean() + 1e-12) * torch.eye(x.shape[1], dtype=x.dtype)
    chosen = torch.linalg.solve(covariance, means.T)
    prior = torch.stack([(labels == k).double().mean() for k in known]).log()
    weight = x.new_zeros(x.shape[1], classes).index_copy(1, torch.tensor(known), chosen)
    bias = x.new_full((classes,), -torch.inf)
    return Discriminant(weight, bias.index_copy(0, torch.tensor(known), prior - (means.T * chosen).sum(0) / 2))
