"""DDIM, deterministic (Song, Meng & Ermon, arXiv 2010.02502, eq. 12 with eta = 0).

First order, one evaluation per step. The same step is DPM-Solver++ 1, UniP-1 and DEIS-0.
"""

from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.grid import Step
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import ddim


@dataclass(frozen=True)
class DDIM(Solver):
    """x_t = (sigma_t / sigma_s) x_s + (alpha_t - alpha_s sigma_t / sigma_s) D(x_s, s)."""

    @property
    def global_order(self) -> float:
        return 1

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        return ddim(x, denoise(x, step.s), step.s, step.t), state
