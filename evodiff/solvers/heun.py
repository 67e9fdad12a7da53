"""EDM's deterministic sampler: Heun's trapezoidal rule in kappa = sigma / alpha (Karras et al., arXiv 2206.00364,
algorithm 1).

Second order, two evaluations per step. With a final denoising call, N steps spend the 2N + 1 evaluations of EDM's
N + 1 steps down to sigma = 0, whose last one is an Euler step and equals that call.
"""

from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.grid import Step
from evodiff.solvers.base import Solver, State


@dataclass(frozen=True)
class Heun(Solver):
    """y = x / alpha; d = (y - D) / kappa; y' = y + dk d; y + dk (d + d') / 2."""

    @property
    def global_order(self) -> float:
        return 2

    def evaluations(self, steps: int) -> int:
        return 2 * steps

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        s, t = step.s, step.t
        dk = t.kappa - s.kappa
        y = x / s.alpha
        d = (y - denoise(x, s)) / s.kappa
        y_e = y + dk * d
        d_t = (y_e - denoise(y_e * t.alpha, t)) / t.kappa
        return (y + (0.5 * dk) * (d + d_t)) * t.alpha, state
