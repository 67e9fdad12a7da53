"""What the exponential integrators share: the exact linear part of the diffusion ODE, and its phi functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evodiff.schedule import Node, NoiseSchedule
from evodiff.solvers.linear import combine


def ddim(x: Tensor, D: Tensor, s: Node, t: Node) -> Tensor:
    """x_t = (sigma_t / sigma_s) x_s + (alpha_t - alpha_s sigma_t / sigma_s) D: exact while D stays constant."""
    return DATA.first_order(x, D, s, t)


def noise_prediction(x: Tensor, D: Tensor, node: Node) -> Tensor:
    """eps = (x - alpha D) / sigma: the noise in x if D is the image in it."""
    return torch.sub(x, D, alpha=node.alpha).div_(node.sigma)


@dataclass(frozen=True)
class Prediction:
    """What an exponential integrator holds constant or extrapolates: the data D or the noise eps.

    With hh = `signed(h)` the updates of both read the same, x_t = first_order - gain(t) sum_k h_phi_k(hh) D_{k-1} over
    the scaled derivatives D_k of m (DPM-Solver, arXiv 2206.00927, eq. 3.4; DPM-Solver++, arXiv 2211.01095, eq. 8).
    """

    name: str

    def of(self, D: Tensor, x: Tensor, node: Node) -> Tensor:
        """The model term m at `node` from the data prediction D there."""
        return D if self.name == "data" else noise_prediction(x, D, node)

    def signed(self, h: float) -> float:
        """hh: -h for the data, h for the noise prediction."""
        return -h if self.name == "data" else h

    def gain(self, t: Node) -> float:
        """What multiplies the model term at t: alpha for the data, sigma for the noise."""
        return t.alpha if self.name == "data" else t.sigma

    def first_order(self, x: Tensor, m: Tensor, s: Node, t: Node) -> Tensor:
        """x_t = carry x - gain(t) (e^hh - 1) m: the DDIM step, exact while m stays constant."""
        carry, weight = self.first_order_weights(s, t)
        return combine((carry, x), (weight, m))

    def first_order_weights(self, s: Node, t: Node) -> tuple[float, float]:
        """Of x, `carry`, and of m in the first-order step."""
        if self.name == "data":
            carry = t.sigma / s.sigma
            return carry, t.alpha - carry * s.alpha
        carry = t.alpha / s.alpha
        return carry, t.sigma - carry * s.sigma


DATA = Prediction("data")
NOISE = Prediction("noise")
PREDICTIONS = {"data": DATA, "noise": NOISE}


def h_phi(k: int, h: float) -> float:
    """h^k phi_k(h) / h^(k - 1) in the recursion of the DPM papers: expm1(h), then (previous)/h - 1/(k - 1)!.

    h_phi(1) = e^h - 1 = h phi_1(h), h_phi(2) = h phi_2(h) = h_phi(1)/h - 1, and so on, phi_k(0) = 1/k!.
    Small |h| is summed as a series, where the recursion would cancel.
    """
    if abs(h) < 0.5 * k:
        term = h / math.factorial(k)
        total, n = 0.0, k
        while abs(term) > 1e-18 * abs(total):
            total += term
            n += 1
            term *= h / n
        return total
    value = math.expm1(h)
    for j in range(1, k):
        value = value / h - 1 / math.factorial(j)
    return value


def node_at(schedule: NoiseSchedule, kappa: float) -> Node:
    """The node of a schedule whose sigma / alpha is kappa."""
    return schedule.node(schedule.t_at(-math.log(kappa)))


GAUSS = np.polynomial.legendre.leggauss(8)


def lagrange_integrals(
    points: Sequence[float], a: float, b: float, clock: Callable[[float], float] | None = None, panels: int = 1
) -> list[float]:
    """int_a^b l_j(tau(u)) du for the Lagrange polynomials l_j through `points`, the values of tau at the model terms.

    Without a clock tau is u itself, and Gauss's rule of 8 points is exact. With one, the interval is cut in `panels`
    pieces equal in log u (a, b > 0), and the rule is exact to rounding where the clock is smooth.
    """
    x, w = GAUSS
    ends = [a, *(a * (b / a) ** (k / panels) for k in range(1, panels)), b]
    total = np.zeros(len(points))
    for left, right in zip(ends, ends[1:], strict=False):
        u = 0.5 * (left + right) + 0.5 * (right - left) * x
        tau = u if clock is None else np.array([clock(float(v)) for v in u])
        total += 0.5 * (right - left) * (lagrange(points, tau) @ w)
    return total.tolist()


def lagrange(points: Sequence[float], tau: np.ndarray) -> np.ndarray:
    """The Lagrange polynomials through `points`, at each of `tau`: [len(points), len(tau)]."""
    rows = np.ones((len(points), len(tau)))
    for j, p in enumerate(points):
        for k, q in enumerate(points):
            if k != j:
                rows[j] *= (tau - q) / (p - q)
    return rows
