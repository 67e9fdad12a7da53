"""Stochastic samplers on Gaussian data, whose marginals are known: laws without sampling error, and by Monte Carlo."""

import math

import pytest
import torch

from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import LogSNR, TimeGrid, TimeUniform, grid_for
from evodiff.noise import SeededNoise
from evodiff.sampling import integrate
from evodiff.schedule import EDM, CosineVP, Flow, LinearVP
from evodiff.solvers.bdia import BDIA
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.ddpm import DDPM
from evodiff.solvers.dpm_solver_v3 import DPMSolverV3
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.heun import Heun
from evodiff.solvers.probability_flow import ProbabilityFlow
from evodiff.solvers.score_sde import EulerMaruyama, PredictorCorrector, ReverseDiffusion, drift
from evodiff.solvers.sde_dpmpp import SDEDPMSolverPP
from evodiff.solvers.teleport import Teleport
from evodiff.solvers.unipc import UniPC

SCHEDULES = {"edm": EDM(), "vp": LinearVP()}
SOLVERS = {
    "ddim eta 0.5": DDIM(eta=0.5),
    "ddim eta 1": DDIM(eta=1.0),
    "ddpm small": DDPM(variance="small"),
    "ddpm large": DDPM(variance="large"),
    "reverse diffusion": ReverseDiffusion(),
    "euler-maruyama": EulerMaruyama(),
    "sde-dpm-solver++ 1": SDEDPMSolverPP(order=1),
    "sde-dpm-solver++ 2": SDEDPMSolverPP(order=2, lower_order_final=False),
    "heun with churn": Heun(S_churn=20.0, S_min=0.01, S_max=10.0),
}
MEAN, STD = 0.7, 0.5


class Independent:
    """D for independent pixels of N(MEAN, STD^2)."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x, node):
        mean, variance = marginal(node)
        return MEAN + node.alpha * STD**2 / variance * (x - mean)


class Probe:
    """Noise for a batch that asks a linear sampler for its coefficients: draw j is 1 in row 2 + j and 0 elsewhere."""

    def __init__(self):
        self.drawn = 0

    def normal(self, like):
        z = torch.zeros_like(like)
        z[2 + self.drawn] = 1
        self.drawn += 1
        return z


def law(solver, schedule, steps):
    """Exact mean and variance at the end, from the exact marginal at the start; and what they should be.

    On Gaussian data every sampler here is affine, x_N = a x_0 + c + sum_j b_j z_j, and one batch shows a, b and c.
    """
    grid = TimeGrid.at(LogSNR().times(steps, schedule, schedule.t_start, schedule.t_end), schedule)
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    out = integrate(solver, Independent(schedule), x, grid, Probe()).flatten()
    c, a, b = out[0], out[1] - out[0], out[2:] - out[0]
    (mean_0, variance_0), (mean, variance) = (marginal(grid.nodes[i]) for i in (0, -1))
    return (a * mean_0 + c).item(), (a**2 * variance_0 + b.square().sum()).item(), mean, variance


def marginal(node):
    return node.alpha * MEAN, (node.alpha * STD) ** 2 + node.sigma**2


def order(solver, schedule):
    errors = []
    for steps in (200, 400):
        m, v, mean, variance = law(solver, schedule, steps)
        errors.append(math.hypot(m - mean, v - variance))
    return math.log2(errors[0] / errors[1]), errors[-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_law_converges_to_the_exact_marginal(name, schedule):
    """Mean and variance at the end of N steps, exactly: right, and with the weak order that the solver states."""
    solver = SOLVERS[name]
    p, error = order(solver, SCHEDULES[schedule])
    assert error < 0.02
    assert p == pytest.approx(solver.global_order, abs=0.25)


def test_the_law_test_can_fail():
    """DDPM with a variance between its two is still right; with the small one doubled it converges to another law."""

    class Wrong(DDPM):
        def step(self, denoise, x, step, noise):
            mean, _ = super().step(denoise, x, step, Zero())
            out, _ = super().step(denoise, x, step, noise)
            return mean + math.sqrt(2) * (out - mean), noise

    assert order(Wrong(), EDM())[1] > 0.1


class Zero:
    def normal(self, like):
        return torch.zeros_like(like)


class Shared:
    """One generator for all samples: as good as SeededNoise for statistics, and fast for many."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


class Correlated:
    """D for N(mean, cov) over two pixels."""

    mean = torch.tensor([0.7, -0.3], dtype=torch.float64)
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)

    def __init__(self, schedule):
        self.schedule = schedule

    def marginal(self, node):
        return node.alpha * self.mean, node.alpha**2 * self.cov + node.sigma**2 * torch.eye(2, dtype=torch.float64)

    def __call__(self, x, node):
        mean, cov = self.marginal(node)
        gain = node.alpha * self.cov @ torch.linalg.inv(cov)
        return (self.mean + (x.flatten(1) - mean) @ gain.T).view_as(x)


SAMPLES = 20_000


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_samples_have_the_exact_mean_and_covariance(name, schedule):
    """Within 5 standard errors of 20,000 samples, and 0.02 for the 200 steps (see the law above)."""
    schedule = SCHEDULES[schedule]
    model = Correlated(schedule)
    grid = TimeGrid.at(LogSNR().times(200, schedule, schedule.t_start, schedule.t_end), schedule)
    noise = Shared(0)
    mean, cov = model.marginal(grid.nodes[0])
    z = noise.normal(torch.empty(SAMPLES, 2, dtype=torch.float64))
    x = (mean + z @ torch.linalg.cholesky(cov).T).view(SAMPLES, 1, 1, 2)
    out = integrate(SOLVERS[name], model, x, grid, noise).flatten(1)
    mean, cov = model.marginal(grid.nodes[-1])
    variances = cov.diag()
    mean_error = (variances / SAMPLES).sqrt()
    cov_error = ((variances[:, None] * variances + cov**2) / SAMPLES).sqrt()
    assert ((out.mean(0) - mean).abs() < 5 * mean_error + 0.02).all()
    assert ((out.T.cov() - cov).abs() < 5 * cov_error + 0.02).all()


def run(solver, schedule=SCHEDULES["vp"], steps=12, seeds=(3, 4)):
    grid = TimeGrid.at(LogSNR().times(steps, schedule, schedule.t_start, schedule.t_end), schedule)
    noise = SeededNoise(seeds)
    x = noise.latents((1, 2, 2)).double() * grid.nodes[0].sigma
    return integrate(solver, Independent(schedule), x, grid, noise)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_with_eta_1_ddpm_and_sde_dpm_solver_1_are_the_same(schedule):
    ancestral = run(DDPM(variance="small"), schedule)
    torch.testing.assert_close(run(DDIM(eta=1.0), schedule), ancestral, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(run(SDEDPMSolverPP(order=1), schedule), ancestral, rtol=1e-11, atol=1e-11)


def test_ddim_with_eta_0_is_deterministic_and_is_the_limit():
    assert not DDIM().stochastic
    torch.testing.assert_close(run(DDIM()), run(DPMSolverPP(order=1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(DDIM(eta=1e-9)), run(DDIM()), rtol=1e-7, atol=1e-7)


def test_churn_outside_its_range_is_heun_and_draws_nothing():
    for outside in (Heun(S_churn=40, S_min=1e9), Heun(S_churn=40, S_max=1e-9)):
        assert torch.equal(run(outside), run(Heun()))
    assert not torch.equal(run(Heun(S_churn=40)), run(Heun()))


def test_churn_raises_the_noise_by_edms_factor():
    """gamma = min(S_churn / N, sqrt(2) - 1), N = 13 nodes; without S_noise the state only moves to the higher kappa."""
    schedule = EDM()
    grid = TimeGrid.at(LogSNR().times(12, schedule, 80.0, 0.002), schedule)
    step = next(iter(grid.steps()))
    assert Heun(S_churn=2.6).churn(step) == pytest.approx(0.2)
    assert Heun(S_churn=100).churn(step) == pytest.approx(math.sqrt(2) - 1)
    seen = []

    def denoise(x, node):
        seen.append(node.kappa)
        return torch.zeros_like(x)

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out, _ = Heun(S_churn=2.6, S_noise=0.0).step(denoise, x, step, Zero())
    assert seen == pytest.approx([96.0, step.t.kappa])
    assert out.item() == pytest.approx(step.t.kappa / 96.0)  # D = 0: x is pure noise, and scales with kappa


def test_reverse_diffusion_on_edm_is_the_ve_update():
    """Algorithm 2 of Score-SDE: x + (s^2 - t^2) score + sqrt(s^2 - t^2) z."""
    grid = TimeGrid.at([3.0, 2.0], EDM())
    step = next(iter(grid.steps()))
    x = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    score = (Independent(EDM())(x, step.s) - x) / 9
    for z in (0.0, 1.0):
        noise = Zero() if z == 0 else Probe1()
        out, _ = ReverseDiffusion().step(Independent(EDM()), x, step, noise)
        torch.testing.assert_close(out, x + 5 * score + math.sqrt(5) * z, rtol=1e-12, atol=0)


class Probe1:
    def normal(self, like):
        return torch.ones_like(like)


def test_reverse_diffusion_on_vp_is_the_vp_update():
    """Algorithm 3: (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z, with 1 - beta = (alpha_s / alpha_t)^2."""
    schedule = LinearVP()
    grid = TimeGrid.at([0.5, 0.49], schedule)
    step = next(iter(grid.steps()))
    x = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    score = (step.s.alpha * Independent(schedule)(x, step.s) - x) / step.s.sigma**2
    beta = 1 - (step.s.alpha / step.t.alpha) ** 2
    expected = (2 - math.sqrt(1 - beta)) * x + beta * score + math.sqrt(beta)
    out, _ = ReverseDiffusion().step(Independent(schedule), x, step, Probe1())
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
def test_drift_is_that_of_the_sde(t):
    """VP: f = -beta/2 and g^2 = beta with beta = 0.1 + 19.9 t. EDM: f = 0 and g^2 = 2 t."""
    beta = 0.1 + 19.9 * t
    assert drift(LinearVP(), LinearVP().node(t)) == pytest.approx((-beta / 2, beta), rel=1e-7)
    assert drift(EDM(), EDM().node(t)) == pytest.approx((0.0, 2 * t), rel=1e-7)


def test_drift_where_alpha_ends():
    """Of a flow f = -1 / (1 - t) and g^2 = 2 t / (1 - t), whose pole is near its start."""
    t = Flow().t_start
    assert drift(Flow(), Flow().node(t)) == pytest.approx((-1 / (1 - t), 2 * t / (1 - t)), rel=1e-6)


def test_euler_maruyama_starts_at_the_last_time_of_a_cosine_and_of_a_flow():
    """There is no time after it for a central difference, and the exact drift is infinite."""
    for schedule in (CosineVP(), Flow()):
        model = Independent(schedule)
        grid = grid_for(400, EulerMaruyama(), TimeUniform(), schedule, t_start=1 - 1e-5)
        x = SeededNoise(range(64)).latents((1, 4, 4)).double()
        out = integrate(EulerMaruyama(), model, x, grid, SeededNoise(range(64)))
        assert out.std().item() == pytest.approx(STD, rel=0.15)


def test_langevin_keeps_a_gaussian_up_to_its_step_size():
    """In d dimensions its stationary variance is v (1 + snr^2) up to 1/d: from |score|^2 = d V / v^2 and V = V'."""
    v, d, snr = STD**2 + 1.0, 4096, 0.4
    step = next(iter(TimeGrid.at([1.0, 0.9], EDM()).steps()))
    solver, noise = PredictorCorrector(snr=snr), Shared(0)
    x = noise.normal(torch.empty(16, 1, 64, 64, dtype=torch.float64))
    for _ in range(60):
        x = solver.langevin((MEAN - x) / v, x, noise.normal(x), step)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.var().item() == pytest.approx(v * (1 + snr**2), rel=4 / math.sqrt(8 * d) + 0.01)


def test_predictor_corrector_samples_the_data_and_counts_its_evaluations():
    """500 steps of predictor and corrector on 32x32 independent pixels: mean, and variance up to 1 + snr^2."""
    schedule = EDM()
    solver = PredictorCorrector(snr=0.1)
    assert solver.evaluations(500) == 1000
    grid = grid_for(1000, solver, LogSNR(), schedule)
    noise = Shared(1)
    mean, variance = marginal(grid.nodes[0])
    x = mean + math.sqrt(variance) * noise.normal(torch.empty(32, 1, 32, 32, dtype=torch.float64))
    out = integrate(solver, Independent(schedule), x, grid, noise)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.var().item() == pytest.approx(STD**2, rel=0.04)


def test_without_a_predictor_it_is_annealed_langevin_dynamics():
    """30 corrections at each of 100 levels of noise: the marginal of the last but one, its variance up to 1 + snr^2."""
    solver = PredictorCorrector(predictor=None, snr=0.2, corrector_steps=30)
    grid = TimeGrid.at(LogSNR().times(100, EDM(), 10.0, 0.5), EDM())
    noise = Shared(2)
    x = 10.0 * noise.normal(torch.empty(8, 1, 32, 32, dtype=torch.float64))
    out = integrate(solver, Independent(EDM()), x, grid, noise)
    mean, variance = marginal(grid.nodes[-2])
    assert out.mean().item() == pytest.approx(mean, abs=0.05)
    assert out.var().item() == pytest.approx(variance * 1.04, rel=0.05)
    assert solver.evaluations(100) == 3000


def test_predictor_corrector_with_a_vanishing_snr_is_its_predictor():
    """The corrector still draws, so the predictor is a deterministic one."""
    torch.testing.assert_close(run(PredictorCorrector(DDIM(), snr=1e-12)), run(DDIM()), rtol=1e-9, atol=1e-9)


def test_the_final_mean_is_the_last_step_without_its_noise():
    last = run(ReverseDiffusion(final_mean=True), steps=1)
    grid = TimeGrid.at([1.0, 1e-3], LinearVP())
    x = SeededNoise((3, 4)).latents((1, 2, 2)).double() * grid.nodes[0].sigma
    expected = integrate(ReverseDiffusion(), Independent(LinearVP()), x, grid, Zero())
    torch.testing.assert_close(last, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [DDIM(eta=0.3), DDPM(), SDEDPMSolverPP(), PredictorCorrector(), Heun(S_churn=1)])
def test_a_stochastic_solver_without_noise_is_refused(solver):
    grid = TimeGrid.at([1.0, 0.5], EDM())
    with pytest.raises(SamplingError, match="stochastic"):
        integrate(solver, Independent(EDM()), torch.zeros(1, 1, 1, 1, dtype=torch.float64), grid)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDIM(eta=1.5), "eta=1.5.*0.*1"),
        (lambda: DDIM(eta=-0.1), "eta=-0.1"),
        (lambda: DDPM(variance="learned"), "variance='learned'.*small, large"),
        (lambda: SDEDPMSolverPP(order=3), "order=3.*1, 2"),
        (lambda: Heun(alpha=0), "alpha=0.*above 0"),
        (lambda: Heun(S_churn=-1), "S_churn=-1"),
        (lambda: Heun(S_min=2, S_max=1), "S_max=1.*S_min=2"),
        (lambda: PredictorCorrector(snr=0), "snr=0.*above 0"),
        (lambda: PredictorCorrector(corrector_steps=0), "corrector_steps=0"),
        (lambda: PredictorCorrector(predictor=ProbabilityFlow()), "predictor=ProbabilityFlow"),
        (lambda: PredictorCorrector(predictor=BDIA()), "predictor=BDIA .* steps from an earlier state"),
        (lambda: PredictorCorrector(predictor=UniPC()), "predictor=UniPC has a corrector"),
        (lambda: PredictorCorrector(predictor=DPMSolverV3()), "predictor=DPMSolverV3 has a corrector"),
        (lambda: PredictorCorrector(predictor=Teleport(UniPC())), "predictor=Teleport has a corrector"),
    ],
)
def test_impossible_fields_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
