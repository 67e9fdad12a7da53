"""DEIS: tAB and rhoAB (Zhang & Chen, arXiv 2204.13902, algorithm 1, eq. 14 and section 4.2).

One evaluation per step. x_t / alpha_t = x_s / alpha_s + sum_j C_j eps_j with C_j = int l_j dkappa, l_j the Lagrange
polynomials through the last `order` nodes, in t (tAB) or in rho = kappa (rhoAB). Order k here is tAB(k - 1) of the
paper; order 1 is DDIM. Global order k: the first steps, of lower order, limit it only where they matter, and at the
usual start eps hardly changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from evodiff.errors import ConfigError
from evodiff.fields import check_known, refuse
from evodiff.grid import Step, TimeGrid
from evodiff.schedule import LinearVP, NoiseSchedule
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import NOISE, Prediction, lagrange, lagrange_integrals
from evodiff.solvers.linear import combine

PANELS = 16


@dataclass(frozen=True)
class DEIS(Multistep):
    """`variant`: the polynomials are in t (`tab`) or kappa (`rhoab`).

    Where alpha = 1 the t of tAB is that of the linear VP schedule with the same range of kappa, as in diff-sampler.
    `quadrature`: null computes the integrals exactly (to rounding; on discrete schedules, whose t has kinks, to about
    1e-5). A number replays the released tAB, a left sum over that many points, which is off by some 1e-5 with 100,000.
    """

    order: int = 3
    lower_order_final: bool = False
    variant: str = "tab"
    quadrature: int | None = None
    orders = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known(self, "variant", ("tab", "rhoab"))
        if self.quadrature is not None and (self.quadrature < 2 or self.variant == "rhoab"):
            refuse(self, "quadrature", "null, or with variant=tab at least 2")

    @property
    def target(self) -> Prediction:
        return NOISE

    @property
    def equivariant(self) -> bool:
        return self.variant == "rhoab"

    @property
    def global_order(self) -> float:
        return self.order

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        clock_schedule(grid.schedule, self.quadrature)

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        s, t = step.s, step.t
        seen = past[::-1][: self.order_at(step)]
        kappas = tuple(p.node.kappa for p in seen)
        schedule: Any = step.grid.schedule
        kept = coefficients if hashable(schedule) else coefficients.__wrapped__
        C = kept(schedule, self.variant, self.quadrature, kappas, t.kappa)
        return combine((t.alpha / s.alpha, past[-1].x), *((t.alpha * C_j, p.m) for C_j, p in zip(C, seen, strict=True)))


def hashable(schedule: NoiseSchedule) -> bool:
    """Somebody's own may not be: one that can be changed, or that holds an array."""
    try:
        hash(schedule)
    except TypeError:
        return False
    return True


@lru_cache(maxsize=4096)  # one a step; grids have tens of steps, and no more than a thousand
def coefficients(
    schedule: NoiseSchedule, variant: str, quadrature: int | None, kappas: tuple[float, ...], kappa_t: float
) -> tuple[float, ...]:
    """C_j for the nodes at `kappas`, newest first, from kappas[0] to kappa_t; kept, for every batch asks for them."""
    if variant == "rhoab" or len(kappas) == 1:
        return tuple(lagrange_integrals(kappas, kappas[0], kappa_t))
    vp = clock_schedule(schedule, quadrature)

    def clock(kappa: float) -> float:
        return vp.t_at(-math.log(kappa))

    times = [clock(kappa) for kappa in kappas]
    if quadrature is None:
        return tuple(lagrange_integrals(times, kappas[0], kappa_t, clock, PANELS))
    return tuple(left_sums(vp, times, clock(kappa_t), quadrature))


def clock_schedule(schedule: NoiseSchedule, quadrature: int | None) -> Any:
    """In whose t polynomials are fitted. Raises ConfigError for one on which `quadrature` cannot be replayed."""
    vp = linear_vp_like(schedule) if schedule.node(schedule.t_start).alpha == 1 else schedule
    if quadrature is not None and not isinstance(vp, LinearVP):
        name = type(schedule).__name__
        raise ConfigError(f"DEIS: quadrature={quadrature} replays EDM and linear VP only, not {name}; use null (exact)")
    return vp


def left_sums(vp: LinearVP, times: list[float], t: float, n: int) -> list[float]:
    """int l_j (dkappa/dt) dt from times[0] to t as diff-sampler sums it: n points, both ends among them, times 1/n."""
    tau = np.linspace(times[0], t, n)
    slope = vp.beta_max - vp.beta_min
    alpha_squared = np.exp(-0.5 * tau**2 * slope - tau * vp.beta_min)
    rate = 0.5 * (slope * tau + vp.beta_min) / np.sqrt(alpha_squared * (1 - alpha_squared))
    return (lagrange(times, tau) @ rate * ((t - times[0]) / n)).tolist()


def linear_vp_like(schedule: NoiseSchedule, eps: float = 1e-3) -> LinearVP:
    """The linear VP schedule with the first kappa of this one at time 1 and its last at time eps."""
    # int_0^t beta = log(1 + kappa^2) = beta_min t + (beta_max - beta_min) t^2 / 2
    late, early = (math.log1p(schedule.node(t).kappa ** 2) for t in (schedule.t_start, schedule.t_end))
    slope = 2 * (late - early / eps) / (1 - eps)
    beta_min = late - 0.5 * slope
    return LinearVP(beta_min, beta_min + slope, 1.0, eps)
