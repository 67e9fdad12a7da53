"""SciRE-Solver: the recursive difference, its orders, the budget and the NSR grid."""

import math

import pytest
import torch
from exact import SHORT_EDM, VP, exact_flow, gaussian, grid, mixture, order, start

from evodiff.denoiser import Counting
from evodiff.errors import ConfigError
from evodiff.grid import NSR, LogSNR, Step, grid_for
from evodiff.sampling import integrate
from evodiff.solvers.base import Past
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


@pytest.mark.parametrize("m", [1, 3])
def test_singlestep_3_is_the_formula(m):
    g, x, model, phi = grid(1), start(shape=(2, 3, 3)), mixture(), phi_1(m)
    s, t = g.nodes
    h = t.kappa - s.kappa

    def eps(x, kappa):
        return (x - model(x, SHORT_EDM.node(kappa))) / kappa

    e_0 = eps(x, s.kappa)
    e_1 = eps(x + h / 3 * e_0, s.kappa + h / 3)
    e_2 = eps(x + 2 / 3 * h * e_0 + h / phi * (e_1 - e_0), s.kappa + 2 / 3 * h)
    expected = x + h * e_0 + h / (2 * phi * (2 / 3)) * (e_2 - e_0)
    out = integrate(SciRESinglestep(order=3, m=m), model, x, g)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m", [1, 3])
def test_multistep_3_is_the_released_formula(m):
    g, phi = grid(6), phi_1(m)
    step = Step(g, 3)
    k = [node.kappa for node in g.nodes[:5]]
    e = [torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    x = start(shape=(2, 3, 3))[:1]
    past = tuple(Past(g.nodes[i], x, e[i]) for i in (1, 2, 3))
    h = k[4] - k[3]
    r0, r1 = phi * (k[3] - k[2]) / h, phi / (1 + phi) * (k[2] - k[1]) / (k[3] - k[2])
    D1, D2 = e[3] - e[2], e[3] - 2 * e[2] + e[1]
    expected = x + h * e[3] + 0.5 / (r0 * phi) * h * D1 + h / 6 / (r0 * phi) / (r1 * phi) * D2
    out = SciREMultistep(order=3, m=m, lower_order_final=False).predict(step, past)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


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
        (lambda: SciRESinglestep(m=0), "m=0 is impossible"),
        (lambda: SciREMultistep(m=-1), "m=-1 is impossible"),
        (lambda: SciRESinglestep(order=2, orders=(3,)), "each from 1 to order=2"),
        (lambda: NSR(-1), "k=-1 is impossible"),
    ],
)
def test_impossible_fields_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
