"""Teleport: the closed-form flow of a Gaussian, and what follows it."""

import itertools

import numpy as np
import pytest
import torch
from exact import MEAN, SHORT_EDM, STD, VP, exact_flow, gaussian, grid, start

from evodiff.denoiser import Counting
from evodiff.errors import ConfigError
from evodiff.gaussian import digits, fit, from_covariance, load
from evodiff.grid import LogSNR, grid_for
from evodiff.sampling import integrate
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.scire import SciRESinglestep
from evodiff.solvers.teleport import Gaussian, Teleport


class Correlated:
    """The exact denoiser of N(mean, cov): D = mean + alpha cov (alpha^2 cov + sigma^2)^-1 (x - alpha mean)."""

    def __init__(self, mean, cov, schedule):
        self.mean, self.cov, self.schedule = mean, cov, schedule

    def __call__(self, x, node):
        total = node.alpha**2 * self.cov + node.sigma**2 * torch.eye(len(self.cov)).double()
        gain = node.alpha * self.cov @ torch.linalg.inv(total)
        z = (x - node.alpha * self.mean).flatten(1)
        return self.mean + (z @ gain.T).view_as(x)


def correlated(schedule):
    random = torch.Generator().manual_seed(5)
    A = torch.randn(4, 4, dtype=torch.float64, generator=random)
    mean = torch.randn(1, 2, 2, dtype=torch.float64, generator=random)
    return Correlated(mean, 0.1 * A @ A.T, schedule)


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
def test_the_flow_of_a_gaussian_is_what_small_steps_converge_to(schedule):
    model, g, x = correlated(schedule), grid(1000, schedule), start(schedule)
    flow = from_covariance(model.mean, model.cov).flow(x, g.nodes[0], g.nodes[-1])
    out = integrate(DPMSolverPP(order=2), model, x, g)
    torch.testing.assert_close(out, flow, rtol=1e-4, atol=1e-4)


def test_steps_of_the_flow_compose():
    model, g, x = correlated(VP), grid(5, VP), start(VP)
    gauss = from_covariance(model.mean, model.cov)
    steps = x
    for step in g.steps():
        steps = gauss.flow(steps, step.s, step.t)
    torch.testing.assert_close(steps, gauss.flow(x, g.nodes[0], g.nodes[-1]), rtol=1e-10, atol=1e-10)


def test_a_base_with_its_own_steps_has_them_after_the_gaussian():
    """Of orders 3, 3 and 1, the last step is a third as long as those before."""
    solver = Teleport(SciRESinglestep(order=3)).for_budget(7)
    times = grid_for(7, solver, LogSNR(), VP).nodes
    lengths = [t.lam - s.lam for s, t in itertools.pairwise(times[solver.skip :])]
    assert lengths == pytest.approx([3 * lengths[-1], 3 * lengths[-1], lengths[-1]])
    assert Teleport(SciRESinglestep(order=3, orders=(2, 3))).for_budget(7).base.orders == (2, 3)
    plain = Teleport(DPMSolverPP(order=2)).for_budget(5)
    assert grid_for(5, plain, LogSNR(), VP).nodes == grid_for(7, DPMSolverPP(order=2), LogSNR(), VP).nodes


def test_what_is_off_the_axes_has_the_rest_of_the_variance():
    """One axis of variance 4, the others STD^2: the same as all axes written out."""
    axis = torch.full((1, 4), 0.5).double()
    short = Gaussian(torch.full((1, 2, 2), MEAN).double(), axis, torch.tensor([4.0]).double(), STD**2)
    cov = STD**2 * torch.eye(4).double() + (4 - STD**2) * axis.T @ axis
    full = from_covariance(short.mean, cov)
    g, x = grid(3), start()
    for nodes in ((g.nodes[0], g.nodes[1]), (g.nodes[1], g.nodes[3])):
        torch.testing.assert_close(short.flow(x, *nodes), full.flow(x, *nodes), rtol=1e-10, atol=1e-10)


def test_on_a_gaussian_the_steps_replaced_are_exact_and_free():
    g, x, counting = grid(6), start(), Counting(gaussian())
    solver = Teleport(DPMSolverPP(order=1), Gaussian.isotropic(MEAN, STD), skip=5)
    out = integrate(solver, counting, x, g)
    assert counting.nfe == solver.evaluations(6) == 1
    before_last = exact_flow(x, g.nodes[0], g.nodes[5])
    expected = integrate(DPMSolverPP(order=1), gaussian(), before_last, grid_of(g.nodes[5:]))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def grid_of(nodes):
    return type(grid(1))(tuple(nodes), SHORT_EDM)


def test_fit_of_images():
    images = torch.randint(0, 256, (400, 1, 2, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    gauss = fit(images)
    x = images.double() / 127.5 - 1
    torch.testing.assert_close(gauss.mean, x.mean(0))
    cov = gauss.axes.T @ torch.diag(gauss.variances) @ gauss.axes
    np.testing.assert_allclose(cov.numpy(), np.cov(x.flatten(1).numpy(), rowvar=False), atol=1e-12)


def test_the_digits_are_there():
    gauss = digits()
    assert gauss.mean.shape == (1, 32, 32)
    assert gauss.mean[0, 0, 0].item() == -1  # the border is black, and never varies
    assert gauss.variances.min() == 0 and gauss.variances.max() > 10


def test_statistics_from_a_file(tmp_path):
    np.savez(tmp_path / "g.npz", mean=np.zeros((1, 2, 2)), cov=np.diag([1.0, 2.0, 3.0, 4.0]))
    assert load(str(tmp_path / "g.npz")).variances.tolist() == [1, 2, 3, 4]
    np.savez(tmp_path / "bad.npz", mean=np.zeros((1, 2, 2)), cov=np.eye(3))
    with pytest.raises(ConfigError, match=r"mean \(1, 2, 2\) and cov \(3, 3\) do not fit"):
        load(str(tmp_path / "bad.npz"))
    with pytest.raises(ConfigError, match="Expected an .npz with mean"):
        load(str(tmp_path / "nowhere.npz"))


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.eye(4))


def not_a_number(path):
    np.savez(path, mean=np.zeros((1, 2, 2)), cov=np.full((4, 4), np.nan))


@pytest.mark.parametrize("spoil", [cut, one_array, not_a_number])
def test_a_broken_file_is_named(tmp_path, spoil):
    path = tmp_path / "g.npz"
    np.savez(path, mean=np.zeros((1, 2, 2)), cov=np.eye(4))
    spoil(path)
    with pytest.raises(ConfigError, match=rf"gaussian.path={path}: "):
        load(str(path))


def test_a_gaussian_of_other_images_is_refused_before_any_evaluation():
    with pytest.raises(ConfigError, match=r"gaussian is of images \(1, 32, 32\), but the model's are \(1, 2, 2\)"):
        integrate(Teleport(DPMSolverPP(), digits()), None, start(), grid(4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Teleport(DPMSolverPP(), skip=0), "skip=0 is impossible"),
        (lambda: Gaussian(torch.zeros(1, 2, 2), torch.zeros(2, 3), torch.zeros(2)), "do not fit"),
        (lambda: Gaussian(torch.zeros(1, 1, 2), torch.eye(2), torch.tensor([-1.0, 1.0])), "0 or above"),
    ],
)
def test_impossible_fields_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
