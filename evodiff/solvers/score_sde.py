"""The samplers of Score-SDE (Song et al., arXiv 2011.13456): predictors of the reverse SDE, and Langevin correction.

Weak order 1 for the predictors. With a corrector there is none: Langevin steps of a fixed `snr` keep a bias however
small the predictor's steps are (`verify/orders.py` measures none). One evaluation per predictor step, one more per
corrector step. The score is (alpha D - x) / sigma^2. `final_mean` leaves the noise of the last step out (the released
code's `denoise`), at no evaluation.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.fields import check_number
from evodiff.grid import Step, TimeGrid
from evodiff.noise import Noise
from evodiff.schedule import Node, NoiseSchedule
from evodiff.solvers.base import Solver, State
from evodiff.solvers.linear import add_, combine


def score(denoise: Denoiser, x: Tensor, node: Node) -> Tensor:
    """The gradient of log p at x (Tweedie's formula)."""
    return torch.sub(x, denoise(x, node), alpha=node.alpha).div_(-(node.sigma**2))


def drift(schedule: NoiseSchedule, node: Node) -> tuple[float, float]:
    """f = d log alpha / dt and g^2 = -2 sigma^2 d lam / dt of the SDE dx = f x dt + g dw, by central differences.

    Relative error some 1e-9 on smooth schedules, 1e-7 near alpha = 0; on discrete ones the mean of the slopes on both
    sides of a kink. At a time after which the schedule has none (t = 1 of a cosine or a flow) the difference is
    one-sided.
    """
    d = 1e-6 * node.t
    early = schedule.node(node.t - d)
    try:
        late, span = schedule.node(node.t + d), 2 * d
    except (ValueError, ConfigError):
        late, span = node, d
    f = math.log(late.alpha / early.alpha) / span
    return f, -2 * node.sigma**2 * (late.lam - early.lam) / span


@dataclass(frozen=True)
class Predictor(Solver):
    """One step of a discretised reverse SDE: its mean and the standard deviation of its noise."""

    final_mean: bool = False

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def equivariant(self) -> bool:
        return False  # x / alpha takes other steps than on EDM

    @property
    def global_order(self) -> float:
        return 1

    def step(self, denoise: Denoiser, x: Tensor, step: Step, noise: State) -> tuple[Tensor, State]:
        mean, g = self.moments(x, score(denoise, x, step.s), step)
        if self.final_mean and step.left == 1:
            return mean, noise
        return add_(mean, (g, noise.normal(x))), noise

    @abstractmethod
    def moments(self, x: Tensor, score: Tensor, step: Step) -> tuple[Tensor, float]: ...


@dataclass(frozen=True)
class ReverseDiffusion(Predictor):
    """The forward kernel x_s = a x_t + b z, reversed: x_t = (2 - a) x_s + b^2 score + b z (algorithms 2 and 3)."""

    def moments(self, x: Tensor, score: Tensor, step: Step) -> tuple[Tensor, float]:
        a = step.s.alpha / step.t.alpha
        b2 = -(step.s.sigma**2) * math.expm1(-2 * step.h)
        return combine((2 - a, x), (b2, score)), math.sqrt(b2)


@dataclass(frozen=True)
class EulerMaruyama(Predictor):
    """x_t = x_s + (f x - g^2 score) dt + g sqrt(-dt) z, f and g at s (appendix D and the released code)."""

    def moments(self, x: Tensor, score: Tensor, step: Step) -> tuple[Tensor, float]:
        f, g2 = drift(step.grid.schedule, step.s)
        dt = step.t.t - step.s.t
        return combine((1 + f * dt, x), (-g2 * dt, score)), math.sqrt(-g2 * dt)


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """In each step `corrector_steps` steps of Langevin dynamics at s (algorithms 4 and 5), then `predictor` to t.

    Without a predictor (null) x stays as it is: annealed Langevin dynamics.

    x + e score + sqrt(2 e) z with e = 2 a^2 (snr |z| / |score|)^2, a = alpha_s / alpha_t. The norms are those of each
    sample; the released code takes their mean over the batch, so that images depend on their batch.
    """

    predictor: Solver | None = field(default_factory=ReverseDiffusion)
    snr: float = 0.16
    corrector_steps: int = 1

    def __post_init__(self) -> None:
        check_number(self, "snr", lambda snr: snr > 0, "above 0")
        possible = "whole numbers, at least 1; for none use the predictor alone"
        check_number(self, "corrector_steps", lambda n: n >= 1 and n == int(n), possible)
        if self.predictor is not None and (not isinstance(self.predictor, Solver) or self.predictor.adaptive):
            raise ConfigError(
                f"PredictorCorrector: predictor={type(self.predictor).__name__} does not step along a grid; possible: "
                f"a solver, like evodiff.solvers.score_sde.ReverseDiffusion, or null"
            )
        if self.predictor is not None and self.predictor.corrects:
            raise ConfigError(
                f"PredictorCorrector: predictor={type(self.predictor).__name__} has a corrector or steps from an "
                f"earlier state, which would undo the Langevin steps; take another one, or turn its corrector off"
            )
        super().__post_init__()

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def equivariant(self) -> bool:
        return False  # the corrector's step is in alpha_s / alpha_t

    @property
    def global_order(self) -> float:
        return 0  # the corrector's bias stays, however many steps there are

    def evaluations(self, steps: int) -> int:
        return self.corrector_steps * steps + (self.predictor.evaluations(steps) if self.predictor else 0)

    @property
    def caveat(self) -> str:
        return self.predictor.caveat if self.predictor else ""

    def for_budget(self, nfe: int) -> "PredictorCorrector":
        if self.predictor:
            for steps in range(1, nfe // self.corrector_steps + 1):
                left = nfe - self.corrector_steps * steps
                predictor = self.predictor.for_budget(left)
                if predictor.evaluations(steps) == left:
                    return replace(self, predictor=predictor)
        return self

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        if self.predictor:
            self.predictor.check(grid, shape)

    def init(self, noise: Noise | None) -> State:
        return super().init(noise), self.predictor.init(noise) if self.predictor else ()

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        noise, past = state
        for _ in range(self.corrector_steps):
            x = self.langevin(score(denoise, x, step.s), x, noise.normal(x), step)
        if self.predictor:
            x, past = self.predictor.step(denoise, x, step, past)
        return x, (noise, past)

    def langevin(self, score: Tensor, x: Tensor, z: Tensor, step: Step) -> Tensor:
        a = step.s.alpha / step.t.alpha
        e = 2 * a**2 * (self.snr * norms(z) / norms(score)) ** 2
        return combine((1.0, x), (e, score), ((2 * e).sqrt(), z))


def norms(x: Tensor) -> Tensor:
    """L2 norm of each sample, [B, 1, ...]."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
