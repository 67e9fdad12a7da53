"""Teleport: the first steps by the closed-form flow of a Gaussian (Wang & Vastola, arXiv 2412.09726), then any solver.

At high noise the score is that of a Gaussian with the data's mean and covariance, whose diffusion ODE is solved
exactly, direction by direction: along an axis of variance v, x - alpha mu scales as sqrt(alpha^2 v + sigma^2). These
steps cost no evaluation; the others cost as `base` does. Where the data is not that Gaussian, `skip` steps of a grid
refined leave an error of first order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.fields import check_number
from evodiff.grid import Spacing, Step, TimeGrid
from evodiff.schedule import Node, NoiseSchedule
from evodiff.solvers.base import Solver, State, Wrapping


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean [C, H, W]; `axes` [K, C H W], orthonormal, with `variances` [K]; `rest` is the variance off these axes.

    Without axes it may be of any images: mean [1, 1, 1].
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    rest: float = 0.0

    def __post_init__(self) -> None:
        if self.axes.shape != (len(self.variances), self.mean.numel()):
            raise ConfigError(
                f"gaussian: axes of shape {tuple(self.axes.shape)} do not fit {len(self.variances)} variances "
                f"and a mean of {tuple(self.mean.shape)}"
            )
        if self.rest < 0 or bool((self.variances < 0).any()):
            raise ConfigError("gaussian: variances must be 0 or above")

    def flow(self, x: Tensor, s: Node, t: Node) -> Tensor:
        """x [B, C, H, W] at s -> the exact solution of the diffusion ODE at t."""

        def gain(v: Any) -> Any:  # of one variance, or of many
            return ((t.alpha**2 * v + t.sigma**2) / (s.alpha**2 * v + s.sigma**2)) ** 0.5

        mean, axes, variances = (a.to(x) for a in (self.mean, self.axes, self.variances))
        rest = gain(self.rest)
        z = (x - s.alpha * mean).flatten(1)
        z = rest * z + ((z @ axes.T) * (gain(variances) - rest)) @ axes if len(axes) else rest * z
        return t.alpha * mean + z.view_as(x)

    @classmethod
    def isotropic(cls, mean: float = 0.0, std: float = 0.5) -> "Gaussian":
        """The same for every pixel: the least that is known of images in [-1, 1], whose std is about 0.5."""
        return cls(torch.full((1, 1, 1), mean, dtype=torch.float64), torch.zeros(0, 1), torch.zeros(0), std**2)


ISOTROPIC = Gaussian.isotropic()


@dataclass(frozen=True)
class Teleport(Wrapping):
    """The first `skip` steps of the grid by `gaussian` (null: mean 0, std 0.5 in every pixel), the others by `base`."""

    gaussian: Gaussian | None = None
    skip: int = 2

    def __post_init__(self) -> None:
        check_number(self, "skip", lambda n: n >= 1 and n == int(n), "a number of steps, at least 1")
        super().__post_init__()
        if self.base.adaptive:
            raise ConfigError(
                f"Teleport: base={type(self.base).__name__} chooses its own steps; possible: any with a grid"
            )

    @property
    def caveat(self) -> str:
        guess = "solver.gaussian=null, so mean 0 and std 0.5: not the data's, as in its paper"
        return "; ".join(filter(None, ("" if self.gaussian else guess, super().caveat)))

    @property
    def global_order(self) -> float:
        return 1  # that of `base` if the data is this Gaussian

    def evaluations(self, steps: int) -> int:
        return self.base.evaluations(steps - self.skip) if steps > self.skip else 0

    def times(self, spacing: Spacing, steps: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        """The spacing's; where `base` has its own way with it, that of `base` from where the Gaussian stops."""
        times = spacing.times(steps, schedule, t_start, t_end)
        if type(self.base).times is Solver.times or steps <= self.skip:
            return times
        rest = self.base.times(spacing, steps - self.skip, schedule, times[self.skip], t_end)
        return [*times[: self.skip], *rest]

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        if step.i == 0:
            self.check(step.grid, x.shape[1:])
        if step.i < self.skip:
            return (self.gaussian or ISOTROPIC).flow(x, step.s, step.t), state
        return self.base.step(denoise, x, Step(self.rest(step.grid), step.i - self.skip), state)

    def rest(self, grid: TimeGrid) -> TimeGrid:
        return TimeGrid(grid.nodes[self.skip :], grid.schedule)

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        """Refuse a Gaussian of other images, and what `base` refuses, before the first evaluation."""
        if self.gaussian and len(self.gaussian.axes) and tuple(self.gaussian.mean.shape) != tuple(shape):
            raise ConfigError(
                f"gaussian is of images {tuple(self.gaussian.mean.shape)}, but the model's are {tuple(shape)}: give "
                f"statistics of this model's data"
            )
        if len(grid) > self.skip:
            super().check(self.rest(grid), shape)
