import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evodiff.errors import MetricError
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments


def random_features(n: int, d: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x, mix = (torch.randn(rows, d, generator=g, dtype=torch.float64) for rows in (n, d))
    return x @ mix


def gaussian(n: int, d: int, seed: int) -> Gaussian:
    return Gaussian.of(Moments.of(random_features(n, d, seed)))


def test_diagonal_gaussians_in_closed_form():
    m = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.5]], dtype=torch.float64)
    s = torch.tensor([[1.0, 4.0, 0.25], [9.0, 1.0, 0.25]], dtype=torch.float64)
    exact = (m[0] - m[1]).square().sum() + (s[0].sqrt() - s[1].sqrt()).square().sum()
    found = frechet_distance(*(Gaussian(m[i], torch.diag(s[i])) for i in (0, 1)))
    assert found == pytest.approx(exact.item(), rel=1e-14)


def test_commuting_gaussians_in_closed_form():
    q, _ = torch.linalg.qr(random_features(6, 6, 1))
    a, b = (torch.rand(6, generator=torch.Generator().manual_seed(i), dtype=torch.float64) + 0.1 for i in (2, 3))
    zero = torch.zeros(6, dtype=torch.float64)
    found = frechet_distance(*(Gaussian(zero, q @ torch.diag(v) @ q.T) for v in (a, b)))
    assert found == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-10)


@given(st.integers(1, 8), st.integers(2, 20), st.integers(2, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=80)
def test_zero_symmetric_nonnegative_for_any_rank(d, n, m, seed):
    a, b = gaussian(n, d, seed), gaussian(m, d, seed + 1)
    assert frechet_distance(a, a) == 0.0
    assert frechet_distance(a, Gaussian(a.mean.clone(), a.cov.clone(), a.n)) == 0.0
    forth, back = frechet_distance(a, b), frechet_distance(b, a)
    scale = (a.cov.trace() + b.cov.trace()).item()
    assert forth >= 0 and not math.isnan(forth)
    assert forth == pytest.approx(back, rel=1e-9, abs=1e-7 * scale)


@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0.01, 100))
@settings(deadline=None, max_examples=40)
def test_scaling_shift_and_rotation(d, seed, factor):
    """The distance scales by the square, does not see rotations, and is |s|^2 between equal sets shifted by s."""
    x, y = random_features(30, d, seed), random_features(30, d, seed + 1)
    q, _ = torch.linalg.qr(random_features(d, d, seed + 2))
    plain = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_distance(Moments.of(factor * x), Moments.of(factor * y)) == pytest.approx(
        factor**2 * plain, rel=1e-7
    )
    assert frechet_distance(Moments.of(x @ q), Moments.of(y @ q)) == pytest.approx(plain, rel=1e-7)
    shift = torch.arange(1, d + 1, dtype=torch.float64)
    assert frechet_distance(Moments.of(x), Moments.of(x + shift)) == pytest.approx(
        shift.square().sum().item(), rel=1e-6
    )


def by_singular_values(x: torch.Tensor, y: torch.Tensor) -> float:
    """From the centred data themselves: tr (S_x S_y)^(1/2) is the nuclear norm of X^T Y, exact at any rank."""
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross).item()


@pytest.mark.parametrize("n", [3, 20, 64, 65, 66, 300])
@pytest.mark.parametrize("m", [10, 200])
def test_fewer_samples_than_dimensions(n, m):
    x, y = random_features(n, 64, 5), random_features(m, 64, 6)
    a, b = Gaussian.of(Moments.of(x)), Gaussian.of(Moments.of(y))
    assert frechet_distance(a, b) == pytest.approx(by_singular_values(x, y), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(by_singular_values(x, y), rel=1e-10)


def test_more_dimensions_than_a_block_of_the_product():
    x, y = random_features(700, 600, 1), random_features(700, 600, 2)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(by_singular_values(x, y), rel=1e-9)


@pytest.mark.parametrize("n", [3, 20, 64])
def test_deficient_statistics_of_unknown_n(n):
    """As published files are: round-off below zero must be cut, or the roots are NaN."""
    x, y = random_features(n, 64, 5), random_features(200, 64, 6)
    a, b = (Gaussian(g.mean, g.cov) for g in map(Moments.of, (x, y)))
    expected = by_singular_values(x, y)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)


def test_constant_features_have_a_distance():
    zero = Gaussian(torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64))
    other = gaussian(50, 4, 0)
    expected = (other.mean.square().sum() + other.cov.trace()).item()
    assert frechet_distance(zero, other) == pytest.approx(expected)
    assert frechet_distance(other, zero) == pytest.approx(expected)


def test_features_that_never_fire_do_not_break_the_factor():
    x, y = random_features(100, 5, 1), random_features(100, 5, 2)
    plain = frechet_distance(Moments.of(x), Moments.of(y))
    dead = torch.zeros(100, 3, dtype=torch.float64)
    padded = [Moments.of(torch.cat([v, dead], 1)) for v in (x, y)]
    assert frechet_distance(*padded) == pytest.approx(plain, rel=1e-9)


def test_the_factor_is_taken_once_and_multiplies_to_the_covariance():
    for g in (gaussian(100, 10, 0), gaussian(5, 10, 0)):
        assert torch.allclose(g.factor @ g.factor.T, g.cov, rtol=1e-9, atol=1e-12)
        assert g.factor is g.factor


def test_known_bad_variants_are_told_apart():
    """A biased covariance, and covariances taken in float32, both miss the closed form by more than the tests allow."""
    x = random_features(30, 3, 1)
    shift = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    truth = frechet_distance(Moments.of(x), Moments.of(2 * x + shift))
    mean, cov = x.mean(0), torch.cov(x.T)
    exact = ((mean + shift).square().sum() + cov.trace()).item()
    assert truth == pytest.approx(exact, rel=1e-10)
    biased = Gaussian(mean, cov * 29 / 30), Gaussian(2 * mean + shift, 4 * cov * 29 / 30)
    assert frechet_distance(*biased) != pytest.approx(exact, rel=1e-3)


def test_other_dimensions_and_nan_are_refused():
    with pytest.raises(MetricError, match="3 and 4"):
        frechet_distance(gaussian(9, 3, 0), gaussian(9, 4, 0))
    with pytest.raises(MetricError, match="not finite"):
        Gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2, 2), math.nan, dtype=torch.float64))
    with pytest.raises(MetricError, match="do not fit"):
        Gaussian(torch.zeros(2, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))
