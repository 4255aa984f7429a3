"""Fréchet and kernel distances against high precision, the manifold measures against loops, intervals against repetition."""

import math

import numpy as np
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from nanodiffusion.errors import UserError
from nanodiffusion.evaluate.distances import frechet, from_covariance, kernel, kernel_subsets, moments
from nanodiffusion.evaluate.manifold import (
    coverage_terms,
    density_terms,
    discriminant,
    precision_terms,
    radii,
    recall_terms,
)
from nanodiffusion.evaluate.scores import bootstrap, jackknife, leave_out

pytestmark = pytest.mark.usefixtures("one_thread")


def cloud(seed: int, n: int, d: int, rank: int | None = None, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(n, rank or d, generator=g, dtype=torch.float64)
    mix = torch.randn(rank or d, d, generator=g, dtype=torch.float64)
    return scale * (low @ mix + torch.randn(d, generator=g, dtype=torch.float64))


# ---- Fréchet


def exact_moments(x: Tensor):
    rows = [[mpf(float(v)) for v in row] for row in x]
    n, d = len(rows), len(rows[0])
    mean = [mp.fsum(row[i] for row in rows) / n for i in range(d)]
    cov = mp.matrix(d, d)
    for i in range(d):
        for j in range(d):
            cov[i, j] = mp.fsum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / (n - 1)
    return mean, cov


def exact_frechet(x: Tensor, y: Tensor):
    """With C1^(1/2) C2 C1^(1/2), all in 60 digits."""
    (m1, c1), (m2, c2) = exact_moments(x), exact_moments(y)
    values, vectors = mp.eigsy(c1)
    d = len(m1)
    root = vectors * mp.diag([mp.sqrt(max(v, mpf(0))) for v in values]) * vectors.T
    product = root * c2 * root
    inner = mp.eigsy((product + product.T) / 2, eigvals_only=True)
    trace = mp.fsum(c1[i, i] + c2[i, i] for i in range(d)) - 2 * mp.fsum(mp.sqrt(max(v, mpf(0))) for v in inner)
    return mp.fsum((a - b) ** 2 for a, b in zip(m1, m2)) + trace


CASES = {
    **{f"full {i}": (cloud(i, 9 + i, 4), cloud(100 + i, 12, 4)) for i in range(8)},
    **{f"rank 2 of 5, {i}": (cloud(i, 12, 5, rank=2), cloud(100 + i, 9, 5)) for i in range(4)},
    **{f"both of low rank {i}": (cloud(i, 10, 5, rank=1), cloud(50 + i, 10, 5, rank=3)) for i in range(4)},
    **{f"fewer than dimensions {i}": (cloud(i, 3, 6), cloud(70 + i, 4, 6)) for i in range(4)},
    "small against large": (cloud(1, 20, 4, scale=1e-3), cloud(2, 20, 4, scale=1e3)),
    "far from zero": (cloud(3, 20, 4) + 1e4, cloud(4, 20, 4) + 1e4),
    "a dead feature": (cloud(5, 20, 4) * torch.tensor([1.0, 0, 1, 1]), cloud(6, 20, 4) * torch.tensor([1.0, 0, 2, 1])),
    "orthogonal": (cloud(7, 20, 4) * torch.tensor([1.0, 1, 0, 0]), cloud(8, 20, 4) * torch.tensor([0, 0, 1.0, 1])),
}


@pytest.mark.parametrize("case", CASES)
def test_the_frechet_distance_is_that_of_sixty_digits(case: str):
    with mp.workdps(60):
        expected = float(exact_frechet(*CASES[case]))
    found = frechet(*map(moments, CASES[case]))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("full")])
def test_stored_covariances_give_the_same_distance(case: str):
    x, y = CASES[case]
    stored = [
        from_covariance(torch.from_numpy(np.mean(z, 0)), torch.from_numpy(np.cov(z, rowvar=False)))
        for z in map(np.array, (x, y))
    ]
    with mp.workdps(60):
        expected = float(exact_frechet(x, y))
    assert frechet(*stored) == pytest.approx(expected, rel=1e-8)


def test_gaussians_of_one_dimension_have_the_textbook_distance():
    a, b = (
        from_covariance(torch.tensor([1.0]), torch.tensor([[4.0]])),
        from_covariance(torch.tensor([3.0]), torch.tensor([[9.0]])),
    )
    assert frechet(a, b) == pytest.approx((3 - 1) ** 2 + (3 - 2) ** 2, rel=1e-14)


def test_a_set_has_no_distance_to_itself_even_with_fewer_images_than_features():
    x = cloud(0, 20, 64)
    assert abs(frechet(moments(x), moments(x.flip(0)))) < 1e-10 * float(x.var(0).sum())


def test_moments_do_not_depend_on_how_features_are_cut(monkeypatch: pytest.MonkeyPatch):
    x = cloud(0, 50, 6)
    monkeypatch.setattr("nanodiffusion.evaluate.distances.ROWS", 7)
    found = moments(x)
    torch.testing.assert_close(found.covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-13, atol=1e-13)


def test_one_feature_has_no_moments():
    with pytest.raises(UserError, match="two features or more"):
        moments(torch.zeros(1, 3))


# ---- the kernel's


@pytest.mark.parametrize("seed", range(20))
def test_the_kernel_distance_is_the_sum_of_its_definition(seed: int):
    x, y = cloud(seed, 4 + seed % 4, 3, rank=1 + seed % 3), cloud(200 + seed, 5, 3)

    def k(a: Tensor, b: Tensor):
        return (mp.fsum(mpf(float(u)) * mpf(float(v)) for u, v in zip(a, b)) / 3 + 1) ** 3

    with mp.workdps(50):
        own = [
            mp.fsum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
            for z in (x, y)
        ]
        expected = float(sum(own) - 2 * mp.fsum(k(a, b) for a in x for b in y) / (len(x) * len(y)))
    assert kernel(x, y) == pytest.approx(expected, rel=1e-10)


def test_the_kernel_distance_of_two_draws_is_zero_on_average():
    draws = [torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(s)) for s in range(200)]
    found = torch.tensor([kernel(x, y) for x, y in draws])
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(200)


def test_subsets_are_as_large_as_can_be_and_depend_on_the_seed_alone():
    x, y = cloud(0, 20, 3), cloud(1, 20, 3)
    whole = torch.full((5,), kernel(x, y), dtype=torch.float64)
    torch.testing.assert_close(kernel_subsets(x, y, 5, 1000), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel_subsets(x, y, 4, 10, seed=3), kernel_subsets(x, y, 4, 10, seed=3), rtol=0, atol=0)
    assert kernel_subsets(x, y, 4, 10, seed=3).unique().numel() == 4


# ---- manifolds


def ball(points: Tensor, i: int, k: int) -> float:
    others = sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)
    return others[k - 1]


@pytest.mark.parametrize(("seed", "k"), [(s, k) for s in range(3) for k in (1, 3, 5)])
def test_manifold_measures_are_those_of_loops_over_all_pairs(seed: int, k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanodiffusion.evaluate.manifold.ROWS", 7)
    real, fake = cloud(seed, 30, 3), cloud(seed + 40, 25, 3)
    holds = [[math.dist(r, f) <= ball(real, i, k) for f in fake] for i, r in enumerate(real)]
    held = [[math.dist(r, f) <= ball(fake, j, k) for r in real] for j, f in enumerate(fake)]
    columns = list(zip(*holds))
    expected = {
        "precision": [float(any(c)) for c in columns],
        "recall": [float(any(c)) for c in zip(*held)],
        "density": [sum(c) / k for c in columns],
        "coverage": [float(any(row)) for row in holds],
    }
    terms = {"precision": precision_terms, "recall": recall_terms, "density": density_terms, "coverage": coverage_terms}
    found = {name: of(real, fake, k).tolist() for name, of in terms.items()}
    assert found == expected


def test_radii_are_distances_to_the_kth_other():
    x = cloud(0, 20, 3)
    expected = torch.tensor([ball(x, i, 4) ** 2 for i in range(20)], dtype=torch.float64)
    torch.testing.assert_close(radii(x, 4), expected, rtol=1e-9, atol=1e-9)


def test_copies_of_the_real_images_are_within_them_also_when_these_repeat():
    real = cloud(0, 40, 16).repeat(4, 1)
    assert precision_terms(real, real.clone()).mean() == recall_terms(real, real.clone()).mean() == 1


def test_a_single_mode_has_precision_but_no_recall():
    real, fake = torch.randn(2, 400, 2, generator=torch.Generator().manual_seed(0))
    fake = fake * 0.05
    assert precision_terms(real, fake).mean() > 0.95 and recall_terms(real, fake).mean() < 0.1
    assert coverage_terms(real, fake).mean() < 0.2 < 0.8 < density_terms(real, fake).mean()


def test_too_few_neighbours_are_refused():
    with pytest.raises(UserError, match="need more features"):
        precision_terms(cloud(0, 3, 2), cloud(1, 9, 2))


# ---- classes


def test_the_discriminant_is_that_of_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    labels = torch.arange(90) % 3
    x = cloud(0, 90, 4) + labels[:, None] * torch.tensor([1.0, 0, 2, 0])
    other = cloud(1, 50, 4) + 1
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), labels.numpy()).predict(other.numpy())
    assert discriminant(x, labels, 3, shrink=0)(other).tolist() == expected.tolist()


def test_a_class_that_the_reference_lacks_is_never_chosen():
    labels = torch.tensor([0, 2]).repeat(20)
    assert set(discriminant(cloud(0, 40, 3), labels, 4)(cloud(1, 200, 3)).tolist()) <= {0, 2}


# ---- intervals


def test_the_jackknife_knows_the_spread_of_repeated_draws():
    real = moments(torch.randn(4000, 4, generator=torch.Generator().manual_seed(9)))
    draw = lambda s: torch.randn(400, 4, generator=torch.Generator().manual_seed(s)).double() * 1.3 + 0.4
    repeated = torch.tensor([frechet(moments(draw(s)), real) for s in range(60)])
    errors = torch.tensor([jackknife(leave_out(draw(s), real)) for s in range(20)])
    assert errors.mean() == pytest.approx(float(repeated.std()), rel=0.3)


def test_left_out_distances_are_those_of_the_others():
    from nanodiffusion.data import epoch_order

    x, real = cloud(0, 43, 5), moments(cloud(1, 40, 5))
    order = epoch_order(43, 0, 1)
    kept = [torch.tensor([i for i in range(43) if i not in order[g::10]]) for g in range(10)]
    expected = torch.tensor([frechet(moments(x[index]), real) for index in kept], dtype=torch.float64)
    torch.testing.assert_close(leave_out(x, real), expected, rtol=1e-6, atol=1e-6)


def test_the_bootstrap_of_shares_is_the_binomial_interval():
    terms = (torch.arange(1000) < 300).double()
    found = bootstrap(terms)
    reach = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (found.value, found.low, found.high) == (
        0.3,
        pytest.approx(0.3 - reach, abs=0.004),
        pytest.approx(0.3 + reach, abs=0.004),
    )
