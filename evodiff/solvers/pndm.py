"""PNDM (Liu et al., arXiv 2202.09778, algorithm 2) and PLMS: linear multistep in the noise, after a Runge-Kutta start.

F-PNDM (order 4): three pseudo Runge-Kutta steps of four evaluations, then Adams-Bashforth 4, N + 9 evaluations in all.
S-PNDM (order 2): one pseudo improved Euler step of two, then Adams-Bashforth 2, N + 1 in all. PLMS (as released with
latent diffusion, arXiv 2112.10752): the start of S-PNDM, then orders 2, 3 and 4, N + 1 in all. Global order 2: the
weights are those of equal steps in kappa, which grids do not have.
"""

from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.fields import check_known
from evodiff.grid import Step
from evodiff.schedule import Node
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import NOISE, noise_prediction
from evodiff.solvers.ipndm import ADAMS_BASHFORTH
from evodiff.solvers.linear import combine, weighted

phi = NOISE.first_order
"""The transfer part phi(x, e, s, t): DDIM with the noise e."""


def eps(denoise: Denoiser, x: Tensor, node: Node) -> Tensor:
    return noise_prediction(x, denoise(x, node), node)


def improved_euler(denoise: Denoiser, x: Tensor, e: Tensor, step: Step) -> Tensor:
    """e' of the pseudo improved Euler method; e is the noise at (x, s)."""
    return combine((0.5, e), (0.5, eps(denoise, phi(x, e, step.s, step.t), step.t)))


def runge_kutta(denoise: Denoiser, x: Tensor, e: Tensor, step: Step) -> Tensor:
    """e' of the pseudo Runge-Kutta method, its middle half-way in t; e is the noise at (x, s)."""
    s, t = step.s, step.t
    m = step.grid.schedule.node(0.5 * (s.t + t.t))
    e2 = eps(denoise, phi(x, e, s, m), m)
    e3 = eps(denoise, phi(x, e2, s, m), m)
    e4 = eps(denoise, phi(x, e3, s, t), t)
    return combine((1 / 6, e), (1 / 3, e2), (1 / 3, e3), (1 / 6, e4))


@dataclass(frozen=True)
class PNDM(Solver):
    """`order`: 4 is F-PNDM, 2 is S-PNDM."""

    order: int = 4

    def __post_init__(self) -> None:
        check_known(self, "order", (2, 4), "2 (S-PNDM), 4 (F-PNDM)")
        super().__post_init__()

    @property
    def equivariant(self) -> bool:
        return self.order == 2  # the middle of a Runge-Kutta step is half-way in t

    @property
    def global_order(self) -> float:
        return 2

    def evaluations(self, steps: int) -> int:
        return steps + (self.order - 1) * min(steps, self.order - 1)

    def step(self, denoise: Denoiser, x: Tensor, step: Step, past: State) -> tuple[Tensor, State]:
        e = eps(denoise, x, step.s)
        past = (e, *past)[: self.order]
        if len(past) == self.order:
            e = combine(*weighted(ADAMS_BASHFORTH[self.order], past))
        elif self.order == 2:
            e = improved_euler(denoise, x, e, step)
        else:
            e = runge_kutta(denoise, x, e, step)
        return phi(x, e, step.s, step.t), past


@dataclass(frozen=True)
class PLMS(Solver):
    """As in latent diffusion (arXiv 2112.10752): an improved Euler step, then Adams-Bashforth 2, 3, 4, 4, ..."""

    @property
    def global_order(self) -> float:
        return 2

    def evaluations(self, steps: int) -> int:
        return steps + 1

    def step(self, denoise: Denoiser, x: Tensor, step: Step, past: State) -> tuple[Tensor, State]:
        e = eps(denoise, x, step.s)
        past = (e, *past)[:4]
        first = len(past) == 1
        e = improved_euler(denoise, x, e, step) if first else combine(*weighted(ADAMS_BASHFORTH[len(past)], past))
        return phi(x, e, step.s, step.t), past
