"""SciRE-Solver, version 1 (Li et al., arXiv 2308.07896): noise prediction in kappa = sigma / alpha, with the recursive
difference in place of a derivative,

    eps'(kappa_a) = (eps_b - eps_a) / (phi_1(m) (kappa_b - kappa_a)),    phi_1(m) = sum_{k=1}^m (-1)^(k-1) / k!

phi_1(3) = 2/3 is the paper's choice, phi_1(1) = 1 the plain finite difference. Theorem 3.2 promises order k - 1 for
SciRE-V1-k; with m > 1 the slope is 1/phi_1 times too large, and the order measured is 1 whatever k is; with m = 1 it
is 2 for all of them.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.fields import check_number
from evodiff.grid import Step
from evodiff.schedule import Node
from evodiff.solvers.base import Multistep, Past, Solver, State
from evodiff.solvers.exponential import NOISE, Prediction, node_at, noise_prediction
from evodiff.solvers.linear import combine, unit_weights, weighted
from evodiff.solvers.singlestep import Singlestep


def phi_1(m: int) -> float:
    """1, 1/2, 2/3, 5/8, ... -> 1 - 1/e; negative m is refused at construction."""
    return sum((-1) ** (k - 1) / math.factorial(k) for k in range(1, m + 1))


def check_m(solver: Solver) -> None:
    check_number(solver, "m", lambda m: m >= 1 and m == int(m), "whole numbers, 1 (finite difference) or more")


@dataclass(frozen=True)
class SciRESinglestep(Singlestep):
    """SciRE-V1-2 (algorithm 1) and SciRE-V1-3 (algorithm 2): `order` evaluations per step, and lower orders to spend
    the rest of a budget.

    Released codes differ: that for EDM spaces the ends of the steps evenly in half-log-SNR, where here a step of order
    k spans k intervals; that for discrete times changes phi_1 on the way, and takes its inner times from the grid.
    """

    m: int = 3
    known = (2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_m(self)

    @property
    def global_order(self) -> float:
        return 2 if self.m == 1 else 1

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        order = self.order_of(step.i)
        s, t = step.s, step.t
        h, phi = t.kappa - s.kappa, phi_1(self.m)
        eps = noise_prediction(x, denoise(x, s), s)

        def taylor(node: Node, weight: float, eps_r: Tensor) -> Tensor:
            """y = y_s + (kappa - kappa_s) eps + weight (eps_r - eps) at `node`, as x = alpha y."""
            first = node.kappa - s.kappa
            return combine(
                (node.alpha / s.alpha, x), (node.alpha * (first - weight), eps), (node.alpha * weight, eps_r)
            )

        def inner(r: float) -> Node:
            return node_at(step.grid.schedule, s.kappa + r * h)

        if order == 1:
            return NOISE.first_order(x, eps, s, t), state
        r1, r2 = (1 / 2, 1.0) if order == 2 else (1 / 3, 2 / 3)
        s1 = inner(r1)
        x_1 = NOISE.first_order(x, eps, s, s1)
        eps_1 = noise_prediction(x_1, denoise(x_1, s1), s1)
        if order == 2:
            return taylor(t, h / (2 * phi * r1), eps_1), state
        s2 = inner(r2)
        x_2 = taylor(s2, r2 / (2 * r1) * h / phi, eps_1)
        eps_2 = noise_prediction(x_2, denoise(x_2, s2), s2)
        return taylor(t, h / (2 * phi * r2), eps_2), state


@dataclass(frozen=True)
class SciREMultistep(Multistep):
    """SciRE, multistep 2 and 3: one evaluation per step. The third order is weighted as released.

    The second order, which the third begins and ends with, is the paper's; versions of the released code put other
    ratios in the place of that of the steps in kappa, change phi_1 on the way, and wind down below 10 steps only.
    """

    order: int = 2
    m: int = 3
    orders = (1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_m(self)

    @property
    def global_order(self) -> float:
        return 2 if self.order > 1 and self.m == 1 else 1

    @property
    def target(self) -> Prediction:
        return NOISE

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        s, t = step.s, step.t
        order, phi = self.order_at(step), phi_1(self.m)
        h = t.kappa - s.kappa
        seen = past[::-1][:order]
        kappas = [p.node.kappa for p in seen]
        eps_0, *eps = unit_weights(order)  # everything below is weights of the last `order` noise predictions
        w = h * eps_0
        if order > 1:
            r0 = (kappas[0] - kappas[1]) / h
            D1 = eps_0 - eps[0]
        if order == 2:
            w = w + (0.5 * h / (r0 * phi)) * D1
        if order == 3:
            r0 = phi * r0
            r1 = phi / (1 + phi) * (kappas[1] - kappas[2]) / (kappas[0] - kappas[1])
            D2 = D1 - (eps[0] - eps[1])
            w = w + (0.5 * h / (r0 * phi)) * D1 + (h / (6 * r0 * r1 * phi**2)) * D2
        return combine((t.alpha / s.alpha, past[-1].x), *weighted(t.alpha * w, (p.m for p in seen)))
