"""Time grids: the nodes a solver visits, how they are spaced, and how many of them a budget of NFE allows."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from evodiff.errors import BudgetError, ConfigError
from evodiff.paths import resolve
from evodiff.schedule import Node, NoiseSchedule, VariancePreserving

if TYPE_CHECKING:
    from evodiff.solvers.base import Solver


@dataclass(frozen=True)
class TimeGrid:
    """Nodes t_0 > t_1 > ... > t_N of a schedule: N steps from noise to data."""

    nodes: tuple[Node, ...]
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        if len(self.nodes) < 2:
            raise ConfigError(f"a time grid needs at least 2 nodes, this one has {len(self.nodes)}")
        for a, b in zip(self.nodes, self.nodes[1:], strict=False):
            if not a.t > b.t:
                raise ConfigError(f"the times of a grid must fall strictly, but {a.t:.6g} is followed by {b.t:.6g}")

    @classmethod
    def at(cls, times: list[float], schedule: NoiseSchedule) -> "TimeGrid":
        return cls(tuple(schedule.node(t) for t in times), schedule)

    def __len__(self) -> int:
        """The number of steps N."""
        return len(self.nodes) - 1

    def steps(self) -> Iterator["Step"]:
        return (Step(self, i) for i in range(len(self)))


@dataclass(frozen=True)
class Step:
    """Step i of a grid: from node s to node t."""

    grid: TimeGrid
    i: int

    @property
    def s(self) -> Node:
        return self.grid.nodes[self.i]

    @property
    def t(self) -> Node:
        return self.grid.nodes[self.i + 1]

    @cached_property
    def h(self) -> float:
        """Step in half-log-SNR, lam_t - lam_s > 0."""
        return self.t.lam - self.s.lam

    @property
    def left(self) -> int:
        """Steps still to do, this one included: 1 in the last step."""
        return len(self.grid) - self.i

    @property
    def previous(self) -> "Step":
        """The step that arrived at s."""
        if self.i == 0:
            raise IndexError("the first step has no previous one")
        return Step(self.grid, self.i - 1)

    def at(self, r: float) -> Node:
        """The node inside the step whose half-log-SNR is lam_s + r h."""
        return self.grid.schedule.node(self.grid.schedule.t_at(self.s.lam + r * self.h))


class Spacing(Protocol):
    """Where n steps between t_start and t_end put their n + 1 times."""

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]: ...


@dataclass(frozen=True)
class Exact:
    """`spacing`, held to n + 1 times for n steps: a run is named by the budget it asked for. Raises BudgetError."""

    spacing: Spacing
    adaptive: bool = False
    """The one step asked for is that of an adaptive solver."""

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        times = self.spacing.times(n, schedule, t_start, t_end)
        if len(times) != n + 1:
            remedy = f"Let its times(n, ...) give n + 1 of them, or set nfe to what {len(times) - 1} steps cost."
            if self.adaptive:
                remedy = "Give the first and the last only: the solver chooses its own steps between them."
            raise BudgetError(
                f"the grid {type(self.spacing).__name__} gives {len(times)} times, but {n} steps need {n + 1}. {remedy}"
            )
        return times


def check_within(value: float, name: str, least: float, most: float) -> None:
    """Beyond these a power of a noise level, or a sum with it, is no longer a number that can be told from others."""
    if not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"grid: {name}={value} is impossible; possible: numbers from {least:g} to {most:g}")


@dataclass(frozen=True)
class LogSNR:
    """Uniform in half-log-SNR (DPM-Solver, arXiv 2206.00927, section 3.1)."""

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        a, b = schedule.node(t_start).lam, schedule.node(t_end).lam
        inner = [schedule.t_at(a + (b - a) * i / n) for i in range(1, n)]
        return [t_start, *inner, t_end]


@dataclass(frozen=True)
class Karras:
    """Uniform in kappa^(1/rho), kappa = sigma/alpha (EDM, arXiv 2206.00364, eq. 5)."""

    rho: float = 7.0

    def __post_init__(self) -> None:
        check_within(self.rho, "rho", 0.1, 1e6)

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        a, b = (schedule.node(t).kappa ** (1 / self.rho) for t in (t_start, t_end))
        inner = [schedule.t_at(-self.rho * math.log(a + (b - a) * i / n)) for i in range(1, n)]
        return [t_start, *inner, t_end]


@dataclass(frozen=True)
class TimeUniform:
    """Uniform in t^(1/power): power 1 is uniform time, 2 is DDIM's quadratic spacing (arXiv 2010.02502, D.2)."""

    power: float = 1.0

    def __post_init__(self) -> None:
        check_within(self.power, "power", 0.1, 1e6)

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        a, b = t_start ** (1 / self.power), t_end ** (1 / self.power)
        inner = [(a + (b - a) * i / n) ** self.power for i in range(1, n)]
        return [t_start, *inner, t_end]


@dataclass(frozen=True)
class NSR:
    """Uniform in log(kappa + k kappa_end) (SciRE-Solver, arXiv 2308.07896, appendix; k from 2 to 7 is advised).

    k = 0 is uniform in half-log-SNR.
    """

    k: float = 3.1

    def __post_init__(self) -> None:
        check_within(self.k, "k", 0, 1e6)

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        shift = self.k * schedule.node(t_end).kappa
        a, b = (math.log(schedule.node(t).kappa + shift) for t in (t_start, t_end))
        inner = [schedule.t_at(-math.log(math.exp(a + (b - a) * i / n) - shift)) for i in range(1, n)]
        return [t_start, *inner, t_end]


@dataclass(frozen=True)
class Optimised:
    """A published list of kappa = sigma/alpha, log-linear between its entries for other numbers of steps.

    The way of Align Your Steps (arXiv 2404.14507). The list has its own ends: others are refused.
    """

    kappas: tuple[float, ...]

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.kappas, self.kappas[1:], strict=False))
        if len(self.kappas) < 2 or not falling or not self.kappas[-1] > 0:
            raise ConfigError(f"grid: kappas must be at least two falling numbers above 0, not {list(self.kappas)}")

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        if (t_start, t_end) != (schedule.t_start, schedule.t_end):
            raise ConfigError(
                f"grid: a published list has its own ends, so t_start={t_start:g} and t_end={t_end:g} cannot be kept. "
                f"Leave them out, or choose another grid, like grid=logsnr."
            )
        high, low = schedule.node(schedule.t_start).kappa, schedule.node(schedule.t_end).kappa
        if self.kappas[0] > high * 1.01 or self.kappas[-1] < low * 0.99:  # published with three digits
            raise ConfigError(
                f"grid: kappas from {self.kappas[0]:g} to {self.kappas[-1]:g} do not fit this model's schedule, "
                f"which has {high:.4g} to {low:.4g}: choose another grid, like grid=logsnr"
            )
        logs = [math.log(kappa) for kappa in self.kappas]
        times = []
        for i in range(n + 1):
            place = i * (len(logs) - 1) / n
            left = min(int(place), len(logs) - 2)
            log_kappa = logs[left] + (place - left) * (logs[left + 1] - logs[left])
            times.append(schedule.t_at(-min(max(log_kappa, math.log(low)), math.log(high))))
        return times


@dataclass(frozen=True)
class Listed:
    """These falling times, for one number of steps. Other ends than theirs, or the schedule's, are refused."""

    listed: tuple[float, ...]

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        first, last = ends(schedule, self.listed[0], self.listed[-1])
        if t_start not in (first, schedule.t_start) or t_end not in (last, schedule.t_end):
            raise ConfigError(
                f"grid: the times run from {first:g} to {last:g}, so t_start={t_start:g} and t_end={t_end:g} cannot be "
                f"kept. Leave them out."
            )
        return list(self.listed)


@dataclass(frozen=True)
class FromFile:
    """Times from a JSON file, for grids that are computed or optimised (`evodiff gits`, AYS, DMN): a list of falling
    numbers, or a mapping from the number of steps to such a list.

    They must run from t_start to t_end, within 1 %: a file made for another schedule is refused. A relative path
    may start at the project's root.
    """

    path: str

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"grid: path={self.path!r} is impossible; expected the name of a JSON file")

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        try:
            content = json.loads(resolve(self.path).read_text())
        except (OSError, ValueError) as e:
            raise ConfigError(f"grid file {self.path}: {e}. Expected JSON: a list of falling times.") from e
        times = content.get(str(n)) if isinstance(content, dict) else content
        if times is None:
            raise ConfigError(f"grid file {self.path} has no grid of {n} steps; it has {', '.join(content) or 'none'}")
        if not isinstance(times, list) or not all(type(t) in (int, float) for t in times):
            raise ConfigError(f"grid file {self.path}: expected a list of numbers")
        if len(times) != n + 1:
            raise ConfigError(f"grid file {self.path} holds {len(times) - 1} steps, but {n} are asked for")
        for a, b in zip(times, [*times[1:], 0], strict=True):
            if not a > b:
                remedy = ". For a last step to 0 set denoise_final=true and leave the 0 out" if a == 0 else ""
                raise ConfigError(
                    f"grid file {self.path}: times must fall strictly and end above 0; {a} is before {b}{remedy}"
                )
        if times[0] > schedule.t_start * (1 + 1e-9):
            raise ConfigError(
                f"grid file {self.path} starts at {times[0]:.6g}, above the schedule's {schedule.t_start:.6g}"
            )
        if not (math.isclose(times[0], t_start, rel_tol=0.01) and math.isclose(times[-1], t_end, rel_tol=0.01)):
            raise ConfigError(
                f"grid file {self.path} runs from {times[0]:g} to {times[-1]:g}, but the run from t_start={t_start:g} "
                f"to t_end={t_end:g}: give a file of this schedule, or set t_start and t_end to the file's"
            )
        return [float(t) for t in times]


FARTHEST = 1e-12
"""Times nearer to 0, or to infinity, have squares and powers that are no numbers."""


def ends(schedule: NoiseSchedule, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    """The times between which to integrate: the schedule's own unless given. Raises ConfigError for impossible ones."""
    t_start = schedule.t_start if t_start is None else t_start
    t_end = schedule.t_end if t_end is None else t_end
    if not 1 / FARTHEST > t_start > t_end > FARTHEST:
        raise ConfigError(
            f"t_start={t_start} must be above t_end={t_end}, t_end above {FARTHEST:g}, and t_start below "
            f"{1 / FARTHEST:g}; for a last step to 0 set denoise_final=true"
        )
    if isinstance(schedule, VariancePreserving) and t_start > 1:
        raise ConfigError(f"t_start={t_start} is above 1, the last time of a {type(schedule).__name__} schedule")
    return t_start, t_end


def grid_for(
    nfe: int | None,
    solver: "Solver",
    spacing: Spacing,
    schedule: NoiseSchedule,
    *,
    denoise_final: bool = False,
    t_start: float | None = None,
    t_end: float | None = None,
) -> TimeGrid:
    """The grid on which `solver` spends exactly `nfe` evaluations, a final denoising call included.

    An adaptive solver takes nfe=None and gets one step. Raises BudgetError, naming the nearest possible NFE, if no
    number of steps costs exactly `nfe`, and if the spacing gives another number of times than it is asked for.
    """
    t_start, t_end = ends(schedule, t_start, t_end)
    steps = steps_for(nfe, solver, denoise_final)
    return TimeGrid.at(solver.times(Exact(spacing, solver.adaptive), steps, schedule, t_start, t_end), schedule)


MOST_STEPS = 100_000
"""More than any budget has; a solver whose cost does not grow would be asked for ever."""


def steps_for(nfe: int | None, solver: "Solver", denoise_final: bool) -> int:
    """How many steps of `solver`, and a final denoising call if asked for, spend exactly `nfe` evaluations."""
    name = type(solver).__name__
    if solver.adaptive:
        if nfe is not None:
            raise BudgetError(
                f"{name} chooses its own steps, so nfe={nfe} cannot be set. Use nfe=null; set rtol and atol."
            )
        return 1
    if nfe is None:
        raise BudgetError(f"{name} needs a budget: nfe=null is for adaptive solvers. Set nfe to a number above 0.")
    costs: list[int] = []
    while not costs or costs[-1] < nfe:
        if len(costs) == MOST_STEPS:
            raise BudgetError(
                f"{name} costs {costs[-1]} evaluations in {MOST_STEPS:,} steps: nfe={nfe} is out of reach."
            )
        costs.append(solver.evaluations(len(costs) + 1) + denoise_final)
    if costs[-1] != nfe:
        nearest = " or ".join(str(c) for c in costs[-2:])
        raise BudgetError(
            f"{name} cannot spend exactly nfe={nfe} (denoise_final={denoise_final}). Nearest: nfe={nearest}."
        )
    return len(costs)
