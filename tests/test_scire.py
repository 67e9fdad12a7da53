"""SciRE-Solver: the recursive difference, its orders, the budget and the NSR grid."""

import math

import pytest
import torch
from exact import SHORT_EDM, VP, exact_flow, gaussian, grid, mixture, order, start

from evodiff.denoiser import Counting
from evodiff.errors import ConfigError
from evodiff.grid import NSR, LogSNR, grid_for
from evodiff.sampling import integrate
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.ipndm import IPNDM
from evodiff.solvers.scire import SciREMultistep, SciRESinglestep, phi_1


def test_phi_1():
    assert [phi_1(m) for m in (1, 2, 3)] == pytest.approx([1, 1 / 2, 2 / 3])
    assert phi_1(20) == pytest.approx(1 - 1 / math.e)


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
@pytest.mark.parametrize("solver", [SciRESinglestep, SciREMultistep])
@pytest.mark.parametrize("k", [2, 3])
def test_order(solver, k, schedule):
    """m > 1 weights the slope 1/phi_1 times too much: first order. Finite differences, m = 1, are of second or more."""
    assert order(solver(order=k, **winding_off(solver)), 640, schedule) == pytest.approx(1, abs=0.15)
    assert order(solver(order=k, m=1, **winding_off(solver)), 320, schedule) > 1.9


def winding_off(solver):
    return {"lower_order_final": False} if solver is SciREMultistep else {}


def test_multistep_2_with_finite_differences_is_adams_bashforth_2():
    g, x = grid(7), start(shape=(2, 3, 3))
    a = integrate(SciREMultistep(order=2, m=1, lower_order_final=False), mixture(), x, g)
    b = integrate(IPNDM(order=2, variable_step=True), mixture(), x, g)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_singlestep_2_is_the_formula():
    g, x, model = grid(1), start(shape=(2, 3, 3)), mixture()
    a = integrate(SciRESinglestep(order=2, m=3), model, x, g)
    s, t = g.nodes
    h = t.kappa - s.kappa
    middle = SHORT_EDM.node(s.kappa + h / 2)
    eps = (x - model(x, s)) / s.kappa
    x_m = x + h / 2 * eps
    eps_m = (x_m - model(x_m, middle)) / middle.kappa
    torch.testing.assert_close(a, x + h * eps + h / (2 * (2 / 3) * 0.5) * (eps_m - eps), rtol=1e-10, atol=1e-10)


def test_first_order_steps_are_ddim():
    g, x = grid(5), start(shape=(2, 3, 3))
    a = integrate(SciRESinglestep(order=3, orders=(1,) * 5), mixture(), x, g)
    torch.testing.assert_close(a, integrate(DDIM(), mixture(), x, g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("nfe", [3, 4, 5, 9, 10])
def test_every_budget_is_spent(k, nfe):
    solver = SciRESinglestep(order=k).for_budget(nfe)
    g = grid_for(nfe, solver, LogSNR(), SHORT_EDM)
    counting = Counting(gaussian())
    out = integrate(solver, counting, start(), g)
    assert counting.nfe == nfe
    assert (out - exact_flow(start(), g.nodes[0], g.nodes[-1])).norm() < 3


def test_steps_span_as_many_intervals_as_their_order():
    solver = SciRESinglestep(order=3).for_budget(6)
    assert solver.orders == (3, 2, 1)
    fine = LogSNR().times(6, SHORT_EDM, 10.0, 0.05)
    assert solver.times(LogSNR(), 3, SHORT_EDM, 10.0, 0.05) == [fine[0], fine[3], fine[5], fine[6]]


def test_nsr_grid():
    k, kappa_0 = 3.1, VP.node(VP.t_end).kappa
    times = NSR(k).times(5, VP, VP.t_start, VP.t_end)
    logs = [math.log(VP.node(t).kappa + k * kappa_0) for t in times]
    steps = [b - a for a, b in zip(logs, logs[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 5)
    assert (times[0], times[-1]) == (VP.t_start, VP.t_end)
    assert NSR(0).times(5, VP, 1.0, 1e-3) == pytest.approx(LogSNR().times(5, VP, 1.0, 1e-3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SciRESinglestep(order=4), "order=4 does not exist; possible: 2, 3"),
        (lambda: SciRESinglestep(m=0), "m=0 does not exist"),
        (lambda: SciREMultistep(m=-1), "m=-1 does not exist"),
        (lambda: SciRESinglestep(order=2, orders=(3,)), "each must be from 1 to order=2"),
        (lambda: NSR(-1), "k=-1 is impossible"),
    ],
)
def test_impossible_fields_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
