"""BDIA-DDIM: the sampler, and that it inverts."""

import pytest
import torch
from exact import SHORT_EDM, VP, gaussian, grid, mixture, order, start

from evodiff.denoiser import Counting
from evodiff.errors import ConfigError, SamplingError
from evodiff.sampling import integrate
from evodiff.solvers.bdia import BDIA, Inversion
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.exponential import ddim
from evodiff.solvers.sde_dpmpp import SDEDPMSolverPP


def first_pair(model, x, g):
    return torch.stack([x, ddim(x, model(x, g.nodes[0]), *g.nodes[:2])])


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("scaled", [True, False])
def test_noise_to_image_and_back(gamma, scaled, schedule):
    """Both ends of the round trip to 1e-10: the noise from the image, and the image from that noise again."""
    g, model, solver = grid(12, schedule), mixture(schedule), BDIA(gamma, pair=True, scaled=scaled)
    x = start(schedule, (2, 3, 3))
    pair = first_pair(model, x, g)
    images = integrate(solver, model, pair, g)
    noise = integrate(Inversion(solver), model, images, g)
    assert (noise - pair).norm() <= 1e-10 * pair.norm()
    again = integrate(solver, model, noise, g)
    assert (again - images).norm() <= 1e-10 * images.norm()


def test_ddim_itself_does_not_come_back():
    """The round trip is no accident: DDIM run backwards over the same grid misses the noise."""
    g, model, x = grid(12), mixture(), start(shape=(2, 3, 3))
    back = integrate(DDIM(), model, x, g)
    for step in reversed(list(g.steps())):
        back = ddim(back, model(back, step.t), step.t, step.s)
    assert (back - x).norm() > 1e-3 * x.norm()


def test_the_pair_is_the_same_path():
    g, model, x = grid(9), mixture(), start(shape=(2, 3, 3))
    plain = integrate(BDIA(0.8), model, x, g)
    pair = integrate(BDIA(0.8, pair=True), model, first_pair(model, x, g), g)
    torch.testing.assert_close(pair[1], plain, rtol=1e-12, atol=1e-12)


def test_gamma_zero_is_ddim():
    g, model, x = grid(9), mixture(), start(shape=(2, 3, 3))
    assert torch.equal(integrate(BDIA(0.0), model, x, g), integrate(DDIM(), model, x, g))


def test_second_step_by_hand():
    """x_+ = gamma x_- + (1 - gamma) x - gamma d(back) + d(forward), the increments being DDIM's."""
    g, model, x, gamma = grid(2, VP), mixture(VP), start(VP, (2, 3, 3)), 0.7
    a, b, c = g.nodes
    x_1 = ddim(x, model(x, a), a, b)
    D = model(x_1, b)
    forward, back = ddim(x_1, D, b, c) - x_1, ddim(x_1, D, b, a) - x_1
    expected = gamma * x + (1 - gamma) * x_1 - gamma * back + forward
    torch.testing.assert_close(integrate(BDIA(gamma, scaled=False), model, x, g), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gamma", "expected"), [(1.0, 2), (0.5, 1)])
def test_order(gamma, expected):
    for schedule in (SHORT_EDM, VP):
        assert order(BDIA(gamma), 320, schedule) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("solver", [BDIA(pair=True), Inversion(BDIA())])
def test_one_state_where_two_are_needed_is_refused(solver):
    with pytest.raises(SamplingError, match=r"\[2, B, C, H, W\], not \(2, 1, 2, 2\)"):
        integrate(solver, gaussian(), start(batch=2), grid(4))


def test_inversion_spends_one_evaluation_less_than_steps():
    g, counting = grid(7), Counting(gaussian())
    solver = Inversion(BDIA())
    integrate(solver, counting, torch.zeros(2, 3, 1, 2, 2).double(), g)
    assert counting.nfe == solver.evaluations(7) == 6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BDIA(gamma=1.5), "gamma=1.5 is impossible; possible: 0"),
        (lambda: Inversion(SDEDPMSolverPP()), "of=SDEDPMSolverPP is stochastic"),
        (lambda: Inversion(DPMSolverPP()), "of=DPMSolverPP has no exact inverse; possible: bdia"),
        (lambda: Inversion(BDIA(gamma=0)), "no exact inverse; possible: bdia with gamma above 0"),
    ],
)
def test_impossible_fields_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
