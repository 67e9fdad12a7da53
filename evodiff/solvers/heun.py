"""EDM's samplers: second order in kappa = sigma / alpha, and churn (Karras et al., arXiv 2206.00364, algorithms 1-3).

Second order (with churn in the weak sense, for adding noise is exact), two evaluations per step. With a final denoising
call, N steps spend the 2N + 1 evaluations of EDM's N + 1 steps down to sigma = 0, whose last one is an Euler step and
equals that call.
On any schedule alpha = 1 is also rho2Heun of DEIS (arXiv 2204.13902, section 4.2), whose rho is kappa.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.fields import check_known, check_number
from evodiff.grid import Step
from evodiff.schedule import Node
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import NOISE, node_at, noise_prediction
from evodiff.solvers.linear import combine


@dataclass(frozen=True)
class Heun(Solver):
    """y = x / alpha; d = (y - D) / kappa at s, d' the same after an Euler step over the part `alpha` of the step;
    y + dk ((1 - 1/(2 alpha)) d + d' / (2 alpha)). d is the noise prediction, and an Euler step in y a DDIM step in x.

    `alpha`: 1 is Heun, 2/3 Ralston, 1/2 the midpoint rule. `clock`: that part is measured in kappa (EDM) or log_kappa,
    where 1/2 is DPM-Solver-2 as in k-diffusion's sample_dpm_2. Each step whose kappa is in [S_min, S_max] (null: no
    limit) starts with fresh noise of scale S_noise that raises kappa by the factor 1 + min(S_churn/N, sqrt(2) - 1), N
    the number of nodes.
    """

    alpha: float = 1.0
    clock: str = "kappa"
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float | None = None
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "alpha", lambda alpha: 0 < alpha <= 1, "above 0, at most 1")
        check_known(self, "clock", ("kappa", "log_kappa"))
        for name in ("S_churn", "S_min", "S_noise"):
            check_number(self, name, lambda v: v >= 0, "at least 0")
        check_number(self, "S_max", lambda v: v >= self.S_min, f"at least S_min={self.S_min}, or null")
        super().__post_init__()

    @property
    def stochastic(self) -> bool:
        return self.S_churn > 0

    @property
    def global_order(self) -> float:
        return 2

    def evaluations(self, steps: int) -> int:
        return 2 * steps

    def step(self, denoise: Denoiser, x: Tensor, step: Step, noise: State) -> tuple[Tensor, State]:
        s, t = step.s, step.t
        gamma = self.churn(step)
        if gamma > 0:
            up = node_at(step.grid.schedule, s.kappa * (1 + gamma))
            c = self.S_noise * math.sqrt(up.kappa**2 - s.kappa**2)
            x, s = combine((up.alpha / s.alpha, x), (up.alpha * c, noise.normal(x))), up
        d = noise_prediction(x, denoise(x, s), s)
        m = self.between(s, step)
        x_m = NOISE.first_order(x, d, s, m)
        d_m = noise_prediction(x_m, denoise(x_m, m), m)
        carry, dk = NOISE.first_order_weights(s, t)
        w = 0.5 / self.alpha
        return combine((carry, x), (dk * (1 - w), d), (dk * w, d_m)), noise

    def churn(self, step: Step) -> float:
        """gamma_i of algorithm 2. EDM's N counts the step to sigma = 0, so that it is the number of nodes here."""
        above = self.S_max is not None and step.s.kappa > self.S_max
        if self.S_churn == 0 or step.s.kappa < self.S_min or above:
            return 0.0
        return min(self.S_churn / len(step.grid.nodes), math.sqrt(2) - 1)

    def between(self, s: Node, step: Step) -> Node:
        """The node of the second evaluation."""
        if self.alpha == 1:
            return step.t
        a, b = s.kappa, step.t.kappa
        kappa = a + self.alpha * (b - a) if self.clock == "kappa" else a ** (1 - self.alpha) * b**self.alpha
        return node_at(step.grid.schedule, kappa)
