"""The order that a solver converges with, measured where the answer is known.

Deterministic solvers run on a mixture of Gaussians, whose denoiser is exact and not linear, from pure noise to data,
against a Runge-Kutta solution to twelve digits. Stochastic ones run on a Gaussian, on which each is an affine map of
its start and its noise, so that the mean and the variance it ends with are known without sampling error (weak order).
Winding down to lower orders at the end is turned off, for it would hide the order of the method.
"""

import math
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evodiff.grid import LogSNR, TimeGrid
from evodiff.models.analytic import GaussianMixture
from evodiff.sampling import integrate
from evodiff.schedule import EDM, LinearVP, Node, NoiseSchedule
from evodiff.solvers.base import Solver
from evodiff.solvers.probability_flow import ProbabilityFlow
from evodiff.solvers.score_sde import PredictorCorrector

SCHEDULES: dict[str, NoiseSchedule] = {"EDM": EDM(), "VP": LinearVP()}
STEPS = (256, 512)
WEAK_STEPS = (200, 400)
MEAN, STD = 0.7, 0.5
PLAIN = {"lower_order_final": False, "final": "euler", "S_noise": 1.0}
"""Fields that are set to the method's bare form: no winding down, no final rule, no more noise than was taken away."""


def order(solver: Solver, schedule: str) -> float | None:
    """The measured order on one of SCHEDULES. None where there is none: the error of an adaptive solver follows its
    tolerances, and a Langevin corrector of a fixed signal-to-noise ratio keeps a bias."""
    if solver.adaptive or isinstance(solver, PredictorCorrector):
        return None
    measure, steps = (weak_error, WEAK_STEPS) if solver.stochastic else (error, STEPS)
    first, second = (measure(plain(solver), schedule, n) for n in steps)
    return math.log2(first / second)


def plain(solver: Solver) -> Solver:
    names = {field.name for field in fields(solver)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {name: value for name, value in PLAIN.items() if name in names}
    if isinstance(base := getattr(solver, "base", None), Solver):
        changes["base"] = plain(base)
    return replace(solver, **changes)  # type: ignore[type-var]


def mixture(schedule: NoiseSchedule) -> GaussianMixture:
    means = torch.tensor([[-0.8, 0.3], [0.6, 0.5], [0.1, -0.7]], dtype=torch.float64).view(3, 1, 1, 2)
    stds, weights = torch.tensor([[0.3, 0.4, 0.5], [0.3, 0.3, 0.4]], dtype=torch.float64)
    return GaussianMixture(means, stds, weights, schedule)


def start(schedule: NoiseSchedule) -> Tensor:
    z = torch.randn(8, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z * schedule.node(schedule.t_start).sigma


def grid(solver: Solver, schedule: NoiseSchedule, steps: int) -> TimeGrid:
    return TimeGrid.at(solver.times(LogSNR(), steps, schedule, schedule.t_start, schedule.t_end), schedule)


@cache
def exact_end(schedule: str) -> Tensor:
    s = SCHEDULES[schedule]
    return integrate(ProbabilityFlow(1e-12, 1e-12), mixture(s), start(s), TimeGrid.at([s.t_start, s.t_end], s))


def error(solver: Solver, schedule: str, steps: int) -> float:
    s = SCHEDULES[schedule]
    out = integrate(solver, mixture(s), start(s), grid(solver, s, steps))
    return (out - exact_end(schedule)).norm().item()


class UnitNoise:
    """Asks an affine sampler for its coefficients: draw j is 1 in row 2 + j of the batch and 0 elsewhere."""

    def __init__(self) -> None:
        self.drawn = 0

    def normal(self, like: Tensor) -> Tensor:
        z = torch.zeros_like(like)
        z[2 + self.drawn] = 1
        self.drawn += 1
        return z


def weak_error(solver: Solver, schedule: str, steps: int) -> float:
    """Distance of (mean, variance) at the end from those of the data's own marginal there.

    x_N = a x_0 + c + sum_j b_j z_j: the batch's first row shows c, its second a, the others b.
    """
    s = SCHEDULES[schedule]
    nodes = grid(solver, s, steps)
    one = torch.ones(1, dtype=torch.float64)
    gaussian = GaussianMixture(MEAN * one.view(1, 1, 1, 1), STD * one, one, s)
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    noise: Any = UnitNoise()
    out = integrate(solver, gaussian, x, nodes, noise).flatten()
    c, a, b = out[0].item(), (out[1] - out[0]).item(), out[2:] - out[0]
    (mean_0, variance_0), (mean, variance) = marginal(nodes.nodes[0]), marginal(nodes.nodes[-1])
    return math.hypot(a * mean_0 + c - mean, a**2 * variance_0 + b.square().sum().item() - variance)


def marginal(node: Node) -> tuple[float, float]:
    return node.alpha * MEAN, (node.alpha * STD) ** 2 + node.sigma**2
