"""Recorded runs of the library diffusers, for samplers that the released goldens do not have, repeated with ours.

`tests/golden/diffusers/record.py` made the file: each run is on a mixture whose exact denoiser is known, with start,
end, times, the noise drawn and the number of denoiser calls.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from evodiff.denoiser import Counting
from evodiff.grid import TimeGrid
from evodiff.models.analytic import GaussianMixture
from evodiff.paths import ROOT
from evodiff.sampling import integrate
from evodiff.schedule import EDM, DiscreteVP, NoiseSchedule
from evodiff.solvers.base import Solver
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.ddpm import DDPM
from evodiff.solvers.pndm import PLMS, PNDM
from evodiff.solvers.score_sde import PredictorCorrector
from evodiff.solvers.sde_dpmpp import SDEDPMSolverPP

GOLDEN = ROOT / "tests" / "golden" / "diffusers" / "runs.npz"
SCHEDULE = DiscreteVP.linear()
SOLVERS: dict[str, tuple[Solver, float]] = {
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
    # and this one the step size of its corrector
    "pc": (PredictorCorrector(), 2e-6),
}
"""The recorded run's name -> our solver, and the relative error allowed."""


class Replay:
    """Noise that was recorded, one array per draw."""

    def __init__(self, draws: Iterable[np.ndarray]):
        self.draws = iter(draws)

    def normal(self, like: Tensor) -> Tensor:
        return torch.from_numpy(next(self.draws))


def mixture(schedule: NoiseSchedule = SCHEDULE) -> GaussianMixture:
    random = torch.Generator().manual_seed(0)
    means = 2 * torch.rand(3, 1, 2, 2, generator=random, dtype=torch.float64) - 1
    stds = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    return GaussianMixture(means, stds, torch.full_like(stds, 1 / 3), schedule)


def repeat(name: str) -> tuple[float, bool]:
    """Relative L2 error of the result, and whether as many evaluations were made as recorded."""
    with np.load(GOLDEN) as runs:
        run = {key.split("/")[1]: runs[key] for key in runs if key.startswith(f"{name}/")}
    if "times" in run:  # sigma, on a variance-exploding schedule
        grid = TimeGrid.at(run["times"].tolist(), EDM())
    else:
        grid = TimeGrid.at([(t + 1) / 1000 for t in run["timesteps"].tolist()], SCHEDULE)
    denoise = Counting(mixture(grid.schedule))
    noise: object = Replay(run["noise"])
    out = integrate(SOLVERS[name][0], denoise, torch.from_numpy(run["start"]), grid, noise)  # type: ignore[arg-type]
    error = float(np.linalg.norm(out.numpy() - run["end"]) / np.linalg.norm(run["end"]))
    return error, denoise.nfe == int(run["nfe"])
