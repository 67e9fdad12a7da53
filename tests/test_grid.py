"""Time grids: their spacing, their budget, and grid files."""

import json
import math
import re

import numpy as np
import pytest

from evodiff.errors import BudgetError, ConfigError
from evodiff.grid import NSR, FromFile, Karras, Listed, LogSNR, Optimised, TimeGrid, TimeUniform, grid_for
from evodiff.grid import ends as ends_of
from evodiff.schedule import EDM, CosineVP, DiscreteVP, Flow, LinearVP
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.heun import Heun
from evodiff.solvers.probability_flow import ProbabilityFlow
from evodiff.solvers.singlestep import DPMSolverPPSinglestep

SPACINGS = [LogSNR(), Karras(), TimeUniform(), TimeUniform(2.0)]


@pytest.mark.parametrize("schedule", [EDM(), LinearVP()])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_runs_from_start_to_end(spacing, schedule):
    grid = grid_for(7, DDIM(), spacing, schedule)
    assert len(grid) == 7
    assert (grid.nodes[0].t, grid.nodes[-1].t) == (schedule.t_start, schedule.t_end)
    assert all(step.h > 0 for step in grid.steps())


def test_logsnr_steps_are_equal_in_lam():
    grid = grid_for(9, DDIM(), LogSNR(), LinearVP())
    np.testing.assert_allclose([step.h for step in grid.steps()], grid.steps().__next__().h, rtol=1e-9)


def test_karras_is_equation_5_of_edm():
    n, rho, s_max, s_min = 18, 7, 80.0, 0.002
    i = np.arange(n)
    expected = (s_max ** (1 / rho) + i / (n - 1) * (s_min ** (1 / rho) - s_max ** (1 / rho))) ** rho
    grid = grid_for(n - 1, DDIM(), Karras(), EDM())
    np.testing.assert_allclose([node.sigma for node in grid.nodes], expected, rtol=1e-12)


def test_karras_on_vp_visits_the_same_kappas():
    vp = LinearVP()
    kappas = [node.kappa for node in grid_for(6, DDIM(), Karras(), vp).nodes]
    edm = EDM(vp.node(vp.t_start).kappa, vp.node(vp.t_end).kappa)
    np.testing.assert_allclose(kappas, [n.sigma for n in grid_for(6, DDIM(), Karras(), edm).nodes], rtol=1e-9)


def test_time_spacings():
    vp = LinearVP(t_start=1.0, t_end=0.01)
    uniform, quadratic = ([n.t for n in grid_for(3, DDIM(), TimeUniform(power), vp).nodes] for power in (1.0, 2.0))
    np.testing.assert_allclose(uniform, [1, 0.67, 0.34, 0.01])
    np.testing.assert_allclose(quadratic, [1, 0.49, 0.16, 0.01])


def test_inner_node_lies_where_asked_in_lam():
    step = next(grid_for(5, DDIM(), LogSNR(), LinearVP()).steps())
    assert step.at(0.3).lam == pytest.approx(step.s.lam + 0.3 * step.h)


@pytest.mark.parametrize(
    ("nfe", "denoise_final", "near"), [(10, True, "9 or 11"), (9, False, "8 or 10"), (1, False, "2")]
)
def test_an_impossible_budget_names_the_nearest(nfe, denoise_final, near):
    with pytest.raises(BudgetError, match=rf"nfe={nfe} .*Nearest: nfe={near}\."):
        grid_for(nfe, Heun(), LogSNR(), EDM(), denoise_final=denoise_final)


def test_no_budget_is_for_adaptive_solvers():
    with pytest.raises(BudgetError, match="needs a budget"):
        grid_for(None, DDIM(), LogSNR(), EDM())
    with pytest.raises(BudgetError, match="gives 3 times, but 1 steps need 2. Give the first and the last only"):
        grid_for(None, ProbabilityFlow(), Listed((80.0, 1.0, 0.002)), EDM())


@pytest.mark.parametrize("ends", [(1e300, None), (None, 1e-300)])
def test_ends_whose_squares_are_no_numbers_are_refused(ends):
    with pytest.raises(ConfigError, match="must be above .* and t_start below 1e"):
        ends_of(EDM(), *ends)


def test_a_variance_preserving_schedule_ends_at_1_and_noise_levels_have_no_last():
    for schedule in (LinearVP(), CosineVP(), DiscreteVP.linear()):
        with pytest.raises(ConfigError, match=rf"t_start=1.2 is above 1, the last time of a {type(schedule).__name__}"):
            grid_for(5, DDIM(), LogSNR(), schedule, t_start=1.2)
    assert grid_for(5, DDIM(), LogSNR(), EDM(), t_start=160.0).nodes[0].sigma == 160


@pytest.mark.parametrize(("t_start", "t_end"), [(1.0, 1.0), (0.1, 1.0), (1.0, 0.0), (1.0, -1.0), (math.inf, 1.0)])
def test_an_empty_range_is_refused(t_start, t_end):
    with pytest.raises(ConfigError, match="must be above"):
        grid_for(5, DDIM(), LogSNR(), EDM(), t_start=t_start, t_end=t_end)


@pytest.mark.parametrize("ends", [{"t_start": 5.0}, {"t_end": 1.0}, {"t_start": 5.0, "t_end": 1.0}])
def test_listed_times_have_their_own_ends(ends):
    published = Optimised((80.0, 10.0, 1.0, 0.002))
    assert [node.t for node in grid_for(3, DDIM(), published, EDM()).nodes] == pytest.approx([80, 10, 1, 0.002])
    for spacing in (published, Listed((80.0, 10.0, 0.5, 0.1))):
        with pytest.raises(ConfigError, match="cannot be kept. Leave them out"):
            grid_for(3, DDIM(), spacing, EDM(), **ends)
    own = grid_for(3, DDIM(), Listed((70.0, 10.0, 0.5, 0.1)), EDM(), t_start=70.0, t_end=0.1)
    assert [node.t for node in own.nodes] == [70, 10, 0.5, 0.1]


@pytest.mark.parametrize(
    ("spacing", "value"),
    [
        *((spacing, value) for spacing in (Karras, TimeUniform) for value in (0.0, 0.001, 0.004)),
        *(
            (spacing, value)
            for spacing in (Karras, TimeUniform, NSR)
            for value in (-7.0, 1e20, math.inf, math.nan, "a")
        ),
    ],
)
def test_spacings_refuse_what_leaves_no_numbers(spacing, value):
    """80^(1/0.004) overflows, and 80^1e-20 is 1."""
    with pytest.raises(ConfigError, match=f"={re.escape(str(value))} is impossible; possible: numbers from"):
        spacing(value)


@pytest.mark.parametrize("spacing", [Karras(0.1), Karras(1e6), TimeUniform(0.1), TimeUniform(1e6), NSR(0), NSR(1e6)])
@pytest.mark.parametrize("schedule", [EDM(), LinearVP(), Flow()])
def test_the_last_values_that_are_possible_make_grids(spacing, schedule):
    assert len(grid_for(100, DDIM(), spacing, schedule)) == 100


class Fixed:
    """A spacing that does not ask how many steps there are."""

    def times(self, n, schedule, t_start, t_end):
        return [80.0, 30.0, 10.0, 3.0, 1.0, 0.1, 0.002]


def test_a_spacing_gives_as_many_times_as_the_budget_needs():
    assert len(grid_for(6, DDIM(), Fixed(), EDM())) == 6
    for nfe in (5, 10):
        with pytest.raises(BudgetError, match=rf"Fixed gives 7 times, but {nfe} steps need {nfe + 1}"):
            grid_for(nfe, DDIM(), Fixed(), EDM())
    for fine in (None, LogSNR()):  # with `inner` the method asks for one step per evaluation
        with pytest.raises(BudgetError, match=f"Fixed gives 7 times, but {9 if fine else 3} steps need"):
            grid_for(9, DPMSolverPPSinglestep(order=3, inner=fine, lower_order_final=False), Fixed(), EDM())


def test_times_must_fall():
    with pytest.raises(ConfigError, match="fall strictly"):
        TimeGrid.at([1.0, 1.0, 0.5], EDM())


def test_a_grid_file_is_used_as_it_is(tmp_path):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"2": [80, 1, 0.002], "3": [80, 9, 1, 0.002]}))
    assert [n.t for n in grid_for(3, DDIM(), FromFile(str(path)), EDM()).nodes] == [80, 9, 1, 0.002]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[80, 1", "Expected JSON"),
        ('{"5": [80, 1]}', "has no grid of 2 steps; it has 5"),
        ("[80, 1]", "holds 1 steps, but 2 are asked for"),
        ("[80, 90, 1]", "must fall strictly"),
        ("[100, 90, 1]", "above the schedule's"),
        ('[80, "x", 1]', "list of numbers"),
    ],
)
def test_a_bad_grid_file_is_refused(tmp_path, content, message):
    path = tmp_path / "grid.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        grid_for(2, DDIM(), FromFile(str(path)), EDM())


def test_a_solver_whose_cost_does_not_grow_is_not_asked_for_ever():
    class Free(DDIM):
        def evaluations(self, steps):
            return 2

    with pytest.raises(BudgetError, match="Free costs 2 evaluations in 100,000 steps: nfe=4 is out of reach"):
        grid_for(4, Free(), LogSNR(), EDM())
