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
from typing import NamedTuple

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.grid import Step
from evodiff.schedule import Node
from evodiff.solvers.base import Multistep, State
from evodiff.solvers.exponential import ddim


class Probe(NamedTuple):
    """What a step leaves to the next one, which evaluates the network at its arrival and corrects that.

    With it nothing is computed twice: a step passes over the image for its arrival, two differences, a correction and
    their inner products.
    """

    m0: Tensor
    """D where the step started."""
    square: Tensor
    """<m0, m0>; this and all other inner products and weights are [B, C, 1, 1]."""
    m1: Tensor
    """D one node before (m0 itself in the first step)."""
    D1: Tensor | None = None
    """The balanced difference m0 - r1 m1 by which the arrival is more than DDIM's: gain D1. None in the first step."""
    gain: Tensor | None = None


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

    def step(self, denoise: Denoiser, x: Tensor, step: Step, before: State) -> tuple[Tensor, State]:
        m = denoise(x, step.s)
        if not before:
            return ddim(x, m, step.s, step.t), Probe(m, dot(m, m), m)
        onto = ratio(dot(m, before.m0), before.square)
        if before.D1 is not None:
            x = self.correct(x, m, self.balanced(onto, step.previous), step.previous, before)
        return self.predict(x, m, self.balanced(onto, step), step, before)

    def predict(  # type: ignore[override]
        self, x: Tensor, m0: Tensor, r1: Tensor, step: Step, before: Probe
    ) -> tuple[Tensor, State]:
        """From x at s, where D is m0, to the probe at t."""
        s, t, m1 = step.s, step.t, before.m0
        x_e = ddim(x, m0, s, t)
        if step.left == 1 and self.lower_order_final:
            return x_e if self.final == "euler" else self.last(x_e, m0, m1, step), ()
        D1 = torch.addcmul(m0, r1, m1, value=-1)
        gain = 0.5 * t.sigma * inverse_kappa_step(step) / probe_ratio(r1, step)
        return torch.addcmul(x_e, gain, D1), Probe(m0, dot(m0, m0), m1, D1, gain)

    def correct(  # type: ignore[override]
        self, x: Tensor, m: Tensor, r2: Tensor, step: Step, probe: Probe
    ) -> Tensor:
        """The arrival x of `step`, where D is m, with B / zeta in the place of what the probe added to DDIM."""
        m0, D1, gain = probe.m0, probe.D1, probe.gain
        assert D1 is not None and gain is not None
        D2 = torch.addcmul(m, r2, m0, value=-1)
        D11, D12, D22 = dot(D1, D1), dot(D1, D2), dot(D2, D2)
        unit, R = 0.5 * step.t.sigma * inverse_kappa_step(step), log_ratio(step)

        if self.eta is None:
            forward, backward, both = R**2 * D22, D11 / R**2, D12  # of Bn = R D2 / h and Bp = D1 / (R h)
            eta_star = 0.5 * ratio(forward - backward, forward - 2 * both + backward)
            eta = 0.5 * torch.sigmoid(eta_star.abs())
        else:
            eta = torch.full_like(D11, self.eta)
        b1, b2 = -eta / R, R * (1 - eta)  # B = b1 D1 + b2 D2

        zeta: Tensor | float
        if self.zeta is None:
            zeta_star = ratio(gain * (D11 - (b1 * D11 + b2 * D12)), D11) / (2 * unit)
            shift = zeta_star.abs() - self.mu
            zeta = torch.sigmoid(shift if len(step.grid) <= self.fine_grid else -shift * consistency(probe, step))
        else:
            zeta = self.zeta
        return torch.addcmul(x, unit / zeta * b1 - gain, D1).addcmul_(unit / zeta * b2, D2)

    def last(self, x_e: Tensor, m0: Tensor, m1: Tensor, step: Step) -> Tensor:
        """The released last step: a scaled DDIM step and a damped difference."""
        s, t = step.s, step.t
        q = t.kappa / s.kappa
        sf = 1 - math.sqrt(t.kappa * s.kappa)
        rd = 1 - 0.5 * math.sqrt(q if q < 0.5 else q - 0.5)
        return sf * x_e + (0.5 * t.sigma * inverse_kappa_step(step)) * (m0 - rd * m1)

    def balanced(self, onto: Tensor, step: Step) -> Tensor:
        """r of a balanced difference m_a - r m_b: 1 early, later the projection of m_a onto m_b."""
        if not self.balance:
            return torch.ones_like(onto)
        first, last = (self.time(step.grid.nodes[i]) for i in (0, -1))
        w = 0.5 * (1 - ((self.time(step.t) + last) / (first + last)) ** 2)
        base = math.sqrt((step.t.kappa / step.s.kappa) / (step.s.kappa / step.previous.s.kappa))
        return (1 - w) * base + w * onto

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


def consistency(probe: Probe, step: Step) -> Tensor:
    """c of the formula for fine grids: near 1 where D keeps growing, near 0 where it turns."""
    d = probe.m0 - probe.m1
    along = ratio(inverse_kappa_step(step) * dot(probe.m0, d), dot(d, d))
    return torch.sigmoid(along * (2 - (step.t.kappa / step.s.kappa) ** 2))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> over the pixels of each channel, [B, C, 1, 1]."""
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))[..., None, None]


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, limited to [-2, 2]: the coefficient of a projection. Zero where both are."""
    return (a / b.clamp(min=torch.finfo(b.dtype).tiny)).clamp(-2, 2)
