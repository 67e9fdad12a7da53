"""Momentum against divergence artifacts (Wizadwongsa et al., arXiv 2307.11118): heavy ball on any multistep solver, and
generalised heavy ball (GHVB, algorithm 2). One evaluation per step of the base, or per step. GHVB is as released; the
released heavy ball for DPM-Solver++ averages only its data term D0 + D1 / 2, and only on second-order steps, which
changes less.

In y = x / alpha and kappa = sigma / alpha the diffusion ODE is dy/dkappa = eps. Heavy ball averages the slope that the
base would take, v <- (1 - beta) v + beta slope, which costs an order unless beta = 1. GHVB averages eps and weights the
last r averages so that the order stays r: at beta = 1 it is Adams-Bashforth r.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.fields import check_known, check_number
from evodiff.grid import Step
from evodiff.noise import Noise
from evodiff.solvers.base import Multistep, Solver, State, Wrapping
from evodiff.solvers.exponential import NOISE, noise_prediction
from evodiff.solvers.linear import combine


def check_beta(solver: Solver) -> None:
    check_number(solver, "beta", lambda beta: 0 < beta <= 1, "above 0, up to 1 (no momentum)")


@dataclass(frozen=True)
class HeavyBall(Wrapping):
    """Heavy-ball momentum on `base`, a multistep solver without a corrector (which would undo it)."""

    beta: float = 0.8

    def __post_init__(self) -> None:
        check_beta(self)
        name = type(self.base).__name__
        if not isinstance(self.base, Multistep) or self.base.stochastic:
            raise ConfigError(f"HeavyBall: base={name} is no deterministic multistep solver; possible: like dpmpp_2m")
        if self.base.corrects:
            raise ConfigError(f"HeavyBall: base={name} has a corrector, which would undo the momentum; turn it off")

    @property
    def global_order(self) -> float:
        return self.base.global_order if self.beta == 1 else 1

    def init(self, noise: Noise | None) -> State:
        return self.base.init(noise), None

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        past, v = state
        s, t = step.s, step.t
        x_t, past = self.base.step(denoise, x, step, past)
        if self.beta == 1:
            return x_t, (past, None)
        dk = t.kappa - s.kappa
        slope = combine((1 / (t.alpha * dk), x_t), (-1 / (s.alpha * dk), x))
        v = slope if v is None else combine((1 - self.beta, v), (self.beta, slope))
        return combine((t.alpha / s.alpha, x), (t.alpha * dk, v)), (past, v)


@dataclass(frozen=True)
class GHVB(Solver):
    """GHVB of order `order` and momentum `beta`; the paper writes GHVB(r - 1 + beta), for example 1.8 or 3.4."""

    order: int = 4
    beta: float = 0.8

    def __post_init__(self) -> None:
        check_beta(self)
        check_known(self, "order", (1, 2, 3, 4))
        super().__post_init__()

    @property
    def global_order(self) -> float:
        """The weights are of steps of equal length in kappa: on other grids no more than 2."""
        return min(self.order, 2)

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        s, t = step.s, step.t
        eps = noise_prediction(x, denoise(x, s), s)
        v = eps if not state else combine((1 - self.beta, state[0]), (self.beta, eps))
        state = (v, *state)[: self.order]
        carry, first = NOISE.first_order_weights(s, t)
        weights = ghvb_weights(len(state), self.beta)
        return combine((carry, x), *((first * w, v) for w, v in zip(weights, state, strict=True))), state


@lru_cache
def ghvb_weights(order: int, beta: float) -> tuple[float, ...]:
    """The weights of v, newest first, that make the mean slope over the next step exact for polynomials below `order`.

    For eps = e^{au}, steps of length 1, v_n = beta / (1 - (1 - beta) e^-a) e^{an}; the mean over the next step is
    (e^a - 1) / a. So sum_j w_j e^{-aj} = (e^a - 1) / a (1 - (1 - beta) e^-a) / beta to order - 1 in a: order 2 gives
    (2 + beta) / (2 beta) and -(2 - beta) / (2 beta), as in the paper's table.
    """
    n = np.arange(order)
    factorial = np.cumprod(np.maximum(n, 1)).astype(float)
    mean = 1 / (factorial * (n + 1))  # (e^a - 1) / a
    lag = -(1 - beta) * (-1.0) ** n / factorial  # 1 - (1 - beta) e^-a
    lag[0] += 1
    target = np.convolve(mean, lag)[:order] / beta
    powers = (-np.arange(order, dtype=float))[None, :] ** n[:, None] / factorial[:, None]
    return tuple(np.linalg.solve(powers, target).tolist())
