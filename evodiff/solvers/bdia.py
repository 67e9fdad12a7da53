"""BDIA-DDIM: bi-directional integration approximation, an exactly invertible sampler (Zhang et al., arXiv 2307.10829).

One evaluation per step. With d(s -> t | x) the DDIM increment from x at s to t, and x_- the state before x,

    x_+ = gamma x_- + (1 - gamma) x - gamma d(s -> before | x) + d(s -> after | x)

which is linear in x_- : two states in a row, x and x_+, give back x_- (`Inversion`). gamma = 0 is DDIM, gamma = 1 the
paper's first form. Order 1, and 2 for gamma = 1. The paper has x; here it is x / alpha by default, which is the same on
EDM and makes VP and EDM agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError, SamplingError
from evodiff.fields import check_number, refuse
from evodiff.grid import Step, TimeGrid
from evodiff.noise import Noise
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import DATA, ddim
from evodiff.solvers.linear import combine


@dataclass(frozen=True)
class BDIA(Solver):
    """From noise to data. With `pair`, from (x_0, x_1) to (x_{N-1}, x_N), stacked first: [2, B, C, H, W].

    Without `scaled` the formula is that of the paper in x.
    """

    gamma: float = 1.0
    scaled: bool = True
    pair: bool = False

    def __post_init__(self) -> None:
        check_number(self, "gamma", lambda gamma: 0 <= gamma <= 1, "0 (DDIM) to 1")
        super().__post_init__()

    @property
    def equivariant(self) -> bool:  # type: ignore[override]
        return self.scaled

    @property
    def global_order(self) -> float:
        return 2 if self.gamma == 1 else 1

    @property
    def corrects(self) -> bool:  # x_+ begins at the state before x
        return self.gamma > 0

    def evaluations(self, steps: int) -> int:
        return steps - self.pair

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        if self.pair:
            refuse(self, "pair", "false, for a run starts from one state of noise; true for integrate on two states")

    def init(self, noise: Noise | None) -> State:
        return None

    def step(self, denoise: Denoiser, x: Tensor, step: Step, before: State) -> tuple[Tensor, State]:
        if self.pair:
            check_pair(x)
            return (torch.stack([x[1], self.advance(denoise, x[0], x[1], step)]) if step.i else x), before
        if before is None:
            return ddim(x, denoise(x, step.s), step.s, step.t), x
        return self.advance(denoise, before, x, step), x

    def advance(self, denoise: Denoiser, before: Tensor, x: Tensor, step: Step) -> Tensor:
        """x_+ from x_- and x over `step`, which has a previous one."""
        w_before, w_x, w_D = self.weights(step)
        return combine((w_before, before), (w_x, x), (w_D, denoise(x, step.s)))

    def retreat(self, denoise: Denoiser, x: Tensor, after: Tensor, step: Step) -> Tensor:
        """x_- from x and x_+: `advance` undone."""
        w_before, w_x, w_D = self.weights(step)
        return combine((1 / w_before, after), (-w_x / w_before, x), (-w_D / w_before, denoise(x, step.s)))

    def weights(self, step: Step) -> tuple[float, float, float]:
        """Of x_-, x and D in x_+: gamma, in the units of x, and DDIM to t less gamma times DDIM back."""
        gamma = self.gamma * step.t.alpha / step.previous.s.alpha if self.scaled else self.gamma
        (x_t, D_t), (x_back, D_back) = (DATA.first_order_weights(step.s, node) for node in (step.t, step.previous.s))
        return gamma, x_t - gamma * x_back, D_t - gamma * D_back


@dataclass(frozen=True)
class Inversion(Solver):
    """BDIA from data back to noise: the pair (x_{N-1}, x_N) to (x_0, x_1), [2, B, C, H, W], on the sampler's own grid.

    Exact up to rounding, which each step multiplies by about 1/gamma. One evaluation per step but one.
    """

    of: Solver

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self.of).__name__
        if self.of.stochastic:
            raise ConfigError(f"Inversion: of={name} is stochastic: its noise cannot be inverted; possible: bdia")
        if not isinstance(self.of, BDIA) or self.of.gamma == 0:
            raise ConfigError(f"Inversion: of={name} has no exact inverse; possible: bdia with gamma above 0")

    @property
    def global_order(self) -> float:
        return self.of.global_order

    def evaluations(self, steps: int) -> int:
        return steps - 1

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        raise ConfigError("Inversion: a run starts from noise; possible: integrate on two states, [2, B, C, H, W]")

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        assert isinstance(self.of, BDIA)
        check_pair(x)
        undone = Step(step.grid, len(step.grid) - 1 - step.i)
        return (torch.stack([self.of.retreat(denoise, x[0], x[1], undone), x[0]]) if undone.i else x), state


def check_pair(x: Tensor) -> None:
    if x.ndim != 5 or len(x) != 2:
        raise SamplingError(
            f"BDIA: two states in a row are needed, [2, B, C, H, W], not {tuple(x.shape)}; from noise set pair=false"
        )
