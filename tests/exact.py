"""A denoiser whose diffusion ODE is solved in closed form, and what solvers' tests measure on it."""

import math

import torch

from evodiff.grid import LogSNR, TimeGrid
from evodiff.models.analytic import GaussianMixture
from evodiff.sampling import integrate
from evodiff.schedule import EDM, LinearVP

SHORT_EDM = EDM(t_start=10.0, t_end=0.05)
VP = LinearVP()
MEAN, STD = 0.3, 0.5


def gaussian(schedule=SHORT_EDM, shape=(1, 2, 2)):
    mean = torch.full((1, *shape), MEAN, dtype=torch.float64)
    return GaussianMixture(mean, torch.tensor([STD]).double(), torch.ones(1).double(), schedule)


def mixture(schedule=SHORT_EDM, shape=(2, 3, 3), components=4):
    random = torch.Generator().manual_seed(1)
    means = 2 * torch.rand(components, *shape, generator=random, dtype=torch.float64) - 1
    weights = torch.rand(components, generator=random, dtype=torch.float64)
    return GaussianMixture(means, torch.linspace(0.1, 0.4, components).double(), weights / weights.sum(), schedule)


def grid(steps, schedule=SHORT_EDM, spacing=None):
    times = (spacing or LogSNR()).times(steps, schedule, schedule.t_start, schedule.t_end)
    return TimeGrid.at(times, schedule)


def start(schedule=SHORT_EDM, shape=(1, 2, 2), batch=3):
    node = schedule.node(schedule.t_start)
    z = torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z * math.sqrt(node.alpha**2 * STD**2 + node.sigma**2)


def exact_flow(x, s, t):
    """The probability-flow ODE of the Gaussian keeps (x - alpha mu) / sqrt(alpha^2 std^2 + sigma^2)."""
    scale = [math.sqrt(n.alpha**2 * STD**2 + n.sigma**2) for n in (s, t)]
    return t.alpha * MEAN + (x - s.alpha * MEAN) * scale[1] / scale[0]


def error(solver, steps, schedule=SHORT_EDM):
    """Distance from the exact flow after `steps` steps."""
    g, x = grid(steps, schedule), start(schedule)
    out = integrate(solver, gaussian(schedule), x, g)
    return (out - exact_flow(x, g.nodes[0], g.nodes[-1])).norm().item()


def order(solver, steps=160, schedule=SHORT_EDM):
    return math.log2(error(solver, steps, schedule) / error(solver, 2 * steps, schedule))
