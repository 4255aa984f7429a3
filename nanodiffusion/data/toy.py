"""Small sets of points in the plane, x (n 2) float32: all that a diffusion model does, in a second and a picture."""

import csv
import math

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.data.tensors import TensorData, at_least
from nanodiffusion.errors import UserError, lookup


def swiss_roll(
    n: int = 1000,
    tmin: float = math.pi / 2,
    tmax: float = 5 * math.pi,
    center: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
) -> TensorData:
    """A spiral, center + scale (t cos t, t sin t) / tmax with t = tmin + u tmax and u even in [0, 1]."""
    t = tmin + torch.linspace(0, 1, at_least(n, 1, "n")) * tmax
    points = torch.stack([t * torch.cos(t) / tmax, t * torch.sin(t) / tmax], 1)
    return TensorData(torch.tensor(center) + scale * points)


def tree(branching: int = 4, depth: int = 3, per_path: int = 30) -> TensorData:
    """A tree with its leaves on the unit circle: `per_path` points, even in arc length, from the root to each leaf.

    A node of level l has radius l / depth and the mean angle of its leaves. The label is the leaf, of branching^depth.
    """
    leaves = np.arange(at_least(branching, 1, "branching") ** at_least(depth, 1, "depth"))
    nodes = np.stack([_ancestors(leaves, branching, depth, level) for level in range(depth + 1)], 1)
    points = np.stack([_along(path, at_least(per_path, 2, "per_path")) for path in nodes])
    labels = torch.from_numpy(leaves).repeat_interleave(per_path)
    return TensorData(torch.from_numpy(points).float().flatten(0, 1), labels)


def _ancestors(leaves: np.ndarray, branching: int, depth: int, level: int) -> np.ndarray:
    """Where the ancestors of `leaves` (k) at `level` lie: (k 2)."""
    group = branching ** (depth - level)
    angle = (leaves // group * group + (group - 1) / 2) * (2 * math.pi / len(leaves))
    return level / depth * np.stack([np.cos(angle), np.sin(angle)], 1)


def _along(path: np.ndarray, n: int) -> np.ndarray:
    """n points (n 2), even in arc length, on the polyline through `path` (nodes 2)."""
    reached = np.r_[0, np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()]
    distance = np.linspace(0, reached[-1], n)
    return np.stack([np.interp(distance, reached, coordinate) for coordinate in path.T], 1)


def two_moons(n: int = 2000, noise: float = 0.05, seed: int = 0) -> TensorData:
    """Two interleaved half circles of radius 1, labelled, with noise: scikit-learn's make_moons, unshuffled."""
    upper, lower = (torch.linspace(0, math.pi, k) for k in _halves(n))
    outer = torch.stack([upper.cos(), upper.sin()], 1)
    inner = torch.stack([1 - lower.cos(), 0.5 - lower.sin()], 1)
    return _two(outer, inner, noise, seed, ("upper", "lower"))


def circles(n: int = 2000, factor: float = 0.5, noise: float = 0.03, seed: int = 0) -> TensorData:
    """Two circles of radius 1 and `factor`, labelled, with noise: scikit-learn's make_circles, unshuffled."""
    outer, inner = (_circle(k) for k in _halves(n))
    return _two(outer, factor * inner, noise, seed, ("outer", "inner"))


def checkerboard(n: int = 4000, cells: int = 4, seed: int = 0) -> TensorData:
    """Uniform points on the black squares of a cells x cells board over [-1, 1]^2; the label is the square."""
    row, column = torch.meshgrid(*[torch.arange(at_least(cells, 1, "cells"))] * 2, indexing="ij")
    corners = torch.stack([column, row], -1)[(row + column) % 2 == 0]
    labels = torch.arange(at_least(n, 1, "n")) % len(corners)
    inside = torch.rand(n, 2, generator=_random(seed))
    return TensorData((corners[labels] + inside) * (2 / cells) - 1, labels)


def gaussians(n: int = 2000, modes: int = 8, std: float = 0.05, radius: float = 1.0, seed: int = 0) -> TensorData:
    """`modes` equal Gaussians of deviation `std` evenly on a ring; the label is the mode."""
    labels = torch.arange(at_least(n, 1, "n")) % at_least(modes, 1, "modes")
    return TensorData(radius * _circle(modes)[labels] + std * _normal(n, seed), labels)


def pinwheel(
    n: int = 2000,
    arms: int = 5,
    radial: float = 0.3,
    tangential: float = 0.05,
    rate: float = 0.25,
    seed: int = 0,
) -> TensorData:
    """Curved arms, Gaussians at radius 1 turned by rate e^r; the label is the arm (Johnson et al. 2016, SVAE)."""
    labels = torch.arange(at_least(n, 1, "n")) % at_least(arms, 1, "arms")
    r, side = (_normal(n, seed) * torch.tensor([radial, tangential]) + torch.tensor([1.0, 0.0])).T
    angle = labels * (2 * math.pi / arms) + rate * r.exp()
    cos, sin = angle.cos(), angle.sin()
    return TensorData(torch.stack([r * cos - side * sin, r * sin + side * cos], 1), labels)


def datasaurus(file: str, shape: str = "dino", repeat: int = 15) -> TensorData:
    """One shape of the Datasaurus Dozen from its table (name, x, y by tabs): (p - 50) / 50, `repeat` times over.

    Matejka and Fitzmaurice 2017. UserError on a missing file, an unknown shape or a row that is not a number pair.
    """
    points = torch.tensor(lookup(_table(file), shape, "shape"))
    return TensorData(((points - 50) / 50).repeat(at_least(repeat, 1, "repeat"), 1))


def _table(file: str) -> dict[str, list[tuple[float, float]]]:
    shapes: dict[str, list[tuple[float, float]]] = {}
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.reader(lines, delimiter="\t"), 1):
                if number > 1 or row != ["dataset", "x", "y"]:
                    name, x, y = row
                    shapes.setdefault(name, []).append((float(x), float(y)))
    except OSError as e:
        raise UserError("the table cannot be read", file=file, found=e.strerror) from e
    except (ValueError, csv.Error) as e:  # also a UnicodeDecodeError
        raise UserError("the table has a bad row", file=file, expected="name, x, y by tabs", found=str(e)) from e
    return shapes


def _halves(n: int) -> tuple[int, int]:
    return at_least(n, 2, "n") // 2, n - n // 2


def _circle(n: int) -> Tensor:
    """n even points (n 2) on the unit circle."""
    angle = torch.arange(n) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], 1)


def _two(first: Tensor, second: Tensor, noise: float, seed: int, names: tuple[str, str]) -> TensorData:
    points = torch.cat([first, second])
    labels = torch.tensor([0, 1]).repeat_interleave(torch.tensor([len(first), len(second)]))
    return TensorData(points + noise * _normal(len(points), seed), labels, names)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, 2, generator=_random(seed))
