"""The probability-flow ODE by an adaptive Runge-Kutta 4(5) (Song et al., arXiv 2011.13456, appendix D.4; the pair of
Dormand & Prince, 1980).

NFE is a result: six evaluations per tried step, the seventh is the next step's first. The ODE is
dy/dkappa = (y - D) / kappa for y = x / alpha, whose solution is nearly straight (arXiv 2206.00364, section 3).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import SamplingError
from evodiff.fields import check_number
from evodiff.grid import Step
from evodiff.schedule import Node
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import node_at, noise_prediction
from evodiff.solvers.linear import combine

A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Stages, their places, and the fifth-order result less the fourth-order one."""


@dataclass(frozen=True)
class ProbabilityFlow(Solver):
    """Each step keeps the root mean square of error / (atol + rtol |y|) below 1 in the worst sample of the batch.

    So every sample meets the tolerances in each step. But the steps, the NFE and with them the result, to within the
    error that all steps make together, depend on the samples beside it: on the batch size.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000
    adaptive = True

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "max_steps"):
            check_number(self, name, lambda v: v > 0, "above 0")
        super().__post_init__()

    @property
    def caveat(self) -> str:
        return "its steps are those of the worst sample of a batch, so images and NFE depend on the batch size"

    @property
    def global_order(self) -> float:
        return 5

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        schedule, end = step.grid.schedule, step.t.kappa

        def eps(y: Tensor, node: Node) -> Tensor:
            x = y * node.alpha
            return noise_prediction(x, denoise(x, node), node)

        y, node = x / step.s.alpha, step.s
        h = 0.01 * (end - node.kappa)
        d = eps(y, node)
        for _ in range(self.max_steps):
            last = abs(h) >= abs(end - node.kappa) * (1 - 1e-12)
            h = end - node.kappa if last else h
            k = [d]
            for row, c in zip(A, C, strict=True):
                y_new = combine((1.0, y), *scaled(h, row, k))
                reached = node_at(schedule, node.kappa + c * h) if not (last and c == 1) else step.t
                k.append(eps(y_new, reached))
            error = self.error(combine(*scaled(h, E, k)), y, y_new)
            if error <= 1:
                y, node, d = y_new, reached, k[-1]
                if last:
                    return y * step.t.alpha, state
            if not error < float("inf"):
                raise SamplingError("ProbabilityFlow: the network returned NaN or inf; nothing of this batch was kept")
            h *= min(5.0, max(0.2, 0.9 * error**-0.2 if error > 0 else 5.0))
        raise SamplingError(
            f"ProbabilityFlow: {self.max_steps} steps did not reach the end with rtol={self.rtol}, atol={self.atol}; "
            f"use larger tolerances, float64, or more max_steps"
        )

    def error(self, error: Tensor, y: Tensor, y_new: Tensor) -> float:
        """The largest root mean square over the samples of the error in units of the tolerance."""
        allowed = torch.maximum(y.abs(), y_new.abs()).mul_(self.rtol).add_(self.atol)
        scaled = (error / allowed).flatten(1)
        return float(torch.linalg.vector_norm(scaled, dim=1).max()) / math.sqrt(scaled.shape[1])


def scaled(h: float, weights: tuple[float, ...], k: list[Tensor]) -> list[tuple[float, Tensor]]:
    """The terms of h sum_j weights_j k_j, without those of weight 0."""
    return [(h * w, k_j) for w, k_j in zip(weights, k, strict=True) if w]
