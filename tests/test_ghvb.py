"""Momentum: without it the methods are their bases; with it, orders and weights as the paper says."""

from dataclasses import replace

import pytest
import torch
from exact import SHORT_EDM, VP, grid, mixture, order, start

from evodiff.errors import ConfigError
from evodiff.sampling import integrate
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.dpm_solver_v3 import DPMSolverV3, Statistics
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.evodiff import EVODiff
from evodiff.solvers.evodiff_paper import EVODiffPaper
from evodiff.solvers.ghvb import GHVB, HeavyBall, ghvb_weights
from evodiff.solvers.ipndm import IPNDM
from evodiff.solvers.scire import SciRESinglestep
from evodiff.solvers.score_sde import PredictorCorrector
from evodiff.solvers.sde_dpmpp import SDEDPMSolverPP
from evodiff.solvers.teleport import Teleport
from evodiff.solvers.unipc import UniPC


def run(solver, steps=9):
    return integrate(solver, mixture(), start(shape=(2, 3, 3)), grid(steps))


@pytest.mark.parametrize("base", [DPMSolverPP(order=3), IPNDM(order=4), UniPC(corrector=False)])
def test_heavy_ball_without_momentum_is_its_base(base):
    assert torch.equal(run(HeavyBall(base, beta=1)), run(base))
    assert (run(HeavyBall(base, beta=0.8)) - run(base)).norm() > 1e-3


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_ghvb_without_momentum_is_adams_bashforth(r):
    torch.testing.assert_close(run(GHVB(r, 1.0)), run(IPNDM(r)), rtol=1e-12, atol=1e-12)


def test_heavy_ball_by_hand():
    """v <- (1 - beta) v + beta eps, from v = eps at the start: the paper's HB on Euler."""
    g, x, model, beta = grid(5), start(shape=(2, 3, 3)), mixture(), 0.7
    v, y = None, x
    for step in g.steps():
        eps = (y - model(y, step.s)) / step.s.kappa
        v = eps if v is None else (1 - beta) * v + beta * eps
        y = y + (step.t.kappa - step.s.kappa) * v
    out = integrate(HeavyBall(DPMSolverPP(order=1), beta), model, x, g)
    torch.testing.assert_close(out, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(integrate(GHVB(1, beta), model, x, g), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.0])
def test_weights_of_the_papers_table(beta):
    assert ghvb_weights(1, beta) == pytest.approx([1])
    assert ghvb_weights(2, beta) == pytest.approx([(2 + beta) / (2 * beta), -(2 - beta) / (2 * beta)])
    for r in (3, 4):
        assert sum(ghvb_weights(r, beta)) == pytest.approx(1)


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
def test_order(schedule):
    """Momentum costs heavy ball an order and GHVB none."""
    two = DPMSolverPP(order=2, lower_order_final=False)
    assert order(HeavyBall(two, 1.0), 160, schedule) == pytest.approx(2, abs=0.1)
    assert order(HeavyBall(two, 0.8), 160, schedule) == pytest.approx(1, abs=0.1)
    for r, expected in ((1, 1), (2, 2), (4, 2)):
        assert order(GHVB(r, 0.8), 160, schedule) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GHVB(5), "order=5 does not exist; possible: 1, 2, 3, 4"),
        (lambda: GHVB(2, 0.0), "beta=0.0 is impossible"),
        (lambda: HeavyBall(DPMSolverPP(), 1.2), "beta=1.2 is impossible"),
        (lambda: HeavyBall(DDIM()), "base=DDIM is no deterministic multistep"),
        (lambda: HeavyBall(SDEDPMSolverPP()), "base=SDEDPMSolverPP is no deterministic multistep"),
        (lambda: HeavyBall(UniPC()), "base=UniPC has a corrector"),
        (lambda: HeavyBall(EVODiff()), "base=EVODiff is no deterministic multistep solver"),
        (lambda: HeavyBall(EVODiffPaper()), "base=EVODiffPaper has a corrector"),
    ],
)
def test_impossible_fields_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("wrap", [HeavyBall, Teleport, PredictorCorrector])
def test_what_a_method_is_made_of_is_warned_of_and_checked(wrap):
    """DPM-Solver-v3 without statistics is not that of its paper, and with those of other images it cannot run."""
    with_nothing = DPMSolverV3(use_corrector=False)
    assert "solver.statistics=null" in wrap(with_nothing).caveat
    small = Statistics(torch.tensor([-9.0, 9.0]).double(), *torch.zeros(3, 2, 1, 2, 2).double())
    with pytest.raises(ConfigError, match=r"statistics are of images \(1, 2, 2\), but the model's are \(1, 3, 3\)"):
        wrap(replace(with_nothing, statistics=small)).check(grid(5), (1, 3, 3))


def test_a_predictor_of_several_evaluations_has_the_budget_that_its_corrector_leaves():
    """Two steps of order 3 and one of 1 spend 7, and one Langevin step before each 3 more."""
    for nfe, orders in ((7, (3, 2)), (10, (3, 3, 1)), (13, (3, 3, 2, 1))):
        solver = PredictorCorrector(SciRESinglestep(order=3)).for_budget(nfe)
        assert solver.predictor.orders == orders and solver.evaluations(len(orders)) == nfe
