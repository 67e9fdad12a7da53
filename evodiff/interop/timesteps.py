"""Where a scheduler's configuration and the call of `set_timesteps` put the nodes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from evodiff.api import named_grid
from evodiff.errors import ConfigError
from evodiff.grid import Karras, LogSNR, Spacing, TimeGrid, TimeUniform
from evodiff.interop.process import VP, Process, Straight
from evodiff.schedule import Node, NoiseSchedule


class Nodes(NamedTuple):
    """The nodes of a run; with `to_zero` the data prediction at the last one is the result."""

    all: tuple[Node, ...]
    to_zero: bool

    @property
    def evaluated(self) -> tuple[Node, ...]:
        return self.all if self.to_zero else self.all[:-1]


def choose_nodes(
    config: Mapping[str, Any],
    process: Process,
    n: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    shift: float,
) -> Nodes:
    """From one of: the number of evaluations, the timestep of each, or noise levels. Raises ConfigError."""
    if sum(given is not None for given in (n, timesteps, sigmas)) != 1:
        raise ConfigError("set_timesteps needs one of num_inference_steps, timesteps and sigmas, and only one.")
    to_zero = config["final_sigmas_type"] == "zero"
    if sigmas is not None:
        times, to_zero = times_of_sigmas(process, [float(sigma) for sigma in sigmas], to_zero, shift)
    elif timesteps is not None:
        check_trained(process, timesteps)
        levels = [process.t_of_timestep(float(timestep)) for timestep in timesteps]
        times = with_end(process, first_below_1(process, levels), to_zero)
    else:
        assert n is not None
        times = times_of_number(config, process, n, to_zero, shift)
    nodes = tuple(process.schedule.node(t) for t in times)
    if len(nodes) > 1:
        TimeGrid(nodes, process.schedule)  # refuses times that do not fall
    chosen = Nodes(nodes, to_zero)
    if not chosen.evaluated:  # the result would be the noise
        raise ConfigError("set_timesteps leaves no evaluation: give one timestep at least, or two sigmas that fall.")
    return chosen


def times_of_number(
    config: Mapping[str, Any], process: Process, n: int, to_zero: bool, shift: float = 1.0
) -> list[float]:
    if n < 1 or n % 1:
        raise ConfigError(f"num_inference_steps={n} is impossible; possible: whole numbers of at least 1.")
    n = int(n)
    spacing = spacing_of(config, isinstance(process, Straight), shift)
    if spacing is None:
        if isinstance(process, VP) and config["timestep_spacing"] != "linspace":
            trained = math.floor(process.timestep(process.schedule.t_start) + 1e-6) + 1  # less with lambda_min_clipped
            listed = listed_timesteps(config["timestep_spacing"], n, trained, config["steps_offset"])
            return with_end(process, [process.t_of_timestep(timestep) for timestep in listed], to_zero)
        spacing = TimeUniform()
    schedule, steps = process.schedule, n - to_zero
    return spacing.times(steps, schedule, schedule.t_start, schedule.t_end) if steps else [schedule.t_start]


def times_of_sigmas(process: Process, sigmas: list[float], to_zero: bool, shift: float) -> tuple[list[float], bool]:
    """The last of n + 1 sigmas is where the last step ends; of a flow, n of them are those of the evaluations."""
    ends_at_0 = bool(sigmas) and sigmas[-1] == 0
    above_0 = sigmas[:-1] if ends_at_0 else sigmas
    if not above_0 or min(above_0) <= 0:
        raise ConfigError(f"sigmas={sigmas} is impossible: they must fall, and only the last may be 0.")
    flow = isinstance(process, Straight)
    times = first_below_1(process, [process.t_of_sigma(shifted(sigma, shift) if flow else sigma) for sigma in above_0])
    if ends_at_0 or not flow:
        # published lists have three digits: AYS begins at 14.615, where Stable Diffusion's ends at 14.6146
        check_trained(process, [process.timestep(t) for t in (times if ends_at_0 else times[:-1])], slack=0.5)
        return times, ends_at_0
    return with_end(process, times, to_zero), to_zero


def first_below_1(process: Process, times: list[float]) -> list[float]:
    """The times of a flow that begins without any signal, at a first one of 1 that is not beyond the second."""
    first = process.schedule.t_start
    if isinstance(process, Straight) and len(times) > 1 and times[0] == first < times[1] < 1:
        return [(1 + times[1]) / 2, *times[1:]]
    return times


def check_trained(process: Process, timesteps: Sequence[float], slack: float = 0.0) -> None:
    """Raise ConfigError for a timestep beyond the network's; those of EDM are logarithms and have no last."""
    if not isinstance(process, VP | Straight):
        return
    last = process.num_timesteps - isinstance(process, VP)
    for timestep in timesteps:
        if not -slack <= timestep <= last + slack:
            raise ConfigError(
                f"timestep {float(timestep):g} is outside the trained ones, 0 to {last}: give falling numbers in there."
            )


def with_end(process: Process, times: list[float], to_zero: bool) -> list[float]:
    """Times of the evaluations, and unless the last one is the result, the end of the schedule. Raises ConfigError."""
    end = process.schedule.t_end
    if times and times[-1] <= end and not to_zero:
        raise ConfigError(
            f"the last evaluation, at timestep {process.timestep(times[-1]):.6g}, is no earlier than the end of the "
            f'last step, {process.timestep(end):.6g}: leave it out, or set final_sigmas_type="zero", with which it is '
            f"the result."
        )
    return times if to_zero else [*times, end]


@dataclass(frozen=True)
class Shifted:
    """Uniform times of a flow, moved to t' = shift t / (1 + (shift - 1) t) (arXiv 2403.03206, eq. 23)."""

    shift: float = 1.0

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        return [shifted(t, self.shift) for t in TimeUniform().times(n, schedule, t_start, t_end)]


@dataclass(frozen=True)
class Beta:
    """kappa at the quantiles of a Beta(a, a) law between its ends (arXiv 2407.12173)."""

    a: float = 0.6
    points: int = 20_001

    def times(self, n: int, schedule: NoiseSchedule, t_start: float, t_end: float) -> list[float]:
        high, low = schedule.node(t_start).kappa, schedule.node(t_end).kappa
        angle = np.linspace(0, np.pi / 2, self.points)  # of x = sin^2: the density has no poles there
        density = (np.sin(angle) * np.cos(angle)) ** (2 * self.a - 1)
        below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
        quantiles = np.sin(np.interp([1 - i / n for i in range(1, n)], below / below[-1], angle)) ** 2
        inner = [schedule.t_at(-math.log(low + (high - low) * float(x))) for x in quantiles]
        return [t_start, *inner, t_end]


def shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def spacing_of(config: Mapping[str, Any], flow: bool, shift: float) -> Spacing | None:
    """The spacing that a configuration names or its flags ask for. Raises ConfigError."""
    if config["spacing"] is not None:
        return named_grid(config["spacing"])
    if config["use_beta_sigmas"]:
        return Beta()
    if config["use_karras_sigmas"]:
        return Karras()
    if config["use_exponential_sigmas"] or config["use_lu_lambdas"]:
        return LogSNR()
    return Shifted(shift) if flow else None


def listed_timesteps(kind: str, n: int, num_timesteps: int, offset: int) -> list[float]:
    """diffusers' `leading` and `trailing` choice of n of the timesteps 0 to num_timesteps - 1, falling."""
    if kind == "leading":
        return [float(k * (num_timesteps // (n + 1)) + offset) for k in range(n, 0, -1)]
    return [num_timesteps * (1 - k / n) - 1 for k in range(n)]
