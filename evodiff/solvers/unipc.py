"""UniPC: a unified predictor-corrector of any order (Zhao et al., arXiv 2302.04867, algorithms 5 to 8).

One evaluation per step: the corrector reuses the evaluation that the next step needs anyway, and the last step has
none. Order p of the predictor gives global order p + 1 with the corrector. The first steps, of lower order, limit that
only where they matter: at the usual start, sigma = 80, D hardly changes and their error is small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from evodiff.errors import ConfigError
from evodiff.fields import check_known
from evodiff.grid import Step, TimeGrid
from evodiff.schedule import Node
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.exponential import PREDICTIONS, Prediction, h_phi
from evodiff.solvers.linear import combine, unit_weights, weighted

VARIANTS = ("bh1", "bh2", "vary_coeff")


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniP-p with UniC-p. `variant`: see `rhos`. `prediction`: data or noise."""

    variant: str = "bh1"
    corrector: bool = True
    prediction: str = "data"
    orders: ClassVar[tuple[int, ...]] = tuple(range(1, 10))

    def __post_init__(self) -> None:
        check_known(self, "variant", VARIANTS)
        check_known(self, "prediction", tuple(PREDICTIONS))
        super().__post_init__()

    @property
    def target(self) -> Prediction:
        return PREDICTIONS[self.prediction]

    @property
    def corrects(self) -> bool:
        return self.corrector

    @property
    def global_order(self) -> float:
        return self.order + self.corrector

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        return unified(self, step, past)

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        return unified(self, step, past, m) if self.corrector else x


@dataclass(frozen=True)
class UniC(Multistep):
    """UniC-p as the corrector of another multistep solver, `base`, which it raises by up to one order (section 3.1)."""

    base: Multistep = field(default_factory=DPMSolverPP)
    variant: str = "bh1"
    orders: ClassVar[tuple[int, ...]] = UniPC.orders

    def __post_init__(self) -> None:
        check_known(self, "variant", VARIANTS)
        name = type(self.base).__name__
        if not isinstance(self.base, Multistep) or self.base.stochastic:
            raise ConfigError(
                f"UniC: base={name} is no deterministic multistep solver; possible: like DPMSolverPP, DEIS"
            )
        if self.base.corrects or type(self.base).step is not Multistep.step:
            raise ConfigError(
                f"UniC: base={name} has its own corrector or step; possible: like DPMSolverPP, DEIS, IPNDM"
            )
        super().__post_init__()

    @property
    def equivariant(self) -> bool:
        return self.base.equivariant

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        self.base.check(grid, shape)

    @property
    def target(self) -> Prediction:
        return self.base.target

    @property
    def memory(self) -> int:
        return max(self.base.memory, self.order)

    @property
    def global_order(self) -> float:
        return min(self.order, self.base.global_order) + 1

    def model_term(self, D: Tensor, x: Tensor, node: Node) -> Tensor:
        return self.base.model_term(D, x, node)

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        return self.base.predict(step, past[-self.base.memory :])

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        return unified(self, step, past, m)


def unified(solver: UniPC | UniC, step: Step, past: tuple[Past, ...], m_t: Tensor | None = None) -> Tensor:
    """UniP without m_t, UniC with it: x_t = DDIM - gain_t sum_k rho_k D_k / r_k, D_k = m_k - m_0."""
    target, seen = solver.target, past[::-1][: solver.order_at(step)]
    terms = [q.m for q in seen]
    rks = [(q.node.lam - step.s.lam) / step.h for q in seen[1:]]
    if m_t is not None:
        terms.append(m_t)
        rks.append(1.0)
    carry, first = target.first_order_weights(step.s, step.t)
    m0, *ms = unit_weights(len(terms))
    w = first * m0
    for rho, rk, m in zip(rhos(rks, target.signed(step.h), solver.variant), rks, ms, strict=True):
        w = w - target.gain(step.t) * rho * (m - m0) / rk
    return combine((carry, past[-1].x), *weighted(w, terms))


def rhos(rks: list[float], hh: float, variant: str) -> list[float]:
    """B(h) rho of theorem 3.1, R rho B(h) = b: the weights that integrate the interpolating polynomial exactly.

    They are the same for every B(h), but for the exception of section 3.2: one difference alone gets B(h)/2, with
    B(h) = h for `bh1` and e^h - 1 for `bh2`. `vary_coeff` makes no exception: it is UniPC_v of algorithms 7 and 8.
    (The released `vary_coeff` corrector leaves some of its products out and differs from order 2 on.)
    """
    if len(rks) == 1 and variant != "vary_coeff":
        return [0.5 * (hh if variant == "bh1" else math.expm1(hh))]
    b = [math.factorial(k) * h_phi(k + 1, hh) for k in range(1, len(rks) + 1)]
    R = np.vander(rks, increasing=True).T
    return np.linalg.solve(R, b).tolist() if rks else []
