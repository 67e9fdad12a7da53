"""EVODiff by the paper's formulas (Li et al., NeurIPS 2025, arXiv 2509.26096, "step 1" and its zeta_i, eta_i).

One evaluation per step: a probe by the backward difference, the network there, and a correction of the arrival

    x_t / sigma_t = x_s / sigma_s + h D(x_s) + h^2 / 2 zeta B,    h = 1/kappa_t - 1/kappa_s
    B = B_l + eta (B_u - B_l),    eta* = -<B_u - B_l, B_l> / |B_u - B_l|^2,    eta = sigmoid(|eta*|)
    zeta* = -<D_i, P> / (sigma_t h |D_i|^2),    zeta = sigmoid(-(|zeta*| - mu))

What our notes on the paper do not say, and what is taken here: D_i is h B / 2, so that zeta multiplies the second-order
term; B_l and B_u are the backward difference of D over the previous step and the forward one to the probe (l_i, u_i),
the previous step being as long as log kappa says it is, as in the released code (in 1/kappa few steps diverge); P is
the first-order arrival from s less the one from the probe, sigma_t h (D(x_s) - D(probe)), which zeta* makes agree; so
zeta* divides by the sigma_t of the arrival, where the paper's index, that of the departure, would leave the ratio of
the two in it; the probe is the step with B = B_l and zeta = 1, 2nd-order DPM-Solver++; the last step is DDIM. Inner
products are over all of an image, as written. The released code differs in each of these (`evodiff.py`).

What it is, measured: zeta < 1 always, so the second-order term is never whole and the order is 1, not the paper's 2;
with the field zeta = 1 it is 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.fields import check_number
from evodiff.grid import Step
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import DATA
from evodiff.solvers.linear import combine


@dataclass(frozen=True)
class EVODiffPaper(Multistep):
    """`mu` shifts zeta*; `zeta` and `eta` fix a weight (ablations)."""

    mu: float = 0.5
    zeta: float | None = None
    eta: float | None = None
    orders = (2,)

    def __post_init__(self) -> None:
        for name in ("zeta", "eta"):
            check_number(self, name, lambda v: 0 <= v <= 1, "0 to 1, or null")
        super().__post_init__()

    @property
    def global_order(self) -> float:
        return 2 if self.zeta == 1 else 1

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        x, m0 = past[-1].x, past[-1].m
        if self.order_at(step) == 1:
            return DATA.first_order(x, m0, step.s, step.t)
        carry, first = DATA.first_order_weights(step.s, step.t)
        h_l, h = steps(step)
        w = 0.5 * step.t.sigma * h**2 / h_l  # of the difference in B = B_l
        return combine((carry, x), (first + w, m0), (-w, past[-2].m))

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        if self.order_at(step) == 1:
            return x
        m0, (h_l, h) = past[-1].m, steps(step)
        d_l, d_u = m0 - past[-2].m, m - m0
        ll, lu, uu = dot(d_l, d_l) / h_l**2, dot(d_l, d_u) / (h_l * h), dot(d_u, d_u) / h**2  # of B_l and B_u
        eta: Tensor | float
        eta = torch.sigmoid(ratio(lu - ll, uu - 2 * lu + ll).abs()) if self.eta is None else self.eta
        BB, BBu = (1 - eta) ** 2 * ll + 2 * eta * (1 - eta) * lu + eta**2 * uu, (1 - eta) * lu + eta * uu
        zeta: Tensor | float
        # with D_i = h B / 2 and P = -sigma_t h^2 B_u, zeta* = 2 <B, B_u> / <B, B>
        zeta = torch.sigmoid(self.mu - 2 * ratio(BBu, BB).abs()) if self.zeta is None else self.zeta
        carry, first = DATA.first_order_weights(step.s, step.t)
        w = 0.5 * step.t.sigma * h**2 * zeta
        return combine((carry, past[-1].x), (first, m0), (w * (1 - eta) / h_l, d_l), (w * eta / h, d_u))


def steps(step: Step) -> tuple[float, float]:
    """(R h, h): the paper's data-form step size h = 1/kappa_t - 1/kappa_s, after R times as much."""
    h = 1 / step.t.kappa - 1 / step.s.kappa
    return step.previous.h / step.h * h, h


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> over each image, [B, 1, 1, 1]."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).view(-1, *[1] * (a.ndim - 1))


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b where b is a square. Zero where both are."""
    return a / b.clamp(min=torch.finfo(b.dtype).tiny)
