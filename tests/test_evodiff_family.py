"""EVODiff's ablations and the paper's own formulas."""

import pytest
import torch
from exact import SHORT_EDM, VP, grid, mixture, order, start

from evodiff.errors import ConfigError
from evodiff.grid import TimeGrid
from evodiff.sampling import integrate
from evodiff.schedule import EDM
from evodiff.solvers.base import Past
from evodiff.solvers.evodiff import EVODiff
from evodiff.solvers.evodiff_paper import EVODiffPaper, ratio
from evodiff.solvers.exponential import ddim


def run(solver, steps=8):
    return integrate(solver, mixture(), start(shape=(2, 3, 3)), grid(steps))


def test_each_ablation_is_another_method():
    released = run(EVODiff())
    for change in ({"zeta": 1.0}, {"eta": 0.0}, {"balance": False}, {"final": "euler"}, {"mu": 0.3}):
        assert (run(EVODiff(**change)) - released).norm() > 1e-4 * released.norm(), change


def test_with_every_ablation_the_released_rule_is_of_second_order():
    """zeta = 1, eta = 0 and plain differences leave a classical corrector: what costs the order is the weights."""
    plain = EVODiff(final="euler", zeta=1.0, eta=0.0, balance=False)
    for schedule in (SHORT_EDM, VP):
        assert order(plain, 160, schedule) == pytest.approx(2, abs=0.25)
        assert order(EVODiff(final="euler"), 160, schedule) == pytest.approx(1, abs=0.1)


def gain(steps, **fields):
    """What becomes of a network's answer that is 1 everywhere."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return integrate(EVODiff(**fields), lambda x, node: torch.ones_like(x), zero, grid(steps, EDM())).item()


def test_the_released_end_amplifies_and_jumps_where_the_last_step_no_longer_halves_kappa():
    """q = kappa_t / kappa_s is 0.493 at 15 steps and 0.516 at 16."""
    assert gain(15) == pytest.approx(1.086, abs=1e-3)
    assert gain(16) == pytest.approx(1.012, abs=1e-3)
    assert gain(15, final="euler") == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
def test_the_papers_zeta_costs_an_order(schedule):
    assert order(EVODiffPaper(lower_order_final=False), 160, schedule) == pytest.approx(1, abs=0.1)
    for eta in (None, 0.3):
        solver = EVODiffPaper(lower_order_final=False, zeta=1, eta=eta)
        assert solver.global_order == 2
        assert order(solver, 640, schedule) == pytest.approx(2, abs=0.2)


def test_the_papers_correction_line_by_line():
    g, model = grid(6), mixture()
    x = start(shape=(2, 3, 3))
    step = list(g.steps())[2]
    s, t, before = step.s, step.t, step.previous.s
    D = [model(x * k, node) for k, node in ((1.3, before), (0.8, s), (0.5, t))]
    past = (Past(before, 1.3 * x, D[0]), Past(s, 0.8 * x, D[1]))
    out = EVODiffPaper().correct(0.5 * x, D[2], step, past)

    h = 1 / t.kappa - 1 / s.kappa
    h_before = h * (s.lam - before.lam) / (t.lam - s.lam)
    for k in range(len(x)):
        B_l, B_u = (D[1] - D[0])[k] / h_before, (D[2] - D[1])[k] / h
        tilde = B_u - B_l
        eta = torch.sigmoid((tilde * B_l).sum().abs() / (tilde * tilde).sum())
        B = (1 - eta) * B_l + eta * B_u
        D_i, P = 0.5 * h * B, t.sigma * h * (D[1] - D[2])[k]
        zeta_star = -(D_i * P).sum() / (t.sigma * h * (D_i * D_i).sum())
        zeta = torch.sigmoid(-(zeta_star.abs() - 0.5))
        expected = ddim(0.8 * x[k], D[1][k], s, t) + t.sigma * 0.5 * h**2 * zeta * B
        torch.testing.assert_close(out[k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [4, 5, 8])
def test_vp_and_edm_agree_also_where_zeta_is_limited(steps):
    """On ten far components alpha is small where the released limit acts, so that a limit in the units of x would act
    elsewhere."""
    on_vp = grid(steps, VP)
    on_edm = TimeGrid.at([node.kappa for node in on_vp.nodes], EDM(t_start=1e4))
    x = start(VP, shape=(3, 8, 8))
    a, b = (mixture(schedule, (3, 8, 8), components=10) for schedule in (VP, EDM(t_start=1e4)))
    on_vp_end = integrate(EVODiff(), a, x, on_vp) / on_vp.nodes[-1].alpha
    on_edm_end = integrate(EVODiff(), b, x / on_vp.nodes[0].alpha, on_edm)
    torch.testing.assert_close(on_vp_end, on_edm_end, rtol=1e-9, atol=1e-9)


def test_ratio_of_nothing_is_nothing():
    zero = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    assert ratio(zero, zero).abs().max() == 0


@pytest.mark.parametrize(
    ("solver", "fields", "message"),
    [
        (EVODiff, {"zeta": 0.0}, "zeta=0.0 is impossible"),
        (EVODiff, {"eta": 1.5}, "eta=1.5 is impossible; possible: 0 to 1"),
        (EVODiff, {"final": "x"}, "final='x' does not exist; possible: released, euler"),
        (EVODiffPaper, {"zeta": 2.0}, "zeta=2.0 is impossible; possible: 0 to 1"),
        (EVODiffPaper, {"order": 3}, "order=3 does not exist; possible: 2"),
    ],
)
def test_impossible_fields_are_refused(solver, fields, message):
    with pytest.raises(ConfigError, match=message):
        solver(**fields)
