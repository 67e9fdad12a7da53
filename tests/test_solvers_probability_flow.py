"""The adaptive Runge-Kutta 4(5): the pair's order conditions, its tolerances on exact flows, and what it refuses."""

import math

import pytest
import torch

from evodiff.denoiser import Counting
from evodiff.errors import BudgetError, ConfigError, SamplingError
from evodiff.grid import LogSNR, grid_for
from evodiff.models.analytic import GaussianMixture
from evodiff.sampling import integrate
from evodiff.schedule import EDM, LinearVP
from evodiff.solvers.probability_flow import A, C, E, ProbabilityFlow

SCHEDULES = {"edm": EDM(), "vp": LinearVP()}


def gaussian(schedule):
    mean = torch.tensor([0.3, -0.2, 0.6, 0.1], dtype=torch.float64).view(1, 1, 2, 2)
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(mean, 0.5 * one, one, schedule)


def solve(solver, schedule, batch=3):
    """The result, the exact one, and the evaluations made."""
    model = Counting(gaussian(schedule))
    grid = grid_for(None, solver, LogSNR(), schedule)
    s, t = grid.nodes
    std = [math.sqrt(node.alpha**2 * 0.25 + node.sigma**2) for node in (s, t)]
    mean = gaussian(schedule).means[0]
    x = std[0] * torch.randn(batch, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = t.alpha * mean + (x - s.alpha * mean) * std[1] / std[0]
    return integrate(solver, model, x, grid), exact, model.nfe


def test_the_pair_meets_its_order_conditions():
    """Stages add up to their places; both results integrate polynomials exactly: degree 4, and the error degree 3."""
    b, c = (*A[-1], 0), (0, *C)
    for row, place in zip(A, C, strict=True):
        assert sum(row) == pytest.approx(place, abs=1e-14)
    for k in range(5):
        assert sum(w * x**k for w, x in zip(b, c, strict=True)) == pytest.approx(1 / (k + 1), abs=1e-14)
    for k in range(4):
        assert sum(e * x**k for e, x in zip(E, c, strict=True)) == pytest.approx(0, abs=1e-14)
    assert abs(sum(e * x**4 for e, x in zip(E, c, strict=True))) > 1e-4
    # one condition beyond quadrature: sum_i b_i sum_j a_ij c_j = 1/6
    inner = [sum(a * x for a, x in zip(row, c, strict=False)) for row in ((), *A)]
    assert sum(w * v for w, v in zip(b, inner, strict=True)) == pytest.approx(1 / 6, abs=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_error_follows_the_tolerance(schedule):
    """A hundredth of the tolerance costs at most some 100^(1/5) = 2.5 times the steps, and the error falls with it."""
    results = [solve(ProbabilityFlow(rtol=tol, atol=tol), SCHEDULES[schedule]) for tol in (1e-4, 1e-6, 1e-8)]
    for tol, (out, exact, nfe) in zip((1e-4, 1e-6, 1e-8), results, strict=True):
        assert (out - exact).abs().max() < 10 * tol
        assert nfe % 6 == 1
    ratios = [b[2] / a[2] for a, b in zip(results, results[1:], strict=False)]
    assert all(1.2 < ratio < 4 for ratio in ratios)


def test_every_sample_of_a_batch_meets_the_tolerance():
    """One hard sample among easy ones decides the steps."""
    together, exact, _ = solve(ProbabilityFlow(), EDM(), batch=64)
    assert (together - exact).flatten(1).norm(dim=1).max() < 2e-4


def test_a_budget_is_refused():
    with pytest.raises(BudgetError, match="chooses its own steps"):
        grid_for(10, ProbabilityFlow(), LogSNR(), EDM())


def test_a_network_that_returns_nan_stops_it():
    grid = grid_for(None, ProbabilityFlow(), LogSNR(), EDM())
    with pytest.raises(SamplingError, match="NaN"):
        integrate(ProbabilityFlow(), lambda x, node: x * math.nan, torch.ones(1, 1, 1, 1), grid)


def test_too_few_steps_are_reported():
    with pytest.raises(SamplingError, match="3 steps did not reach the end"):
        solve(ProbabilityFlow(max_steps=3), EDM())


@pytest.mark.parametrize("field", ["rtol", "atol", "max_steps"])
def test_impossible_fields_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field}=0"):
        ProbabilityFlow(**{field: 0})
