"""DDIM (Song, Meng & Ermon, arXiv 2010.02502, eq. 12 and 16).

First order, one evaluation per step. With eta = 0 it is deterministic, and the same step as DPM-Solver++ 1, UniP-1 and
DEIS-0; with eta = 1 it is DDPM's ancestral sampling with the small variance.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.fields import check_number
from evodiff.grid import Step
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import ddim, noise_prediction
from evodiff.solvers.linear import combine


@dataclass(frozen=True)
class DDIM(Solver):
    """x_t = alpha_t D + sqrt(sigma_t^2 - c^2) eps + c z, with c = eta sigma_t sqrt(1 - e^{-2h})."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "eta", lambda eta: 0 <= eta <= 1, "0 (deterministic) to 1 (DDPM)")
        super().__post_init__()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @property
    def global_order(self) -> float:
        return 1

    def step(self, denoise: Denoiser, x: Tensor, step: Step, noise: State) -> tuple[Tensor, State]:
        s, t = step.s, step.t
        D = denoise(x, s)
        if self.eta == 0:
            return ddim(x, D, s, t), noise
        c = self.eta * t.sigma * math.sqrt(-math.expm1(-2 * step.h))
        eps = noise_prediction(x, D, s)
        return combine((t.alpha, D), (math.sqrt(t.sigma**2 - c**2), eps), (c, noise.normal(x))), noise
