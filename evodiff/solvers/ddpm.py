"""DDPM's ancestral sampling (Ho, Jain & Abbeel, arXiv 2006.11239, algorithm 2; any subsequence of its steps as in
arXiv 2102.09672).

Weak order 1, one evaluation per step. The posterior q(x_t | x_s, x_0 = D) has the right mean; its variance is fixed.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.fields import check_known
from evodiff.grid import Step
from evodiff.solvers.base import Solver, State
from evodiff.solvers.linear import combine


@dataclass(frozen=True)
class DDPM(Solver):
    """`variance`: `small` is the posterior's beta~ (exact for data at one point), `large` the forward step's beta
    (exact for unit Gaussian data)."""

    variance: str = "small"

    def __post_init__(self) -> None:
        check_known(self, "variance", ("small", "large"))
        super().__post_init__()

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def equivariant(self) -> bool:
        return self.variance == "small"  # beta is that of x, not of x / alpha

    @property
    def global_order(self) -> float:
        return 1

    def step(self, denoise: Denoiser, x: Tensor, step: Step, noise: State) -> tuple[Tensor, State]:
        s, t = step.s, step.t
        a = s.alpha / t.alpha
        beta = -(s.sigma**2) * math.expm1(-2 * step.h)  # the variance of q(x_s | x_t): sigma_s^2 - a^2 sigma_t^2
        shrink = (t.sigma / s.sigma) ** 2
        variance = beta * shrink if self.variance == "small" else beta
        D = denoise(x, s)
        x_t = combine((a * shrink, x), (t.alpha * beta / s.sigma**2, D), (math.sqrt(variance), noise.normal(x)))
        return x_t, noise
