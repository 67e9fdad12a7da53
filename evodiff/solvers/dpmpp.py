"""DPM-Solver++, multistep (Lu et al., arXiv 2211.01095, algorithm 2; third order as in its released code).

One evaluation per step. Global order 1 and 2 for orders 1 and 2; order 3 has steps of third order, but its start of first
order limits the whole to 2.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from evodiff.grid import Step
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import ddim


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    """Exponential integrator for the data prediction, in half-log-SNR."""

    @property
    def global_order(self) -> float:
        return min(self.order, 2)  # the first step, of first order, leaves an error of second

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        s, t, h = step.s, step.t, step.h
        x, m0 = past[-1].x, past[-1].m
        order = self.order_at(step)
        x_t = ddim(x, m0, s, t)
        if order == 1:
            return x_t
        phi_1 = math.expm1(-h)
        r0 = step.previous.h / h
        D1_0 = (m0 - past[-2].m) / r0
        if order == 2:
            return x_t - (0.5 * t.alpha * phi_1) * D1_0
        r1 = step.previous.previous.h / h
        D1_1 = (past[-2].m - past[-3].m) / r1
        D2 = (D1_0 - D1_1) / (r0 + r1)
        D1 = D1_0 + r0 * D2
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        return x_t + (t.alpha * phi_2) * D1 - (t.alpha * phi_3) * D2
