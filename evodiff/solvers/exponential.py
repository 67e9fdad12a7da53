"""What the exponential integrators share: the exact linear part of the diffusion ODE, and its phi functions."""

import math

from torch import Tensor

from evodiff.schedule import Node


def ddim(x: Tensor, D: Tensor, s: Node, t: Node) -> Tensor:
    """x_t = (sigma_t / sigma_s) x_s + (alpha_t - alpha_s sigma_t / sigma_s) D: exact while D stays constant."""
    ratio = t.sigma / s.sigma
    return ratio * x + (t.alpha - s.alpha * ratio) * D


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
