"""SDE-DPM-Solver++ (Lu et al., arXiv 2211.01095, section 4.5 and appendix F).

The reverse SDE by the exponential integrators of DPM-Solver++: one evaluation per step, fresh noise in each. Order 1 is
DDPM with the small variance. Weak order 1 and 2, measured on a Gaussian in `tests/test_solvers_stochastic.py`.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.grid import Step
from evodiff.noise import Noise
from evodiff.solvers.base import Multistep, Past, State
from evodiff.solvers.linear import add_, combine


@dataclass(frozen=True)
class SDEDPMSolverPP(Multistep):
    """x_t = (sigma_t / sigma_s) e^{-h} x + alpha_t (1 - e^{-2h}) (D0 + D1 / 2) + sigma_t sqrt(1 - e^{-2h}) z."""

    orders = (1, 2)

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def global_order(self) -> float:
        return self.order

    def init(self, noise: Noise | None) -> State:
        return super().init(noise), ()

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        noise, past = state
        mean, past = super().step(denoise, x, step, past)
        c = step.t.sigma * math.sqrt(-math.expm1(-2 * step.h))
        return add_(mean, (c, noise.normal(x))), (noise, past)

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        s, t, h = step.s, step.t, step.h
        x, D0 = past[-1].x, past[-1].m
        carry, gain = t.sigma / s.sigma * math.exp(-h), -t.alpha * math.expm1(-2 * h)
        if self.order_at(step) == 1:
            return combine((carry, x), (gain, D0))
        r0 = step.previous.h / h
        w = 0.5 * gain / r0  # of D0 - D(one node before)
        return combine((carry, x), (gain + w, D0), (-w, past[-2].m))
