"""DPM-Solver-v3 (Zheng et al., arXiv 2310.13268, algorithms 1 and 2; pseudo-orders from its section 3.3).

One evaluation per step, predictor and corrector. The network is parametrised by empirical model statistics l, s, b, one
number per pixel and half-log-SNR, which make its first-order error smallest: f = (sigma eps - l x) / alpha, and
g = e^{-int s} f - int e^{-int s} b. Its steps are of order up to 3; the first one is of first order, which limits the
whole to 2, as in every multistep method here that starts with DDIM.

Without statistics l = 1, s = b = 0 ("degenerated" in the released code): f = -D, and the integrals are exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.grid import Step, TimeGrid
from evodiff.schedule import Node
from evodiff.solvers.base import Multistep, Past, State
from evodiff.solvers.exponential import h_phi
from evodiff.solvers.linear import combine


@dataclass(frozen=True, eq=False)
class Statistics:
    """Empirical model statistics l, s, b, float64 [M + 1, C, H, W], at half-log-SNRs `lambdas` [M + 1], rising.

    Between the nodes they are linear; their integrals are trapezoidal sums over the nodes, as in the released code.
    That one also moves each time of the grid to the nearest of the nodes, which is not done here.
    """

    lambdas: Tensor
    l: Tensor  # noqa: E741  the paper's letter
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        shape = (len(self.lambdas), *self.l.shape[1:])
        if len(self.lambdas) < 2 or not bool((self.lambdas.diff() > 0).all()):
            raise ConfigError("statistics: lambdas must be at least two rising half-log-SNRs")
        for name in ("l", "s", "b"):
            array = getattr(self, name)
            if array.shape != shape or array.ndim != 4:
                raise ConfigError(
                    f"statistics: {name} has shape {tuple(array.shape)}, expected {shape}: one [C, H, W] for each "
                    f"of the {len(self.lambdas)} half-log-SNRs"
                )
            if not bool(array.isfinite().all()):
                raise ConfigError(f"statistics: {name} holds NaN or infinite numbers; compute it again")

    def l_at(self, lam: float) -> Tensor:
        """l at one half-log-SNR, [C, H, W]."""
        return self._between(self.l, self.lambdas.new_tensor([lam]))[0]

    def along(self, lam_s: float, lam_t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The nodes from lam_s to lam_t, both ends included, as [n, 1, 1, 1], and l, s, b there."""
        low, high = min(lam_s, lam_t), max(lam_s, lam_t)
        inner = self.lambdas[(self.lambdas > low) & (self.lambdas < high)]
        lam = torch.cat([self.lambdas.new_tensor([low]), inner, self.lambdas.new_tensor([high])])
        lam = lam.flip(0) if lam_s > lam_t else lam
        l, s, b = (self._between(a, lam) for a in (self.l, self.s, self.b))  # noqa: E741
        return lam[:, None, None, None], l, s, b

    def _between(self, array: Tensor, lam: Tensor) -> Tensor:
        right = torch.searchsorted(self.lambdas, lam).clamp(1, len(self.lambdas) - 1)
        left = right - 1
        w = (lam - self.lambdas[left]) / (self.lambdas[right] - self.lambdas[left])
        return torch.lerp(array[left], array[right], w.clamp(0, 1)[:, None, None, None])


class Weights(NamedTuple):
    """x_t / alpha_t = decay x_s / alpha_s + constant - sum_i f[i] f_i; each a float or [C, H, W]."""

    decay: Tensor | float
    constant: Tensor | float
    f: tuple[Tensor | float, ...]


@dataclass(frozen=True)
class DPMSolverV3(Multistep):
    """`p_pseudo`, `c_pseudo`: divided differences in place of derivatives in the predictor and in the corrector, which
    then uses one node more."""

    order: int = 3
    statistics: Statistics | None = None
    p_pseudo: bool = False
    use_corrector: bool = True
    c_pseudo: bool = False

    @property
    def caveat(self) -> str:
        without = "solver.statistics=null, so l = 1 and s = b = 0: not the DPM-Solver-v3 of its paper"
        return "" if self.statistics else without

    @property
    def global_order(self) -> float:
        return 2 if self.order > 1 or (self.use_corrector and self.c_pseudo) else 1

    @property
    def corrects(self) -> bool:
        return self.use_corrector

    @cached_property
    def weights(self) -> Callable[..., Weights]:
        """`weights` of its statistics; kept, for every batch asks, and no longer than the solver."""
        return lru_cache(maxsize=None)(partial(weights, self.statistics))

    @cached_property
    def weight_of_x(self) -> Callable[..., Tensor]:
        """`weight_of_x` of its statistics, kept likewise."""
        assert self.statistics is not None
        return lru_cache(maxsize=None)(partial(weight_of_x, self.statistics))

    def step(self, denoise: Denoiser, x: Tensor, step: Step, past: State) -> tuple[Tensor, State]:
        if step.i == 0:
            self.check(step.grid, x.shape[1:])
        return super().step(denoise, x, step, past)

    def model_term(self, D: Tensor, x: Tensor, node: Node) -> Tensor:
        """f = (sigma eps - l x) / alpha = (1 - l) x / alpha - D."""
        if self.statistics is None:
            return -D
        return combine((self.weight_of_x(node, x.device, x.dtype), x), (-1.0, D))

    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        return self.update(step, past[::-1][: self.order_at(step)], self.p_pseudo)

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        order = self.order_at(step) + self.c_pseudo
        if not self.use_corrector or order == 1:
            return x
        points = (past[-1], Past(step.t, x, m), *past[-2::-1])
        return self.update(step, points[:order], self.c_pseudo)

    def update(self, step: Step, points: tuple[Past, ...], pseudo: bool) -> Tensor:
        """Equation 13 with the derivatives of g at `points[0]` estimated from all of them."""
        s, t = step.s, step.t
        lams = tuple(point.node.lam for point in points)
        x = points[0].x
        w = self.weights(t.lam, lams, pseudo, x.device, x.dtype)
        gains = ((-t.alpha * weight, point.m) for weight, point in zip(w.f, points, strict=True))
        x_t = combine((t.alpha / s.alpha * w.decay, x), *gains)
        return x_t if self.statistics is None else x_t.add_(w.constant, alpha=t.alpha)

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        """Refuse statistics of another image or another range of the schedule, before the first evaluation."""
        if self.statistics is None:
            return
        own = tuple(self.statistics.l.shape[1:])
        if own != tuple(shape):
            raise ConfigError(
                f"statistics are of images {own}, but the model's are {tuple(shape)}: give this model's own"
            )
        first, last = grid.nodes[0].lam, grid.nodes[-1].lam
        low, high = self.statistics.lambdas[0].item(), self.statistics.lambdas[-1].item()
        slack = 1e-3 * (high - low)
        if first < low - slack or last > high + slack:
            raise ConfigError(
                f"statistics cover half-log-SNRs {low:.4g} to {high:.4g}, but the grid runs from {first:.4g} to "
                f"{last:.4g}: set t_start and t_end inside, or compute others with `evodiff stats ems`"
            )


def weight_of_x(statistics: Statistics, node: Node, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1 - l) / alpha at a node."""
    return ((1 - statistics.l_at(node.lam)) / node.alpha).to(device, dtype)


def weights(
    statistics: Statistics | None,
    lam_t: float,
    lams: tuple[float, ...],
    pseudo: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Weights:
    """The coefficients of one update from lams[0] to lam_t that uses f at all of `lams`."""
    decay: Tensor | float
    if statistics is None:
        decay, C, J = exact_integrals(lam_t - lams[0], len(lams))
        gains, shifts = [1.0] * len(lams), [0.0] * len(lams)
    else:
        decay, C, J = integrals(statistics, lams[0], lam_t, len(lams))
        gains, shifts = map(list, zip(*(history(statistics, lams[0], lam) for lam in lams), strict=True))
    A = derivatives(lams, pseudo)
    g = [decay * sum((J[n] * A[n, i] for n in range(1, len(lams))), J[0] * A[0, i]) for i in range(len(lams))]
    constant = sum((w * shift for w, shift in zip(g, shifts, strict=True)), -decay * C)
    f = [w * gain for w, gain in zip(g, gains, strict=True)]
    ready = [v.to(device, dtype) if isinstance(v, Tensor) else float(v) for v in (decay, constant, *f)]
    return Weights(ready[0], ready[1], tuple(ready[2:]))


def exact_integrals(h: float, count: int) -> tuple[float, Any, list[Any]]:
    """What `integrals` gives for l = 1, s = b = 0: int_0^h e^u u^n / n! du = e^h h^(n + 1) phi_{n+1}(-h)."""
    return math.exp(-h), 0.0, [-math.exp(h) * h**n * h_phi(n + 1, -h) for n in range(count)]


def integrals(statistics: Statistics, lam_s: float, lam_t: float, count: int) -> tuple[Tensor, Any, list[Any]]:
    """e^-L, int e^(L + S) B, and int e^(L + S) (lam - lam_s)^n / n! for n < count, all from lam_s to lam_t."""
    lam, l, s, b = statistics.along(lam_s, lam_t)  # noqa: E741
    L, S = cumulative(lam, l), cumulative(lam, s)
    B = cumulative(lam, torch.exp(-S) * b)
    E = torch.exp(L + S)
    J = [cumulative(lam, E * (lam - lam_s) ** n)[-1] / math.factorial(n) for n in range(count)]
    return torch.exp(-L[-1]), cumulative(lam, E * B)[-1], J


def history(statistics: Statistics, lam_s: float, lam: float) -> tuple[Tensor | float, Tensor | float]:
    """(G, B) such that g at `lam`, relative to lam_s, is G f - B."""
    if lam == lam_s:
        return 1.0, 0.0
    lam_along, _, s, b = statistics.along(lam_s, lam)
    S = cumulative(lam_along, s)
    return torch.exp(-S[-1]), cumulative(lam_along, torch.exp(-S) * b)[-1]


def cumulative(x: Tensor, y: Tensor) -> Tensor:
    """The trapezoidal integral of y from x[0] to each x, along the first axis."""
    pieces = 0.5 * x.diff(dim=0) * (y[1:] + y[:-1])
    return torch.cat([torch.zeros_like(y[:1]), pieces.cumsum(0)])


def derivatives(lams: tuple[float, ...], pseudo: bool) -> np.ndarray:
    """A [n, n] with row k the weights of g at `lams` in its k-th derivative at lams[0] (row 0: the value there).

    From the interpolating polynomial, or with `pseudo` k! times the divided difference of the first k + 1 values.
    """
    n = len(lams)
    scale = np.array([math.factorial(k) for k in range(n)], dtype=float)[:, None]
    if not pseudo:
        return np.linalg.inv(np.vander(np.subtract(lams, lams[0]), increasing=True)) * scale
    table, rows = np.eye(n), []
    for k in range(n):
        rows.append(table[0])
        table = np.array([(table[j] - table[j + 1]) / (lams[j] - lams[j + k + 1]) for j in range(n - k - 1)]).reshape(
            -1, n
        )
    return np.array(rows) * scale
