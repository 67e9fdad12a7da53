"""Noise schedules: x_t = alpha_t x_0 + sigma_t z, and the half-log-SNR lam = log(alpha / sigma) that orders them."""

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from evodiff.errors import ConfigError
from evodiff.fields import check_number


class Node(NamedTuple):
    """A point of a noise schedule: x_t = alpha x_0 + sigma z. Python floats: double precision, and no GPU sync."""

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """Half-log-SNR log(alpha / sigma); +inf at sigma 0."""
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf

    @property
    def kappa(self) -> float:
        """Noise-to-signal ratio sigma / alpha: the time of the EDM schedule."""
        return self.sigma / self.alpha


class NoiseSchedule(Protocol):
    """What solvers and grids ask of a schedule. `t_start > t_end` is the range that samplers integrate over."""

    @property
    def t_start(self) -> float: ...
    @property
    def t_end(self) -> float: ...
    def node(self, t: float) -> Node: ...
    def t_at(self, lam: float) -> float: ...


def check_times(schedule: NoiseSchedule) -> None:
    """Raises ConfigError unless t_start > t_end > 0."""
    check_number(schedule, "t_end", lambda t: t > 0, "a number above 0; for a last step to 0 set denoise_final=true")
    check_number(schedule, "t_start", lambda t: t > schedule.t_end, f"a number above t_end, {schedule.t_end:g}")


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = t (Karras et al., arXiv 2206.00364)."""

    t_start: float = 80.0
    t_end: float = 0.002

    def __post_init__(self) -> None:
        check_times(self)

    def node(self, t: float) -> Node:
        return Node(t, 1.0, t)

    def t_at(self, lam: float) -> float:
        return math.exp(-lam)


@dataclass(frozen=True)
class Flow:
    """alpha = 1 - t, sigma = t: the straight path of flow matching (arXiv 2210.02747) and rectified flow (2209.03003).

    At t = 1 there is no signal and kappa is infinite: sampling starts a little below.
    """

    t_start: float = 0.999
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        check_times(self)
        check_number(self, "t_start", lambda t: t < 1, "below 1, where there is no signal")

    def node(self, t: float) -> Node:
        if not 0 < t < 1:
            raise ConfigError(f"t={t:.6g} is outside the times of a flow that samplers can use: above 0, below 1.")
        return Node(t, 1 - t, t)

    def t_at(self, lam: float) -> float:
        return math.exp(-_log1p_exp(lam))


LEAST_LOG_ALPHA = -16.0
"""Below it, what a network says is lost in the rounding of float32."""


class VariancePreserving(ABC):
    """alpha^2 + sigma^2 = 1, given by log alpha(t) and its inverse."""

    t_end: float

    @abstractmethod
    def log_alpha(self, t: float) -> float: ...

    @abstractmethod
    def t_at_log_alpha(self, log_alpha: float) -> float: ...

    def node(self, t: float) -> Node:
        log_alpha = self.log_alpha(t)
        if log_alpha > 0:
            raise ConfigError(
                f"t={t:.6g} is below the times of this schedule, which ends at {self.t_end:.6g}: set t_start and t_end."
            )
        if log_alpha < LEAST_LOG_ALPHA:
            raise ConfigError(f"at t={t:.6g} this schedule has no signal: set t_start a little below, like 0.9946.")
        return Node(t, math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))

    def t_at(self, lam: float) -> float:
        return self.t_at_log_alpha(-0.5 * _log1p_exp(-2 * lam))


@dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """beta(t) = beta_min + t (beta_max - beta_min) on t in (0, 1] (Song et al., arXiv 2011.13456, eq. 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        check_times(self)
        check_number(self, "t_start", lambda t: t <= 1, "1 or below")
        check_number(self, "beta_min", lambda _: True, "a number")
        rate = "a number that leaves beta(t) above 0 from t_end to t_start"
        check_number(self, "beta_max", lambda _: min(map(self._beta, (self.t_end, self.t_start))) > 0, rate)

    def _beta(self, t: float) -> float:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: float) -> float:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def t_at_log_alpha(self, log_alpha: float) -> float:
        # the root of a quadratic, in the form without cancellation for t -> 0
        slope = self.beta_max - self.beta_min
        if slope == 0:  # nothing quadratic is left
            return -2 * log_alpha / self.beta_min
        c = -4 * slope * log_alpha
        return c / (math.sqrt(self.beta_min**2 + c) + self.beta_min) / slope


@dataclass(frozen=True)
class CosineVP(VariancePreserving):
    """alpha(t) = cos((t + s)/(1 + s) pi/2) / cos(s/(1 + s) pi/2) (Nichol & Dhariwal, arXiv 2102.09672, eq. 17).

    t_start = 0.9946 keeps the largest noise finite, as DPM-Solver (arXiv 2206.00927, appendix D) does.
    """

    s: float = 0.008
    t_start: float = 0.9946
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        check_times(self)
        check_number(self, "t_start", lambda t: t < 1, "below 1, where there is no signal")
        check_number(self, "s", lambda s: s >= 0, "0 or above")

    def log_alpha(self, t: float) -> float:
        return math.log(math.cos((t + self.s) / (1 + self.s) * math.pi / 2)) - self._log_alpha_0

    def t_at_log_alpha(self, log_alpha: float) -> float:
        angle = math.acos(min(1.0, math.exp(log_alpha + self._log_alpha_0)))
        return 2 * (1 + self.s) / math.pi * angle - self.s

    @property
    def _log_alpha_0(self) -> float:
        return math.log(math.cos(self.s / (1 + self.s) * math.pi / 2))


@dataclass(frozen=True)
class DiscreteVP(VariancePreserving):
    """A discrete-time DDPM schedule: times (i + 1)/N, and log alpha piecewise linear in t between them.

    `log_alphas[i] = 0.5 sum_{j <= i} log(1 - beta_j)`; outside the first and last time the end pieces go on
    (DPM-Solver, arXiv 2206.00927, appendix B). `t_end` is the first time, 1/N, unless given. Raises ConfigError.
    """

    log_alphas: tuple[float, ...]
    t_start: float = 1.0
    t_end: float = math.nan
    times: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = tuple(float(v) for v in self.log_alphas)
        if len(values) < 2 or not all(a > b for a, b in itertools.pairwise(values)):
            raise ConfigError(
                f"DiscreteVP: {len(values)} log_alphas are no schedule: expected two or more strictly falling numbers, "
                f"0.5 sum log(1 - beta) of betas between 0 and 1."
            )
        object.__setattr__(self, "log_alphas", values)
        object.__setattr__(self, "times", tuple((i + 1) / len(values) for i in range(len(values))))
        if math.isnan(self.t_end):
            object.__setattr__(self, "t_end", self.times[0])

    @classmethod
    def from_betas(cls, betas: Sequence[float], **times: float) -> "DiscreteVP":
        total, log_alphas = 0.0, []
        for i, beta in enumerate(betas):
            if not 0 < float(beta) < 1:
                raise ConfigError(f"DiscreteVP: beta {i} is {float(beta):g}; expected numbers above 0 and below 1.")
            total += 0.5 * math.log1p(-float(beta))
            log_alphas.append(total)
        return cls(tuple(log_alphas), **times)

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_timesteps: int = 1000, **times: float
    ) -> "DiscreteVP":
        """The schedule of DDPM (arXiv 2006.11239): betas evenly spaced."""
        step = (beta_end - beta_start) / max(num_timesteps - 1, 1)
        return cls.from_betas([beta_start + i * step for i in range(num_timesteps)], **times)

    def log_alpha(self, t: float) -> float:
        return _interpolate(t, self.times, self.log_alphas)

    def t_at_log_alpha(self, log_alpha: float) -> float:
        return _interpolate(log_alpha, self.log_alphas[::-1], self.times[::-1])


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear through rising (xs, ys); the first and last piece go on outside."""
    i = min(max(bisect.bisect_right(xs, x) - 1, 0), len(xs) - 2)
    return ys[i] + (x - xs[i]) * (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])


def _log1p_exp(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
