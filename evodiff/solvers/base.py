"""The solver contract, and the shape that every multistep method of this field has.

A solver is frozen configuration; what evolves is a value that `step` takes and returns. A solver used twice gives
the same twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import SamplingError
from evodiff.fields import check_known, check_types
from evodiff.grid import Spacing, Step, TimeGrid
from evodiff.noise import Noise
from evodiff.schedule import Node, NoiseSchedule
from evodiff.solvers.exponential import DATA, Prediction

State = Any


@dataclass(frozen=True)
class Solver(ABC):
    """One numerical method for the diffusion ODE or SDE."""

    adaptive: ClassVar[bool] = False
    """The solver chooses its own steps inside a grid of one step: NFE is a result, not a budget."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a field of another type than annotated; rules that can say more are checked before."""
        check_types(self)

    @property
    def stochastic(self) -> bool:
        """The solver draws noise on its way: `init` needs it."""
        return False

    @property
    def equivariant(self) -> bool:
        """The solver sees the schedule through kappa = sigma / alpha only: x / alpha on VP is its path on EDM."""
        return True

    @property
    def caveat(self) -> str:
        """What it lacks, as it is set, to be the method of its paper; empty for most."""
        return ""

    @property
    def corrects(self) -> bool:
        """The next step rebuilds the arrival of this one: what another method does to it in between is undone."""
        return False

    @property
    @abstractmethod
    def global_order(self) -> float:
        """Order of convergence p: the error on N steps falls like N^-p. The order test holds the solver to it."""

    def evaluations(self, steps: int) -> int:
        """Network evaluations of `steps` steps. The budget test holds the solver to it."""
        return steps

    def for_budget(self, nfe: int) -> "Solver":
        """This solver for a budget of `nfe` steps' evaluations: singlestep methods choose their orders by it."""
        return self

    def times(self, spacing: Spacing, steps: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        """Where `steps` steps put their ends: the spacing's times, unless the method has its own way with it."""
        return spacing.times(steps, schedule, t_start, t_end)

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        """Raise ConfigError if this solver cannot run on `grid` or on images of `shape` [C, H, W]."""
        return

    def init(self, noise: Noise | None) -> State:
        """The state before the first step. Raises SamplingError if a stochastic solver gets no noise."""
        if self.stochastic and noise is None:
            raise SamplingError(
                f"{type(self).__name__} is stochastic and got no noise; give integrate one, like SeededNoise(seeds)"
            )
        return noise if self.stochastic else ()

    @abstractmethod
    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        """From x at `step.s` to x at `step.t`."""


@dataclass(frozen=True)
class Wrapping(Solver):
    """A method that does something to another solver, and is like it where it does nothing."""

    base: Solver

    @property
    def stochastic(self) -> bool:
        return self.base.stochastic

    @property
    def equivariant(self) -> bool:
        return self.base.equivariant

    @property
    def caveat(self) -> str:
        return self.base.caveat

    @property
    def corrects(self) -> bool:
        return self.base.corrects

    def evaluations(self, steps: int) -> int:
        return self.base.evaluations(steps)

    def for_budget(self, nfe: int) -> Self:
        return replace(self, base=self.base.for_budget(nfe))

    def times(self, spacing: Spacing, steps: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        return self.base.times(spacing, steps, schedule, t_start, t_end)

    def check(self, grid: TimeGrid, shape: Sequence[int]) -> None:
        self.base.check(grid, shape)

    def init(self, noise: Noise | None) -> State:
        return self.base.init(noise)


class Past(NamedTuple):
    """What a multistep method remembers of a node it has seen."""

    node: Node
    x: Tensor
    """The state there, after correction: where the step from here starts."""
    m: Tensor
    """The model term there: the data prediction, unless `model_term` says otherwise."""


@dataclass(frozen=True)
class Multistep(Solver):
    """Evaluate, correct the arrival, remember, predict the next: one evaluation per step.

    `order` is the highest order used; the first steps use what history there is. With `lower_order_final` the
    last steps wind down to first order.
    """

    order: int = 2
    lower_order_final: bool = True
    orders: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __post_init__(self) -> None:
        check_known(self, "order", self.orders)
        super().__post_init__()

    @property
    def corrects(self) -> bool:
        return type(self).correct is not Multistep.correct

    @property
    def memory(self) -> int:
        """How many nodes are remembered."""
        return self.order

    def step(self, denoise: Denoiser, x: Tensor, step: Step, past: State) -> tuple[Tensor, State]:
        m = self.model_term(denoise(x, step.s), x, step.s)
        if past:
            x = self.correct(x, m, step.previous, past)
        past = (*past, Past(step.s, x, m))[-self.memory :]
        return self.predict(step, past), past

    def order_at(self, step: Step) -> int:
        """The order of this step: limited by the history so far and, winding down, by the steps left."""
        order = min(self.order, step.i + 1)
        return min(order, step.left) if self.lower_order_final else order

    @property
    def target(self) -> Prediction:
        """What the method extrapolates: the data prediction here."""
        return DATA

    def model_term(self, D: Tensor, x: Tensor, node: Node) -> Tensor:
        """`target` at the node, from the data prediction D there."""
        return self.target.of(D, x, node)

    def correct(self, x: Tensor, m: Tensor, step: Step, past: tuple[Past, ...]) -> Tensor:
        """The arrival x of `step`, improved by the model term m at x; `past[-1]` is where `step` started."""
        return x

    @abstractmethod
    def predict(self, step: Step, past: tuple[Past, ...]) -> Tensor:
        """From `past[-1].x` at `step.s` to `step.t`; `past` has the newest last."""
