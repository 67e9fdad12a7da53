"""Singlestep DPM-Solvers: the released order schedules, the nodes inside a step, and the budgets."""

import math

import pytest
import torch

from evodiff.denoiser import Counting
from evodiff.errors import BudgetError, ConfigError
from evodiff.grid import Karras, LogSNR, TimeGrid, grid_for
from evodiff.models.analytic import GaussianMixture
from evodiff.sampling import integrate
from evodiff.schedule import EDM, LinearVP
from evodiff.solvers.singlestep import DPMSolverPPSinglestep, DPMSolverSinglestep, order_schedule

KINDS = (DPMSolverPPSinglestep, DPMSolverSinglestep)


def gaussian(schedule):
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64), 0.5 * one, one, schedule)


@pytest.mark.parametrize(
    ("order", "nfe", "orders"),
    [
        (1, 4, (1, 1, 1, 1)),
        (2, 10, (2, 2, 2, 2, 2)),
        (2, 5, (2, 2, 1)),
        (3, 1, (1,)),
        (3, 2, (2,)),
        (3, 3, (2, 1)),
        (3, 6, (3, 2, 1)),
        (3, 10, (3, 3, 3, 1)),
        (3, 15, (3, 3, 3, 3, 2, 1)),
        (3, 20, (3, 3, 3, 3, 3, 3, 2)),
    ],
)
def test_released_order_schedules(order, nfe, orders):
    assert order_schedule(order, nfe) == orders


@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_budget_can_be_spent(order):
    for nfe in range(1, 40):
        assert sum(order_schedule(order, nfe)) == nfe


def test_without_lower_order_final_only_multiples_can():
    solver = DPMSolverPPSinglestep(order=3, lower_order_final=False)
    assert len(grid_for(9, solver.for_budget(9), LogSNR(), EDM())) == 3
    with pytest.raises(BudgetError, match="Nearest: nfe=9 or 12"):
        grid_for(10, solver.for_budget(10), LogSNR(), EDM())


def test_with_the_grids_spacing_inside_the_steps_evaluations_are_where_the_spacing_puts_them():
    """Order 3 steps of a budget of 7 on Karras' spacing: nodes 0, 3, 6, 7 of 7 steps."""
    solver = DPMSolverSinglestep(order=3, inner=Karras()).for_budget(7)
    grid = grid_for(7, solver, Karras(), EDM())
    fine = Karras().times(7, EDM(), 80.0, 0.002)
    assert [node.t for node in grid.nodes] == pytest.approx([fine[i] for i in (0, 3, 6, 7)])
    seen = []

    class Spy:
        schedule = EDM()

        def __call__(self, x, node):
            seen.append(node.t)
            return gaussian(EDM())(x, node)

    integrate(solver, Spy(), torch.ones(1, 1, 1, 1, dtype=torch.float64), grid)
    assert seen == pytest.approx(fine[:7])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [None, Karras()])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(kind, order, inner):
    """Steps of one order only, over a range without the extremes of kappa; 2^order when the steps double."""
    schedule = LinearVP()
    errors = []
    for steps in (32, 64):
        grid = TimeGrid.at(LogSNR().times(steps, schedule, 0.9, 0.05), schedule)
        s, t = grid.nodes[0], grid.nodes[-1]
        denoise = Counting(gaussian(schedule))
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        out = integrate(kind(order=order, inner=inner), denoise, x, grid)
        std = [math.sqrt(n.alpha**2 * 0.25 + n.sigma**2) for n in (s, t)]
        errors.append(abs(out.item() - (t.alpha * 0.3 + (1 - s.alpha * 0.3) * std[1] / std[0])))
        assert denoise.nfe == order * steps
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_the_smallest_budget_counts_the_final_evaluation():
    with pytest.raises(BudgetError, match="Nearest: nfe=2"):
        grid_for(1, DPMSolverPPSinglestep(order=3).for_budget(0), LogSNR(), EDM(), denoise_final=True)


def test_orders_that_are_given_are_kept():
    """For 9 evaluations for_budget alone would choose 3, 3, 2, 1."""
    solver = DPMSolverPPSinglestep(order=3, orders=(1, 2)).for_budget(9)
    grid = grid_for(9, solver, LogSNR(), EDM())
    assert [solver.order_of(step.i) for step in grid.steps()] == [1, 2, 3, 3]
    with pytest.raises(BudgetError, match="Nearest: nfe=6 or 9"):
        grid_for(8, DPMSolverPPSinglestep(order=3, orders=(1, 2)).for_budget(8), LogSNR(), EDM())


@pytest.mark.parametrize("orders", [(4,), (2, 0), (3,)])
def test_orders_that_do_not_exist_are_refused(orders):
    with pytest.raises(ConfigError, match="possible: each from 1 to order=2"):
        DPMSolverPPSinglestep(order=2, orders=orders)


def test_more_orders_than_steps_are_refused_before_any_evaluation():
    """They would change nothing but the name of the run."""
    solver = DPMSolverPPSinglestep(order=2, orders=(2, 2, 1))
    solver.check(grid_for(5, solver, LogSNR(), EDM()), (1, 2, 2))
    with pytest.raises(ConfigError, match=r"orders=\(2, 2, 1\) has too many; possible: at most 2, one for each step"):
        solver.check(grid_for(4, solver, LogSNR(), EDM()), (1, 2, 2))
