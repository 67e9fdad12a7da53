"""DPM-Solver++, multistep (Lu et al., arXiv 2211.01095, algorithm 2; third order as in its released code).

One evaluation per step. Global order 1 for order 1, and 2 for orders 2 and 3: the released third order multiplies the
second derivative D2 = h^2 D'' / 2 by h_phi_3 where the exact integral has 2 h_phi_3, and so leaves half of it out.
UniPC with order=3 and corrector=false is the same method with the whole of it, and of third order. The last steps wind
down to first order as in DPM-Solver-v3's copy of the code; the original does that below 10 steps only, and from there
on is this with lower_order_final=false.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from evodiff.grid import Step
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import h_phi
from evodiff.solvers.linear import combine, unit_weights, weighted


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    """Exponential integrator for the data prediction, in half-log-SNR."""

    @property
    def global_order(self) -> float:
        return min(self.order, 2)  # the released third order leaves half of D2 out

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        h, order = step.h, self.order_at(step)
        gain, hh = self.target.gain(step.t), self.target.signed(h)
        carry, first = self.target.first_order_weights(step.s, step.t)
        m0, *ms = unit_weights(order)  # everything below is weights of the last `order` model terms
        w = first * m0
        if order > 1:
            r0 = step.previous.h / h
            D1_0 = (m0 - ms[0]) / r0
        if order == 2:
            w = w - (0.5 * gain * math.expm1(hh)) * D1_0
        if order == 3:
            r1 = step.previous.previous.h / h
            D1_1 = (ms[0] - ms[1]) / r1
            D2 = (D1_0 - D1_1) / (r0 + r1)
            D1 = D1_0 + r0 * D2
            w = w - gain * h_phi(2, hh) * D1 - gain * h_phi(3, hh) * D2
        return combine((carry, past[-1].x), *weighted(w, (p.m for p in past[::-1][:order])))
