"""EVODiff as released (Li et al., NeurIPS 2025, arXiv 2509.26096; code_demo/edm_cifar10 of the official code).

One evaluation per step. A DDIM step, then in each step: a balanced difference D1 extrapolates to a probe, the network
is evaluated there, and the arrival is corrected by a gradient estimate B whose weights eta and zeta make the estimates
before and after agree best (variance optimisation). The probe's evaluation is kept; it is not repeated.

What it is, measured: the paper claims second order; this rule converges with first order under a plain Euler end, and
with its own final rule it does not converge when sigma_end is not small, for that rule scales the image by
1 - sqrt(kappa_t kappa_s) and adds a damped difference whatever the step size (`tests/test_order.py`, docs in README).

The released code is defined for EDM only. Written in kappa = sigma / alpha it is the same there, and VP and EDM agree
after scaling by alpha.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.errors import ConfigError
from evodiff.grid import Step
from evodiff.schedule import Node
from evodiff.solvers.base import Multistep, Past
from evodiff.solvers.exponential import ddim


@dataclass(frozen=True)
class EVODiff(Multistep):
    """The released rules, hidden ones as fields.

    `final`: the last step as released, or a plain Euler (DDIM) step. `fine_grid`: above this many steps zeta has
    another formula. `mu`: the shift of zeta*. `clock`: what the difference weight w is measured in, kappa or t (the
    same on EDM). For ablations: `zeta`, `eta` fix a weight, and without `balance` the differences are plain, r = 1.
    """

    order: int = 2
    final: str = "released"
    fine_grid: int = 20
    mu: float = 0.5
    clock: str = "kappa"
    zeta: float | None = None
    eta: float | None = None
    balance: bool = True
    orders = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("final", ("released", "euler")), ("clock", ("kappa", "t"))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"EVODiff: {name}={getattr(self, name)!r} does not exist; possible: {', '.join(known)}"
                )
        if self.zeta is not None and not self.zeta > 0:
            raise ConfigError(f"EVODiff: zeta={self.zeta} is impossible; it divides: above 0, or null")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ConfigError(f"EVODiff: eta={self.eta} is impossible; possible: 0 to 1, or null")

    @property
    def global_order(self) -> float:
        return 1

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        s, t = step.s, step.t
        x, m0 = past[-1].x, past[-1].m
        x_e = ddim(x, m0, s, t)
        if step.i == 0:
            return x_e
        if step.left == 1 and self.lower_order_final:
            return x_e if self.final == "euler" else self.last(x_e, step, past)
        r1, D1 = self.difference(m0, past[-2].m, step)
        return x_e + (0.5 * t.sigma * inverse_kappa_step(step) / probe_ratio(r1, step)) * D1

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        if step.i == 0:
            return x
        s, t = step.s, step.t
        m0, m1 = past[-1].m, past[-2].m
        h, R = inverse_kappa_step(step), log_ratio(step)
        r1, D1 = self.difference(m0, m1, step)
        _, D2 = self.difference(m, m0, step)

        eta: Tensor | float | None = self.eta
        if eta is None:
            Bp, Bn = D1 / (R * h), (R / h) * D2
            eta_star = 0.5 * project(Bn + Bp, Bn - Bp)
            eta = 0.5 * torch.sigmoid(eta_star.abs())
        B = R * (1 - eta) * D2 - (eta / R) * D1

        zeta: Tensor | float | None = self.zeta
        if zeta is None:
            P = (0.5 * t.sigma * h / probe_ratio(r1, step)) * (D1 - B)  # what the probe added, less what B would
            zeta_star = project(P, D1) / (h * t.sigma)
            shift = zeta_star.abs() - self.mu
            if len(step.grid) <= self.fine_grid:
                zeta = torch.sigmoid(shift)
            else:
                c = torch.sigmoid(project(m0, (m0 - m1) / h) * (2 - (t.kappa / s.kappa) ** 2))
                zeta = torch.sigmoid(-shift * c)
        return ddim(past[-1].x, m0, s, t) + (0.5 * t.sigma * h / zeta) * B

    def last(self, x_e: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        """The released last step: a scaled DDIM step and a damped difference."""
        s, t = step.s, step.t
        q = t.kappa / s.kappa
        sf = 1 - math.sqrt(t.kappa * s.kappa)
        rd = 1 - 0.5 * math.sqrt(q if q < 0.5 else q - 0.5)
        return sf * x_e + (0.5 * t.sigma * inverse_kappa_step(step)) * (past[-1].m - rd * past[-2].m)

    def difference(self, m_a: Tensor, m_b: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The balanced difference m_a - r m_b and its r [B, C, 1, 1], between 1 early and a projection late."""
        if not self.balance:
            return torch.ones_like(m_a[:, :, :1, :1]), m_a - m_b
        first, last = (self.time(step.grid.nodes[i]) for i in (0, -1))
        w = 0.5 * (1 - ((self.time(step.t) + last) / (first + last)) ** 2)
        base = math.sqrt((step.t.kappa / step.s.kappa) / (step.s.kappa / step.previous.s.kappa))
        r = (1 - w) * base + w * project(m_a, m_b)
        return r, m_a - r * m_b

    def time(self, node: Node) -> float:
        return node.kappa if self.clock == "kappa" else node.t


def inverse_kappa_step(step: Step) -> float:
    """The paper's data-form step size h = 1/kappa_t - 1/kappa_s."""
    return 1 / step.t.kappa - 1 / step.s.kappa


def log_ratio(step: Step) -> float:
    """R: the previous step's length in log kappa over this one's."""
    return step.previous.h / step.h


def probe_ratio(r1: Tensor, step: Step) -> Tensor:
    """r_i: how far the probe trusts D1, [B, C, 1, 1]."""
    R = log_ratio(step)
    return (torch.sigmoid(0.25 * r1.abs()) * R).clamp(0.25 * R, 1.5 * R)


def project(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / <b, b> over the pixels of each channel, limited to [-2, 2]; [B, C, 1, 1]. Zero where b is zero."""
    square = (b * b).sum((-2, -1), keepdim=True)
    return ((a * b).sum((-2, -1), keepdim=True) / square.clamp(min=torch.finfo(b.dtype).tiny)).clamp(-2, 2)
