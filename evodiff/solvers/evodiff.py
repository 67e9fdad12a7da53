"""EVODiff as released (Li et al., NeurIPS 2025, arXiv 2509.26096; code_demo/edm_cifar10 of the official code).

One evaluation per step. A DDIM step, then in each step: a balanced difference D1 extrapolates to a probe, the network
is evaluated there, and the arrival is corrected by a gradient estimate B whose weights eta and zeta make the estimates
before and after agree best (variance optimisation). The probe's evaluation is kept; it is not repeated.

What it is, measured: the paper claims second order; this rule converges with first order under a plain Euler end, and
with its own final rule it does not converge when sigma_end is not small, for that rule scales the image by
1 - sqrt(kappa_t kappa_s) and adds a damped difference whatever the step size (`tests/test_solvers_common.py`).

The released code is defined for EDM only. Written in kappa = sigma / alpha it is the same there, and VP and EDM agree
after scaling by alpha.

All that the method forms (D1, D2, B, the correction) are linear combinations of three images, and all it asks of them
is their inner products. So they are kept as weights of these images, and a step passes over the image for one
difference, three inner products and one combination.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.fields import check_known, check_number
from evodiff.grid import Step
from evodiff.schedule import Node
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import DATA, ddim
from evodiff.solvers.linear import combine


class Span(NamedTuple):
    """n images, and their inner products over the pixels of each channel [n, n, B, C, 1, 1].

    m0 = D at a node, then its change since the node before if there was one, then its change to the node after if that
    is known. A combination of them is a vector of weights, [n, B, C, 1, 1].
    """

    images: tuple[Tensor, ...]
    gram: Tensor

    @classmethod
    def of(cls, m: Tensor) -> "Span":
        return cls((m,), inner(m, m)[None, None])

    def to(self, m: Tensor) -> "Span":
        """With the change from m0 to m."""
        images = (*self.images, m - self.images[0])
        row = torch.stack([inner(image, images[-1]) for image in images])
        return Span(images, torch.cat([torch.cat([self.gram, row[:-1, None]], 1), row[None]]))

    def from_here(self, m: Tensor) -> "Span":
        """Of m and the change that `to` added."""
        vectors = [self.vectors()[0], self.unit(-1)]
        return Span(
            (m, self.images[-1]), torch.stack([torch.stack([self.dot(a, b) for b in vectors]) for a in vectors])
        )

    def unit(self, i: int) -> Tensor:
        eye = torch.eye(len(self.images), dtype=self.gram.dtype, device=self.gram.device)
        return eye[i, :, None, None, None, None]

    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """m, m0 and m1 (m0 itself in the first step)."""
        m0 = self.unit(0)
        return m0 + self.unit(-1), m0, m0 - self.unit(1) if len(self.images) == 3 else m0

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """<a, b> of two vectors, [B, C, 1, 1]."""
        return (a[:, None] * self.gram * b).sum((0, 1))


class Seen(NamedTuple):
    """What a step leaves to the next one, which evaluates the network at its arrival and corrects that."""

    span: Span
    probe: tuple[Tensor, Tensor] | None = None
    """(r1, gain), each [B, C, 1, 1]: the arrival is DDIM's and gain D1, D1 = m0 - r1 m1. None in the first step."""


@dataclass(frozen=True)
class EVODiff(Solver):
    """The released rules, hidden ones as fields.

    `final`: the last step as released, or a plain Euler (DDIM) step. `fine_grid`: above this many steps zeta has
    another formula. `mu`: the shift of zeta*. `clock`: what the difference weight w is measured in, kappa or t (the
    same on EDM). Without `lower_order_final` the last step ends at its probe, which nothing corrects; the released code
    spends one more evaluation on that. For ablations: `zeta`, `eta` fix a weight, and without `balance` the differences
    are plain, r = 1. Flows need balance=false on grids uniform in time: balanced differences follow kappa, which there
    falls a hundredfold in the first step, and the error grows tenfold. Only the diffusers scheduler sets it by itself.
    """

    lower_order_final: bool = True
    final: str = "released"
    fine_grid: int = 20
    mu: float = 0.5
    clock: str = "kappa"
    zeta: float | None = None
    eta: float | None = None
    balance: bool = True

    def __post_init__(self) -> None:
        check_known(self, "final", ("released", "euler"))
        check_known(self, "clock", ("kappa", "t"))
        check_number(self, "zeta", lambda zeta: zeta > 0, "above 0, for it divides, or null")
        check_number(self, "eta", lambda eta: 0 <= eta <= 1, "0 to 1, or null")
        super().__post_init__()

    @property
    def equivariant(self) -> bool:
        return self.clock == "kappa"

    @property
    def global_order(self) -> float:
        return 1

    def step(self, denoise: Denoiser, x: Tensor, step: Step, seen: State) -> tuple[Tensor, State]:
        m = denoise(x, step.s)
        if not seen:
            return ddim(x, m, step.s, step.t), Seen(Span.of(m))
        span = seen.span.to(m)
        carry, w, probe = self.predict(span, step)
        if seen.probe:
            w = w + carry * self.correct(span, step.previous, *seen.probe)
        x_t = combine((carry, x), *zip(w, span.images, strict=True))
        return x_t, Seen(span.from_here(m), probe) if probe else ()

    def predict(self, span: Span, step: Step) -> tuple[float, Tensor, tuple[Tensor, Tensor] | None]:
        """From s, where D is m, to the probe at t: the weights of x and of the images, and (r1, gain)."""
        s, t = step.s, step.t
        m, m0, _ = span.vectors()
        carry, first = DATA.first_order_weights(s, t)
        x_e = first * m  # and carry x
        unit = 0.5 * t.sigma * inverse_kappa_step(step)
        if step.left == 1 and self.lower_order_final:
            if self.final == "euler":
                return carry, x_e, None
            q = t.kappa / s.kappa
            sf = 1 - math.sqrt(t.kappa * s.kappa)
            rd = 1 - 0.5 * math.sqrt(q if q < 0.5 else q - 0.5)
            return sf * carry, sf * x_e + unit * (m - rd * m0), None
        r1 = self.balanced(span, step)
        gain = unit / probe_ratio(r1, step)
        return carry, x_e + gain * (m - r1 * m0), (r1, gain)

    def correct(self, span: Span, step: Step, r1: Tensor, gain: Tensor) -> Tensor:
        """What the arrival of `step`, where D is m, lacks: B / zeta in the place of what the probe added to DDIM."""
        m, m0, m1 = span.vectors()
        unit, R = 0.5 * step.t.sigma * inverse_kappa_step(step), log_ratio(step)
        D1, D2 = m0 - r1 * m1, m - self.balanced(span, step) * m0

        eta: Tensor | float
        if self.eta is None:
            B_p, B_n = D1 / R, R * D2  # both times h
            eta_star = 0.5 * ratio(span.dot(B_n + B_p, B_n - B_p), span.dot(B_n - B_p, B_n - B_p))
            eta = 0.5 * torch.sigmoid(eta_star.abs())
        else:
            eta = self.eta
        B = -(eta / R) * D1 + R * (1 - eta) * D2

        zeta: Tensor | float
        if self.zeta is None:
            alpha = step.t.alpha  # `ratio` limits what it returns; that of P / alpha is the same on VP and EDM
            P = gain / alpha * (D1 - B)
            zeta_star = ratio(span.dot(P, D1), span.dot(D1, D1)) * alpha / (2 * unit)
            shift = zeta_star.abs() - self.mu
            zeta = torch.sigmoid(shift if len(step.grid) <= self.fine_grid else -shift * consistency(span, step))
        else:
            zeta = self.zeta
        return unit / zeta * B - gain * D1

    def balanced(self, span: Span, step: Step) -> Tensor:
        """r of a balanced difference m - r m0: between the ratio of the steps' kappa and the projection of m onto m0,
        which soon weighs half."""
        m, m0, _ = span.vectors()
        onto = ratio(span.dot(m, m0), span.dot(m0, m0))
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
    return torch.sigmoid(0.25 * r1.abs()) * log_ratio(step)  # within R/2 and R: the released clamp never acts


def consistency(span: Span, step: Step) -> Tensor:
    """c of the formula for fine grids: near 1 where D keeps growing, near 0 where it turns."""
    _, m0, m1 = span.vectors()
    along = ratio(inverse_kappa_step(step) * span.dot(m0, m0 - m1), span.dot(m0 - m1, m0 - m1))
    return torch.sigmoid(along * (2 - (step.t.kappa / step.s.kappa) ** 2))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> over the pixels of each channel, [B, C, 1, 1]."""
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))[..., None, None]


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, limited to [-2, 2]: the coefficient of a projection. Zero where both are."""
    return (a / b.clamp(min=torch.finfo(b.dtype).tiny)).clamp(-2, 2)
