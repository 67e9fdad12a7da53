"""EVODiff by the paper's formulas (Li et al., NeurIPS 2025, arXiv 2509.26096, "step 1" and its zeta_i, eta_i).

One evaluation per step: a probe by the backward difference, the network there, and a correction of the arrival

    x_t / sigma_t = x_s / sigma_s + h D(x_s) + h^2 / 2 zeta B,    h = 1/kappa_t - 1/kappa_s
    B = B_l + eta (B_u - B_l),    eta* = -<B_u - B_l, B_l> / |B_u - B_l|^2,    eta = sigmoid(|eta*|)
    zeta* = -<D_i, P> / (sigma_t h |D_i|^2),    zeta = sigmoid(-(|zeta*| - mu))

What is not published, and what is taken here: D_i is h B / 2, so that zeta multiplies the second-order term; B_l and
B_u are the backward difference of D over the previous step and the forward one to the probe (l_i, u_i), the previous
step being as long as log kappa says it is, as in the released code (in 1/kappa few steps diverge); P is the first-order
arrival from s less the one from the probe, sigma_t h (D(x_s) - D(probe)), which zeta* makes agree; the probe is the
step with B = B_l and zeta = 1, 2nd-order DPM-Solver++; the last step is DDIM. Inner products are over all of an image,
as written. The released code differs in each of these (`evodiff.py`).

What it is, measured: zeta < 1 always, so the second-order term is never whole and the order is 1, not the paper's 2;
with the field zeta = 1 it is 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.errors import ConfigError
from evodiff.grid import Step
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import ddim


@dataclass(frozen=True)
class EVODiffPaper(Multistep):
    """`mu` shifts zeta*; `zeta` and `eta` fix a weight (ablations)."""

    order: int = 2
    mu: float = 0.5
    zeta: float | None = None
    eta: float | None = None
    orders = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("zeta", "eta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"EVODiffPaper: {name}={value} is impossible; possible: 0 to 1, or null")

    @property
    def global_order(self) -> float:
        return 2 if self.zeta == 1 else 1

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        s, t = step.s, step.t
        x_t = ddim(past[-1].x, past[-1].m, s, t)
        if self.order_at(step) == 1:
            return x_t
        h = inverse_kappa_step(step)
        return x_t + (0.5 * t.sigma * h**2) * self.backward(step, past)

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        if self.order_at(step) == 1:
            return x
        s, t, h = step.s, step.t, inverse_kappa_step(step)
        m0 = past[-1].m
        B_l, B_u = self.backward(step, past), (m - m0) / h
        eta: Tensor | float
        eta = torch.sigmoid(ratio(B_l, B_u - B_l).abs()) if self.eta is None else self.eta
        B = B_l + eta * (B_u - B_l)
        D_i, P = (0.5 * h) * B, (t.sigma * h) * (m0 - m)
        zeta: Tensor | float
        zeta = torch.sigmoid(self.mu - ratio(P, D_i).abs() / (t.sigma * h)) if self.zeta is None else self.zeta
        return ddim(past[-1].x, m0, s, t) + (t.sigma * h * zeta) * D_i

    def backward(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        """B_l: the change of D over the previous step, whose length is R h."""
        R = step.previous.h / step.h
        return (past[-1].m - past[-2].m) / (R * inverse_kappa_step(step))


def inverse_kappa_step(step: Step) -> float:
    """The paper's data-form step size h = 1/kappa_t - 1/kappa_s."""
    return 1 / step.t.kappa - 1 / step.s.kappa


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / <b, b> over each image, [B, 1, 1, 1]. Zero where b is zero."""
    dims = tuple(range(1, b.ndim))
    square = (b * b).sum(dims, keepdim=True)
    return (a * b).sum(dims, keepdim=True) / square.clamp(min=torch.finfo(b.dtype).tiny)
