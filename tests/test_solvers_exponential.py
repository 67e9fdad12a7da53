"""Exponential integrators and the PNDM family: exactness on polynomials, and the identities between methods."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from evodiff.errors import ConfigError
from evodiff.grid import Karras, LogSNR, TimeGrid
from evodiff.models.analytic import GaussianMixture
from evodiff.sampling import integrate
from evodiff.schedule import EDM, CosineVP, DiscreteVP, LinearVP, Node
from evodiff.solvers import deis
from evodiff.solvers.base import Past
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.deis import DEIS
from evodiff.solvers.dpm import DPMSolver
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.exponential import DATA, NOISE, PREDICTIONS, h_phi, lagrange_integrals
from evodiff.solvers.ghvb import HeavyBall
from evodiff.solvers.heun import Heun
from evodiff.solvers.ipndm import ADAMS_BASHFORTH, IPNDM
from evodiff.solvers.pndm import PLMS, PNDM
from evodiff.solvers.sde_dpmpp import SDEDPMSolverPP
from evodiff.solvers.singlestep import DPMSolverSinglestep
from evodiff.solvers.unipc import UniC, UniPC

VP = LinearVP()
GRIDS = {
    "edm": TimeGrid.at(Karras().times(7, EDM(), 80.0, 0.002), EDM()),
    "vp": TimeGrid.at(LogSNR().times(7, VP, 1.0, 1e-3), VP),
}


def mixture(schedule):
    random = torch.Generator().manual_seed(0)
    means = 2 * torch.rand(3, 1, 2, 2, generator=random, dtype=torch.float64) - 1
    stds = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    return GaussianMixture(means, stds, torch.full_like(stds, 1 / 3), schedule)


def even(steps, schedule):
    return TimeGrid.at(LogSNR().times(steps, schedule, schedule.t_start, schedule.t_end), schedule)


def run(solver, grid):
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * grid.nodes[0].sigma
    return integrate(solver, mixture(grid.schedule), x, grid)


SAME = {
    "first orders": (
        DDIM(),
        DPMSolverPP(order=1),
        DPMSolver(order=1),
        DPMSolverSinglestep(order=1),
        DEIS(order=1),
        IPNDM(order=1),
        UniPC(order=1, corrector=False, prediction="noise"),
    ),
    "DEIS rhoAB is iPNDM-v": (DEIS(order=4, variant="rhoab"), IPNDM(order=4, variable_step=True)),
    "DPM-Solver-2 is the midpoint rule in log kappa": (
        DPMSolverSinglestep(order=2),
        Heun(alpha=0.5, clock="log_kappa"),
    ),
    "UniPC is UniC on UniP": (UniPC(order=3), UniC(order=3, base=UniPC(order=3, corrector=False))),
    "UniPC (noise) is UniC on UniP": (
        UniPC(order=2, variant="bh2", prediction="noise"),
        UniC(order=2, variant="bh2", base=UniPC(order=2, variant="bh2", corrector=False, prediction="noise")),
    ),
    "UniP-2 bh2 is DPM-Solver++ 2M": (UniPC(order=2, variant="bh2", corrector=False), DPMSolverPP(order=2)),
    "UniP-2 bh2 (noise) is DPM-Solver 2M": (
        UniPC(order=2, variant="bh2", corrector=False, prediction="noise"),
        DPMSolver(order=2),
    ),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", SAME)
def test_methods_that_are_the_same(case, grid):
    results = [run(solver, GRIDS[grid]) for solver in SAME[case]]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-10)


def polynomial_step(solver, degree, prediction):
    """The error of one step of `solver` with a full history, where the model term is lam^degree whatever x is."""
    grid = TimeGrid.at(LogSNR().times(9, VP, 1.0, 1e-3), VP)
    grid = TimeGrid(tuple(grid.nodes[i] for i in (0, 2, 3, 5, 6, 9)), VP)  # steps of different length
    step = list(grid.steps())[3]

    def m(lam):
        return torch.full((1, 1, 1, 1), lam**degree, dtype=torch.float64)

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    past = tuple(Past(node, x, m(node.lam)) for node in grid.nodes[: step.i + 1])
    out = solver.predict(step, past[-solver.memory :])
    lam, w = np.polynomial.legendre.leggauss(40)
    a, b = step.s.lam, step.t.lam
    lam, w = 0.5 * (a + b) + 0.5 * (b - a) * lam, 0.5 * (b - a) * w
    s, t = step.s, step.t
    if prediction == "data":  # x_t / sigma_t - x_s / sigma_s = int e^lam D dlam
        exact = t.sigma * (x / s.sigma + float(w @ (np.exp(lam) * lam**degree)))
    else:  # x_t / alpha_t - x_s / alpha_s = -int e^-lam eps dlam
        exact = t.alpha * (x / s.alpha - float(w @ (np.exp(-lam) * lam**degree)))
    return (out - exact).abs().item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vary_coeff_integrates_polynomials_exactly(prediction):
    """Order p is exact where the model term is a polynomial of degree p - 1 in half-log-SNR, and no further."""
    for p in (1, 2, 3, 4):
        solver = UniPC(order=p, variant="vary_coeff", prediction=prediction, lower_order_final=False)
        for degree in range(p):
            assert polynomial_step(solver, degree, prediction) < 1e-11
        assert polynomial_step(solver, p, prediction) > 1e-4


def test_the_exception_for_one_difference_is_not_exact():
    """bh1 and bh2 give a single difference the weight B(h)/2: second order, not exact on lines."""
    for variant in ("bh1", "bh2"):
        assert polynomial_step(UniPC(order=2, variant=variant, lower_order_final=False), 1, "data") > 1e-3
        assert polynomial_step(UniPC(order=3, variant=variant, lower_order_final=False), 2, "data") < 1e-11


@pytest.mark.parametrize("solver", [DPMSolverPP(3, lower_order_final=False), DPMSolver(3, lower_order_final=False)])
def test_dpm_solvers_third_order_as_released_leaves_half_of_the_second_derivative_out(solver):
    """So its steps are of second order; with the whole of it they are exact on parabolas, like UniP-3."""
    prediction = solver.target.name
    step = polynomial_step(solver, 1, prediction)
    assert step < 1e-11
    assert polynomial_step(solver, 2, prediction) > 1e-3


def test_a_correct_third_order_converges_faster():
    """On a Gaussian's flow 3M as released falls by 2^2 when the steps double, UniP-3 by 2^3 or more."""

    def ratio(solver):
        errors = []
        for steps in (100, 200):
            grid = TimeGrid.at(LogSNR().times(steps, EDM(), 80.0, 0.002), EDM())
            one = torch.ones(1, dtype=torch.float64)
            model = GaussianMixture(torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0.5 * one, one, EDM())
            out = integrate(solver, model, 80.0 * torch.ones(1, 1, 1, 1, dtype=torch.float64), grid)
            exact = 80.0 * math.sqrt((0.25 + 0.002**2) / (0.25 + 80.0**2))
            errors.append(abs(out.item() - exact))
        return errors[0] / errors[1]

    assert ratio(DPMSolverPP(order=3, lower_order_final=False)) < 5
    assert ratio(UniPC(order=3, corrector=False, lower_order_final=False)) > 7


@pytest.mark.parametrize("points", [(2.0, 3.0, 5.0), (0.1, 0.2, 0.4, 0.9)])
def test_lagrange_integrals_are_exact_on_polynomials(points):
    """sum_j C_j p(point_j) = int_a^b p for every p of degree len(points) - 1."""
    C = lagrange_integrals(points, points[0], 0.05)
    for k in range(len(points)):
        expected = (0.05 ** (k + 1) - points[0] ** (k + 1)) / (k + 1)
        assert sum(c * p**k for c, p in zip(C, points, strict=True)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", ADAMS_BASHFORTH)
def test_equal_steps_give_the_weights_of_adams_bashforth(order):
    C = lagrange_integrals([7.0 + k for k in range(order)], 7.0, 6.0)
    assert [-c for c in C] == pytest.approx(list(ADAMS_BASHFORTH[order]), rel=1e-12)


def test_deis_tab_integrals_are_exact():
    """Against the same integral with 50 times the panels; and the released sum of n points nears it like 1/n."""
    for schedule, kappas, kappa_t in ((EDM(), (0.4, 5.6, 80.0), 0.03), (VP, (0.02, 1.3, 20.0), 0.008)):
        exact = np.array(deis.coefficients(schedule, "tab", None, kappas, kappa_t))
        vp = deis.linear_vp_like(schedule) if schedule == EDM() else schedule

        def clock(kappa, vp=vp):
            return vp.t_at(-math.log(kappa))

        fine = lagrange_integrals([clock(k) for k in kappas], kappas[0], kappa_t, clock, 50 * deis.PANELS)
        np.testing.assert_allclose(exact, fine, rtol=1e-11)
        errors = [
            np.abs(np.array(deis.coefficients(schedule, "tab", n, kappas, kappa_t)) - exact) for n in (5000, 50000)
        ]
        np.testing.assert_allclose(errors[0] / errors[1], 10, rtol=0.05)


def test_deis_tab_on_a_discrete_schedule():
    """Its t(kappa) has a kink at each of 1000 times: the panels still give the integrals to 1e-6."""
    schedule = DiscreteVP.linear()
    kappas, kappa_t = (0.4, 5.6, 80.0), 0.03

    def clock(kappa):
        return schedule.t_at(-math.log(kappa))

    C = deis.coefficients(schedule, "tab", None, kappas, kappa_t)
    fine = lagrange_integrals([clock(k) for k in kappas], kappas[0], kappa_t, clock, 5000)
    np.testing.assert_allclose(C, fine, rtol=1e-6)


def test_deis_on_a_schedule_that_cannot_be_hashed():
    """Somebody's own dataclass that is not frozen."""

    @dataclass
    class Own:
        of: LinearVP

        def __getattr__(self, name):
            return getattr(self.of, name)

    out = run(DEIS(), TimeGrid(GRIDS["vp"].nodes, Own(VP)))
    assert torch.equal(out, run(DEIS(), GRIDS["vp"]))


def test_deis_clock_on_edm_spans_its_range():
    vp = deis.linear_vp_like(EDM())
    assert vp.node(1.0).kappa == pytest.approx(80.0)
    assert vp.node(1e-3).kappa == pytest.approx(0.002)


def test_ipndm_and_ipndm_v_agree_on_equal_steps():
    grid = TimeGrid.at([8.0 - k for k in range(8)], EDM())
    for order in (2, 3, 4):
        constant, variable = (run(IPNDM(order=order, variable_step=v), grid) for v in (False, True))
        torch.testing.assert_close(constant, variable, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(IPNDM(order=3), GRIDS["edm"]), run(IPNDM(order=3, variable_step=True), GRIDS["edm"]))


def test_pndm_is_exact_where_the_noise_is_constant():
    """All Runge-Kutta and Adams-Bashforth weights add up to 1: eps constant is a straight line in kappa."""
    eps = 0.3

    def denoise(x, node):
        return (x - node.sigma * eps) / node.alpha

    for grid in GRIDS.values():
        s, t = grid.nodes[0], grid.nodes[-1]
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        expected = t.alpha * (1 / s.alpha + (t.kappa - s.kappa) * eps)
        for solver in (PNDM(order=4), PNDM(order=2), PLMS(), IPNDM(order=4), Heun(alpha=0.7)):
            out = integrate(solver, denoise, x, grid)
            assert out.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_pndm_spends_what_its_warm_up_costs():
    assert [PNDM(order=4).evaluations(n) for n in (1, 2, 3, 4, 10)] == [4, 8, 12, 13, 19]
    assert [PNDM(order=2).evaluations(n) for n in (1, 2, 10)] == [2, 3, 11]
    assert [PLMS().evaluations(n) for n in (1, 2, 10)] == [2, 3, 11]


@pytest.mark.parametrize("h", [-6.0, -0.3, 1e-6, 0.4, 5.0])
def test_prediction_conventions(h):
    """h_phi's recursion, and data and noise prediction as one update: x of both agree to first order."""
    assert h_phi(2, h) == pytest.approx(math.expm1(h) / h - 1, rel=1e-9, abs=1e-10)
    s, t = VP.node(0.6), VP.node(0.5)
    x, D = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (0.7, 0.2))
    steps = [p.first_order(x, p.of(D, x, s), s, t) for p in (DATA, NOISE)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DEIS(order=5), "order=5.*1, 2, 3, 4"),
        (lambda: DEIS(variant="lab"), "variant='lab'.*tab, rhoab"),
        (lambda: DEIS(variant="rhoab", quadrature=100), "quadrature=100"),
        (lambda: IPNDM(order=5), "order=5.*1, 2, 3, 4"),
        (lambda: PNDM(order=3), "order=3.*2 .S-PNDM., 4"),
        (lambda: DPMSolver(order=4), "order=4.*1, 2, 3"),
        (lambda: UniPC(prediction="v"), "prediction='v'.*data, noise"),
        (lambda: UniPC(variant="bh3"), "variant='bh3'.*bh1, bh2, vary_coeff"),
        (lambda: UniC(base=UniPC()), "base=UniPC has its own corrector"),
        (lambda: UniC(base=DDIM()), "base=DDIM is no deterministic multistep"),
        (lambda: UniC(base=SDEDPMSolverPP()), "base=SDEDPMSolverPP is no deterministic"),
        (lambda: Heun(clock="t"), "clock='t'.*kappa, log_kappa"),
    ],
)
def test_impossible_fields_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_released_quadrature_is_refused_where_it_has_no_formula():
    grid = TimeGrid.at([1.0, 0.5, 0.1], DiscreteVP.linear())
    with pytest.raises(ConfigError, match="quadrature=100 .*DiscreteVP"):
        run(DEIS(order=2, quadrature=100), grid)


@pytest.mark.parametrize(
    "solver", [DEIS(quadrature=100), UniC(base=DEIS(quadrature=100)), HeavyBall(DEIS(quadrature=100))]
)
def test_a_quadrature_that_cannot_be_replayed_is_refused_before_any_evaluation(solver):
    solver.check(even(4, VP), (1, 2, 2))
    with pytest.raises(ConfigError, match="quadrature=100 replays EDM and linear VP only, not CosineVP"):
        solver.check(even(4, CosineVP()), (1, 2, 2))


def test_deis_fits_in_the_linear_vp_schedule_of_the_same_kappas():
    """Whatever the clock of a schedule without alpha is."""

    @dataclass(frozen=True)
    class VarianceExploding:
        """sigma = 0.01 5000^t of score_sde."""

        t_start: float = 1.0
        t_end: float = 1e-3

        def node(self, t):
            return Node(t, 1.0, 0.01 * 5000**t)

        def t_at(self, lam):
            return math.log(math.exp(-lam) / 0.01) / math.log(5000)

    ve = VarianceExploding()
    edm = EDM(ve.node(1.0).sigma, ve.node(1e-3).sigma)
    a, b = (run(DEIS(), even(6, schedule)) for schedule in (ve, edm))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
