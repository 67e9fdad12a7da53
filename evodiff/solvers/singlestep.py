"""DPM-Solver and DPM-Solver++, singlestep (Lu et al., arXiv 2206.00927, algorithms 1 and 2; arXiv 2211.01095,
algorithm 1 for 2S; 3S and the order schedules as in their released code).

Global order 2 and 3. A step of order k spends k evaluations and remembers nothing. For a budget the last steps are of
lower order, so that every number of evaluations can be spent: order 3 spends 10 as 3 + 3 + 3 + 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.fields import check_known, refuse
from evodiff.grid import Spacing, Step, TimeGrid
from evodiff.schedule import Node, NoiseSchedule
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import DATA, NOISE, Prediction, h_phi
from evodiff.solvers.linear import combine


@dataclass(frozen=True)
class Singlestep(Solver):
    """A step of order k spends k evaluations and spans k intervals of the spacing, as in DPM-Solver's released code.

    `orders`: the order of each step, up to `order`; steps beyond the list are of `order`, and a longer list than there
    are steps is refused. Null: `for_budget` chooses.
    """

    order: int = 2
    orders: tuple[int, ...] | None = None
    known: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __post_init__(self) -> None:
        check_known(self, "order", self.known)
        super().__post_init__()
        if not all(1 <= order <= self.order for order in self.orders or ()):
            refuse(self, "orders", f"each from 1 to order={self.order}")
        if self.orders is not None:
            object.__setattr__(self, "orders", tuple(self.orders))

    def for_budget(self, nfe: int) -> Solver:
        return replace(self, orders=order_schedule(self.order, max(nfe, 1))) if self.orders is None else self

    def evaluations(self, steps: int) -> int:
        return sum(self.order_of(i) for i in range(steps))

    def order_of(self, i: int) -> int:
        return self.orders[i] if self.orders and i < len(self.orders) else self.order

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        if len(self.orders or ()) > len(grid):
            refuse(self, "orders", f"at most {len(grid)}, one for each step", "has too many")

    def times(self, spacing: Spacing, steps: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        ends = list(accumulate((self.order_of(i) for i in range(steps)), initial=0))
        fine = spacing.times(ends[-1], schedule, t_start, t_end)
        return [fine[i] for i in ends]


@dataclass(frozen=True)
class DPMSolverPPSinglestep(Singlestep):
    """DPM-Solver++ (arXiv 2211.01095).

    Without `lower_order_final` all steps are of `order`, whatever the budget.
    `inner`: how the evaluations inside a step are spaced; null is uniform in half-log-SNR, and the steps are spaced as
    asked. Set to the spacing of the grid, the whole is the released code's.
    """

    inner: Spacing | None = None
    lower_order_final: bool = True

    @property
    def target(self) -> Prediction:
        return DATA

    @property
    def global_order(self) -> float:
        return self.order

    def for_budget(self, nfe: int) -> Solver:
        return super().for_budget(nfe) if self.lower_order_final else self

    def times(self, spacing: Spacing, steps: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        if self.inner is None:
            return spacing.times(steps, schedule, t_start, t_end)
        return super().times(spacing, steps, schedule, t_start, t_end)

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        target, s, t = self.target, step.s, step.t
        hh, order = target.signed(step.h), self.order_of(step.i)
        m_s = target.of(denoise(x, s), x, s)
        if order == 1:
            return target.first_order(x, m_s, s, t), state

        def second_order(node: Node, m: Tensor, weight: float) -> Tensor:
            """The first-order step to `node`, less gain weight (m - m_s)."""
            carry, first = target.first_order_weights(s, node)
            w = target.gain(node) * weight
            return combine((carry, x), (first + w, m_s), (-w, m))

        (s1, r1), (s2, r2) = self.nodes(step, order)
        x_1 = target.first_order(x, m_s, s, s1)
        m_1 = target.of(denoise(x_1, s1), x_1, s1)
        if order == 2:
            return second_order(t, m_1, math.expm1(hh) / (2 * r1)), state
        x_2 = second_order(s2, m_1, h_phi(2, r2 * hh) * r2 / r1)
        m_2 = target.of(denoise(x_2, s2), x_2, s2)
        return second_order(t, m_2, h_phi(2, hh) / r2), state

    def nodes(self, step: Step, order: int) -> tuple[tuple[Node, float], tuple[Node, float]]:
        """The two nodes inside the step (order 2: the second is its end) and their places r in half-log-SNR."""
        if self.inner is None:
            return (step.at(1 / order), 1 / order), (step.at(2 / order) if order > 2 else step.t, 2 / order)
        schedule = step.grid.schedule
        times = self.inner.times(order, schedule, step.s.t, step.t.t)
        s1, s2 = (schedule.node(t) for t in times[1:3])
        return (s1, (s1.lam - step.s.lam) / step.h), (s2, (s2.lam - step.s.lam) / step.h)


@dataclass(frozen=True)
class DPMSolverSinglestep(DPMSolverPPSinglestep):
    """The same for the noise prediction: DPM-Solver-2 and DPM-Solver-3 (arXiv 2206.00927)."""

    @property
    def target(self) -> Prediction:
        return NOISE


def order_schedule(order: int, nfe: int) -> tuple[int, ...]:
    """The orders of the steps that spend `nfe` evaluations, as the released code chooses them."""
    full, rest = divmod(nfe, order)
    if order == 3 and rest == 0:
        return (*[3] * (full - 1), 2, 1) if full else ()
    return (*[order] * full, rest) if rest else (order,) * full
