"""iPNDM (Liu et al., arXiv 2202.09778, improved in Zhang & Chen, arXiv 2204.13902, appendix H.2): Adams-Bashforth with
constant weights.

One evaluation per step: PNDM's linear multistep rule, started with lower orders in place of Runge-Kutta steps. The
weights are those of equal steps, on any grid; with `variable_step` (iPNDM-v) those of the grid's own steps in kappa,
which is DEIS' rhoAB of the same order. Global order 1, and 2 from order 2 on, since
steps are not equal; with `variable_step` that of DEIS.
(diff-sampler's third-order iPNDM-v has a bracket misplaced: where steps differ, its weights are not Adams-Bashforth's.)
"""

from dataclasses import dataclass

from torch import Tensor

from evodiff.grid import Step
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import NOISE, Prediction, lagrange_integrals
from evodiff.solvers.linear import combine

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the last slopes, newest first, for equal steps."""


@dataclass(frozen=True)
class IPNDM(Multistep):
    """x_t = DDIM with e' = sum_j b_j eps_j in the place of eps."""

    order: int = 4
    lower_order_final: bool = False
    variable_step: bool = False
    orders = (1, 2, 3, 4)

    @property
    def target(self) -> Prediction:
        return NOISE

    @property
    def global_order(self) -> float:
        return self.order if self.variable_step else min(self.order, 2)

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        seen = past[::-1][: self.order_at(step)]
        carry, first = NOISE.first_order_weights(step.s, step.t)
        weights = self.weights(step, seen)
        return combine((carry, past[-1].x), *((first * b, p.m) for b, p in zip(weights, seen, strict=True)))

    def weights(self, step: Step, seen: tuple[Past, ...]) -> tuple[float, ...]:
        if not self.variable_step:
            return ADAMS_BASHFORTH[len(seen)]
        a, b = step.s.kappa, step.t.kappa
        return tuple(C / (b - a) for C in lagrange_integrals([p.node.kappa for p in seen], a, b))
