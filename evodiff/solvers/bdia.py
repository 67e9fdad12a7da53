"""BDIA-DDIM: bi-directional integration approximation, an exactly invertible sampler (Zhang et al., arXiv 2307.10829).

One evaluation per step. With d(s -> t | x) the DDIM increment from x at s to t, and x_- the state before x,

    x_+ = gamma x_- + (1 - gamma) x - gamma d(s -> before | x) + d(s -> after | x)

which is linear in x_- : two states in a row, x and x_+, give back x_- (`Inversion`). gamma = 0 is DDIM, gamma = 1 the
paper's first form. Order 1, and 2 for gamma = 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.grid import Step, TimeGrid
from evodiff.noise import Noise
from evodiff.sampling import integrate
from evodiff.schedule import Node
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import ddim


@dataclass(frozen=True)
class BDIA(Solver):
    """From noise to data; the state is the one before x."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"BDIA: gamma={self.gamma} is impossible; possible: 0 (DDIM) to 1")

    @property
    def global_order(self) -> float:
        return 2 if self.gamma == 1 else 1

    def init(self, noise: Noise | None) -> State:
        return None

    def step(self, denoise: Denoiser, x: Tensor, step: Step, before: State) -> tuple[Tensor, State]:
        D = denoise(x, step.s)
        x_t = ddim(x, D, step.s, step.t)
        if before is not None:
            x_t = x_t + self.gamma * (before - ddim(x, D, step.s, step.previous.s))
        return x_t, x


@dataclass(frozen=True)
class Inversion(Solver):
    pass
