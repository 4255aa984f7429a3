"""Measures of generated images against a reference, each with an interval that says how it was made."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanodiffusion.data.tensors import epoch_order
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.evaluate.distances import Moments, frechet, kernel_subsets, moments
from nanodiffusion.evaluate.manifold import coverage_terms, density_terms, discriminant, precision_terms, recall_terms
from nanodiffusion.evaluate.statistics import Statistics, chosen

GROUPS, T_95 = 10, 2.262  # of the jackknife; Student's t of 9 degrees of freedom
RESAMPLES, SUBSETS, SUBSET = 1000, 100, 1000
JACKKNIFE = f"95 %, jackknife over {GROUPS} groups of the samples"
BOOTSTRAP = f"95 %, bootstrap of {RESAMPLES}"
SPREAD = f"95 %, spread of {SUBSETS} subsets, scaled by the root of their share"


class Score(NamedTuple):
    """A measure, and the interval of what other samples would have given, the reference being what it is."""

    value: float
    low: float | None = None
    high: float | None = None
    interval: str = ""


class Sides(NamedTuple):
    """What measures see: features x (n d) of the samples with labels (n), and a reference."""

    x: Tensor
    labels: Tensor | None
    reference: Statistics
    classes: tuple[str, ...] = ()

    @property
    def few(self) -> Tensor:
        """Those of x that pairwise measures use (<= EXAMPLES d), in double precision."""
        return self.x[chosen(len(self.x))].double()

    @property
    def real(self) -> Tensor:
        """Features of the reference. UserError: it has only moments."""
        if self.reference.examples is None:
            fix = "metrics=[frechet], or a reference of images"
            raise UserError("the reference has moments only, no features", key="metrics", fix=fix)
        return self.reference.examples.double()


def score_frechet(sides: Sides) -> Score:
    """Fréchet's distance."""
    value = frechet(moments(sides.x), sides.reference.moments)
    if len(sides.x) < 2 * GROUPS:
        return Score(value)
    reach = T_95 * jackknife(leave_out(sides.x.double(), sides.reference.moments))
    return Score(value, value - reach, value + reach, JACKKNIFE)


def leave_out(x: Tensor, reference: Moments) -> Tensor:
    """Fréchet distances (GROUPS) of x (n d) without one of GROUPS random groups each.

    tr (C1 C2)^(1/2) is here the sum of the roots of the eigenvalues of A C2 A^T with C1 = A^T A: half the digits, in less
    time, which is plenty for a spread.
    """
    shift = x.mean(0)
    x, found = x - shift, []
    whole, order = x.T @ x, epoch_order(len(x), 0, 1)
    for group in range(GROUPS):
        out = x[order[group::GROUPS]]
        n = len(x) - len(out)
        mean = -out.sum(0) / n
        covariance = (whole - out.T @ out - n * mean[:, None] * mean) / (n - 1)
        product = reference.factor @ covariance @ reference.factor.T
        root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
        away = (mean + shift - reference.mean).square().sum()
        found.append(away + covariance.trace() + reference.factor.square().sum() - 2 * root)
    return torch.stack(found)


def jackknife(left_out: Tensor) -> float:
    """The standard error of a measure from its values (g) without each of g groups (Tukey 1958)."""
    g = len(left_out)
    return float(((g - 1) / g * (left_out - left_out.mean()).square().sum()).sqrt())


def score_kernel(sides: Sides) -> Score:
    """The kernel distance: the mean of subsets, as published."""
    x, real = sides.few, sides.real
    size = min(SUBSET, len(x) // 2, len(real) // 2)
    found = kernel_subsets(x, real, SUBSETS, size)
    reach = 1.96 * float(found.std()) * (size / min(len(x), len(real))) ** 0.5
    return Score(mean := float(found.mean()), mean - reach, mean + reach, SPREAD)


def bootstrap(terms: Tensor, seed: int = 0) -> Score:
    """The mean of terms (n), and the middle 95 % of means of as many drawn with replacement (Efron 1979)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: terms[torch.randint(len(terms), (len(terms),), generator=g)].mean()
    means = torch.stack([draw() for _ in range(RESAMPLES)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Score(float(terms.mean()), low, high, BOOTSTRAP)


def score_accuracy(sides: Sides) -> Score:
    """The share of samples that a linear discriminant, fitted to the reference, takes for the class they were made for."""
    if (why := no_accuracy(sides)) is not None:
        raise UserError("there is no class accuracy", key="metrics", found=why, fix="leave accuracy out")
    known, labels = sides.reference.labels, sides.labels
    assert known is not None and labels is not None
    classifier = discriminant(sides.real, known, int(known.max()) + 1)
    return bootstrap((classifier(sides.x) == labels).double())


def no_accuracy(sides: Sides) -> str | None:
    """Why classes cannot be compared, or None."""
    known = sides.reference.labels
    if sides.labels is None or known is None or sides.reference.examples is None:
        return "labels are missing on one side or both"
    if sides.classes and sides.reference.classes and sides.classes != sides.reference.classes:
        return "the classes of samples and reference have other names"
    outside = int(sides.labels.max()) > int(known.max()) or int(sides.labels.min()) < 0
    return "some samples are of classes that the reference has not" if outside else None


def _mean_of(terms: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sides], Score]:
    return lambda sides: bootstrap(terms(sides.real, sides.few))


METRICS: dict[str, Callable[[Sides], Score]] = {
    "frechet": score_frechet,
    "kernel": score_kernel,
    "precision": _mean_of(precision_terms),
    "recall": _mean_of(recall_terms),
    "density": _mean_of(density_terms),
    "coverage": _mean_of(coverage_terms),
    "accuracy": score_accuracy,
}


def usual(sides: Sides) -> list[str]:
    """The measures that can be had of these sides."""
    if sides.reference.examples is None:
        return ["frechet"]
    return [name for name in METRICS if name != "accuracy" or no_accuracy(sides) is None]


def scores(sides: Sides, metrics: Sequence[str] = ()) -> dict[str, Score]:
    """Measures by name; without names, all that can be had. UserError: an unknown name, or one that cannot be had."""
    return {name: lookup(METRICS, name, "metrics")(sides) for name in metrics or usual(sides)}


def called(metric: str, features: str, published: bool) -> str:
    """What to call a measure: FID and KID only with the published Inception weights."""
    names = {"frechet": ("FID", "frechet_distance"), "kernel": ("KID", "kernel_distance")}
    short, long = names.get(metric, (metric, metric))
    return short if published else f"{long} (features: {features})"
