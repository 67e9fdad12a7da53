"""Samplers without a released golden, against recorded runs of the library diffusers (golden/diffusers/record.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evodiff.denoiser import Counting
from evodiff.grid import TimeGrid
from evodiff.models.analytic import GaussianMixture
from evodiff.sampling import integrate
from evodiff.schedule import DiscreteVP
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.ddpm import DDPM
from evodiff.solvers.pndm import PLMS, PNDM
from evodiff.solvers.sde_dpmpp import SDEDPMSolverPP

RUNS = np.load(Path(__file__).parent / "golden" / "diffusers" / "runs.npz")
SCHEDULE = DiscreteVP.linear()
SOLVERS = {
    "ddpm_small": (DDPM(variance="small"), 1e-11),
    "ddpm_large": (DDPM(variance="large"), 1e-11),
    "ddim_0": (DDIM(), 1e-11),
    "ddim_0.5": (DDIM(eta=0.5), 1e-11),
    "ddim_1": (DDIM(eta=1.0), 1e-11),
    "fpndm": (PNDM(order=4), 1e-11),
    "plms": (PLMS(), 1e-11),
    # these two keep their state in float32
    "sde_dpmpp_1": (SDEDPMSolverPP(order=1), 2e-6),
    "sde_dpmpp_2": (SDEDPMSolverPP(order=2, lower_order_final=False), 2e-6),
}


class Replay:
    """Noise that was recorded, one array per draw."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def normal(self, like):
        return torch.from_numpy(next(self.draws))


def mixture():
    random = torch.Generator().manual_seed(0)
    means = 2 * torch.rand(3, 1, 2, 2, generator=random, dtype=torch.float64) - 1
    stds = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    return GaussianMixture(means, stds, torch.full_like(stds, 1 / 3), SCHEDULE)


@pytest.mark.parametrize("name", SOLVERS)
def test_agrees_with_diffusers(name):
    solver, tolerance = SOLVERS[name]
    run = {key: RUNS[f"{name}/{key}"] for key in ("start", "end", "timesteps", "noise", "nfe")}
    grid = TimeGrid.at([(t + 1) / 1000 for t in run["timesteps"].tolist()], SCHEDULE)
    denoise = Counting(mixture())
    out = integrate(solver, denoise, torch.from_numpy(run["start"]), grid, Replay(run["noise"]))
    error = np.linalg.norm(out.numpy() - run["end"]) / np.linalg.norm(run["end"])
    assert error < tolerance
    assert denoise.nfe == run["nfe"]
