"""DPM-Solver-v3: what its formulas must give where the answer is known. Recorded runs are in test_verify_solvers."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from exact import MEAN, SHORT_EDM, STD, VP, error, exact_flow, gaussian, grid, mixture, order, start

from evodiff.errors import ConfigError
from evodiff.sampling import integrate
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.dpm_solver_v3 import DPMSolverV3, Statistics, derivatives, history, integrals


def of_gaussian(nodes=400, shape=(1, 2, 2)):
    """Of D = (kappa^2 mu + c^2 y) / (kappa^2 + c^2): l is the noise's share, f = -mu l never varies: s = 0, b = f'."""
    lam = torch.linspace(-math.log(SHORT_EDM.t_start), -math.log(SHORT_EDM.t_end), nodes + 1, dtype=torch.float64)
    kappa2 = torch.exp(-2 * lam)
    l = kappa2 / (kappa2 + STD**2)  # noqa: E741
    dl = -2 * l * (1 - l)
    l, dl = (a[:, None, None, None].expand(-1, *shape).contiguous() for a in (l, dl))  # noqa: E741
    return Statistics(lam, l, torch.zeros_like(l), -MEAN * dl)


def constant(l, s, b, nodes=2000):  # noqa: E741
    lam = torch.linspace(-1, 1, nodes + 1, dtype=torch.float64)
    return Statistics(lam, *(torch.full((nodes + 1, 1, 1, 1), v).double() for v in (l, s, b)))


@pytest.mark.parametrize("use_corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_models_own_statistics_solve_a_gaussian_exactly(order, use_corrector):
    """Three steps, and only the quadrature of the statistics is left; plain DDIM errs a thousand times more."""
    solver = DPMSolverV3(order=order, statistics=of_gaussian(), use_corrector=use_corrector)
    assert error(solver, 3) < 1e-3 * error(DDIM(), 3)


def test_without_statistics_first_order_is_ddim():
    g, x, model = grid(5), start(shape=(2, 3, 3)), mixture()
    a = integrate(DPMSolverV3(order=1), model, x, g)
    torch.testing.assert_close(a, integrate(DDIM(), model, x, g), rtol=1e-12, atol=1e-12)


def test_statistics_of_ones_and_zeros_are_no_statistics():
    lam = of_gaussian(4000).lambdas
    shape = (len(lam), 1, 2, 2)
    plain = Statistics(lam, torch.ones(shape).double(), torch.zeros(shape).double(), torch.zeros(shape).double())
    g, x = grid(6), start()
    for kind in ({}, {"p_pseudo": True}, {"c_pseudo": True}):
        a = integrate(DPMSolverV3(statistics=plain, **kind), gaussian(), x, g)
        b = integrate(DPMSolverV3(**kind), gaussian(), x, g)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"order": 1, "use_corrector": False}, 1),
        ({"order": 1, "c_pseudo": True}, 2),
        ({"order": 2, "use_corrector": False}, 2),
        ({"order": 3, "p_pseudo": True, "use_corrector": False}, 2),
        ({"order": 3, "c_pseudo": True}, 2),
    ],
)
@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
def test_order(fields, expected, schedule):
    solver = DPMSolverV3(lower_order_final=False, **fields)
    assert solver.global_order == expected
    assert order(solver, 320, schedule) == pytest.approx(expected, abs=0.15)


def test_third_order_beats_second():
    third, second = (DPMSolverV3(order=k, use_corrector=False, lower_order_final=False) for k in (3, 2))
    assert error(third, 40) < 0.2 * error(second, 40)


def test_derivatives_of_polynomials_are_exact():
    lams = (0.3, -0.1, -0.7, -1.5)
    g = np.array([2 + 3 * v - v**2 + 0.5 * v**3 for v in lams])
    at = lams[0]
    expected = [g[0], 3 - 2 * at + 1.5 * at**2, -2 + 3 * at, 3.0]
    np.testing.assert_allclose(derivatives(lams, pseudo=False) @ g, expected, rtol=1e-11)


def test_pseudo_derivatives_are_divided_differences():
    a, b, c = lams = (0.3, -0.1, -0.7)
    g = np.array([1.0, 4.0, -2.0])
    first = (g[0] - g[1]) / (a - b)
    second = (first - (g[1] - g[2]) / (b - c)) / (a - c)
    np.testing.assert_allclose(derivatives(lams, pseudo=True) @ g, [g[0], first, 2 * second], rtol=1e-12)


def test_integrals_of_constant_statistics():
    """L = l h and S = s h: all integrals are elementary; backwards too."""
    l, s, b, h = 0.7, 0.2, -0.4, 0.9  # noqa: E741
    decay, C, (J_0, J_1) = integrals(constant(l, s, b), -0.5, -0.5 + h, 2)
    a = l + s
    assert decay.item() == pytest.approx(math.exp(-l * h))
    assert J_0.item() == pytest.approx(math.expm1(a * h) / a, rel=1e-6)
    assert J_1.item() == pytest.approx((math.exp(a * h) * (a * h - 1) + 1) / a**2, rel=1e-6)
    # B(u) = b (1 - e^{-su}) / s
    expected = b / s * (math.expm1(a * h) / a - math.expm1(l * h) / l)
    assert C.item() == pytest.approx(expected, rel=1e-6)
    gain, shift = history(constant(l, s, b), 0.5, 0.5 - h)
    assert gain.item() == pytest.approx(math.exp(s * h))
    assert shift.item() == pytest.approx(b * (1 - math.exp(s * h)) / s, rel=1e-6)


def test_coefficients_are_computed_once():
    g, solver = grid(6), DPMSolverV3(statistics=of_gaussian())
    x = integrate(solver, gaussian(), start(), g)
    computed = solver.weights.cache_info().misses
    again = integrate(solver, gaussian(), start(), g)
    assert solver.weights.cache_info().misses == computed > 0
    assert torch.equal(x, again)


def test_coefficients_of_many_steps_are_computed_once_too():
    g, solver = grid(300), DPMSolverV3(statistics=of_gaussian())
    for _ in range(2):
        integrate(solver, gaussian(), start(), g)
    assert solver.weights.cache_info().hits >= solver.weights.cache_info().misses


def test_integrals_end_where_they_are_asked_to():
    """In double precision, for the next step begins there."""
    low, high = math.log(1 / 7), math.log(5)
    lam, *_ = of_gaussian().along(low, high)
    assert (lam[0].item(), lam[-1].item()) == (low, high)


def test_statistics_go_with_their_solver():
    """They can be gigabytes, and every cell of a table has a solver of its own."""
    solver = DPMSolverV3(statistics=of_gaussian())
    integrate(solver, gaussian(), start(), grid(4))
    kept = weakref.ref(solver.statistics)
    del solver
    gc.collect()
    assert kept() is None


def test_between_the_nodes_statistics_are_linear():
    s = of_gaussian(4)
    middle = 0.25 * s.lambdas[1] + 0.75 * s.lambdas[2]
    torch.testing.assert_close(s.l_at(middle.item()), 0.25 * s.l[1] + 0.75 * s.l[2])


def test_statistics_of_other_images_are_refused_before_any_evaluation():
    solver = DPMSolverV3(statistics=of_gaussian(shape=(3, 8, 8)))
    with pytest.raises(ConfigError, match=r"images \(3, 8, 8\), but the model's are \(1, 2, 2\)"):
        integrate(solver, None, start(), grid(3))


def test_statistics_of_another_range_are_refused_before_any_evaluation():
    solver = DPMSolverV3(statistics=of_gaussian())
    with pytest.raises(ConfigError, match="statistics cover half-log-SNRs -2.303 to 2.996"):
        integrate(solver, None, start(VP), grid(3, VP))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambdas": torch.tensor([0.0, 2.0, 1.0]).double()}, "rising"),
        ({"s": torch.zeros(3, 1, 2, 3).double()}, "s has shape"),
        ({"b": torch.full((3, 1, 2, 2), math.nan).double()}, "b holds NaN"),
        ({"l": torch.zeros(2, 1, 2, 2).double()}, "l has shape"),
    ],
)
def test_impossible_statistics_are_refused(change, message):
    arrays = {k: torch.zeros(3, 1, 2, 2).double() for k in ("l", "s", "b")}
    arrays["lambdas"] = torch.tensor([0.0, 1.0, 2.0]).double()
    with pytest.raises(ConfigError, match=message):
        Statistics(**(arrays | change))


def test_orders_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="order=4 does not exist; possible: 1, 2, 3"):
        DPMSolverV3(order=4)


def test_exact_flow_is_what_small_steps_converge_to():
    g, x = grid(2000), start()
    out = integrate(DPMSolverV3(order=2), gaussian(), x, g)
    torch.testing.assert_close(out, exact_flow(x, g.nodes[0], g.nodes[-1]), rtol=1e-5, atol=1e-5)
