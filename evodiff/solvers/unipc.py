"""UniPC: a unified predictor-corrector of any order (Zhao et al., arXiv 2302.04867, algorithms 5 to 7, data
prediction).

One evaluation per step: the corrector reuses the evaluation that the next step needs anyway, and the last step has
none. Order p of the predictor gives global order p + 1 with the corrector. The first steps, of lower order, limit that
only where they matter: at the usual start, sigma = 80, D hardly changes and their error is small.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from evodiff.errors import ConfigError
from evodiff.grid import Step
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import ddim


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniP-p with UniC-p. `variant` chooses B(h): bh1 is h, bh2 is e^h - 1."""

    variant: str = "bh1"
    corrector: bool = True
    orders: ClassVar[tuple[int, ...]] = tuple(range(1, 10))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("bh1", "bh2"):
            raise ConfigError(f"UniPC: variant={self.variant!r} does not exist; possible: bh1, bh2")

    @property
    def global_order(self) -> float:
        return self.order + self.corrector

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        return self.update(step, past, None)

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        return self.update(step, past, m) if self.corrector else x

    def update(self, step: Step, past: tuple[Past, ...], m_t: Tensor | None) -> Tensor:
        """UniP without m_t, UniC with it: x_t = DDIM - alpha_t B(h) sum_k rho_k D_k / r_k."""
        p = self.order_at(step)
        x, m0 = past[-1].x, past[-1].m
        hh = -step.h
        nodes = past[-p:-1][::-1]
        rks = [(q.node.lam - step.s.lam) / step.h for q in nodes]
        D1s = [(q.m - m0) / rk for q, rk in zip(nodes, rks, strict=True)]
        if m_t is not None:
            rks.append(1.0)
            D1s.append(m_t - m0)
        B_h = hh if self.variant == "bh1" else math.expm1(hh)
        x_t = ddim(x, m0, step.s, step.t)
        for rho, D1 in zip(rhos(rks, hh, B_h), D1s, strict=True):
            x_t = x_t - (step.t.alpha * B_h * rho) * D1
        return x_t


def rhos(rks: list[float], hh: float, B_h: float) -> list[float]:
    """The weights of theorem 3.1: R(h) rho = b(h). One difference alone gets 1/2, as the paper has it (section 3.2)."""
    if len(rks) == 1:
        return [0.5]
    h_phi_k, factorial, b = math.expm1(hh) / hh - 1, 1, []
    for i in range(1, len(rks) + 1):
        b.append(h_phi_k * factorial / B_h)
        factorial *= i + 1
        h_phi_k = h_phi_k / hh - 1 / factorial
    R = np.vander(rks, increasing=True).T
    return np.linalg.solve(R, b).tolist()
