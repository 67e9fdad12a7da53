"""The time-shift sampler (Li et al., arXiv 2305.15583, algorithm 3), on DDIM and on F-PNDM.

Against exposure bias: a state that has drifted from its noise level is given to the network at the time, within a
window around the grid's, whose noise variance is nearest to the state's own variance over pixels, and the step starts
from there. Below a cutoff the grid's times are kept. The released code turns this round: it asks the network at the
grid's time and moves the time at which the step ends; with window=0 the two are one.

Each image has its own time, so a batch is divided by the times chosen in it, one network pass for each; a denoiser that
cannot be had for a part of its batch (OfBatch) makes each pass over all of it. Each image is evaluated once, and NFE
counts that. The window does not shrink with the step: the method does not converge.

Times are those of DDPM's schedule, 0 to 1, whatever the model's schedule is, matched by half-log-SNR, and the state is
taken at its VP scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.denoiser import Counting, Denoiser, OfBatch
from evodiff.fields import check_known, check_number
from evodiff.grid import Step
from evodiff.schedule import LinearVP, Node
from evodiff.solvers.base import Solver, State
from evodiff.solvers.exponential import NOISE, noise_prediction
from evodiff.solvers.ipndm import ADAMS_BASHFORTH
from evodiff.solvers.linear import combine, weighted
from evodiff.solvers.pndm import runge_kutta

CLOCK = LinearVP()
TIMESTEPS = 1000


@dataclass(frozen=True)
class TimeShift(Solver):
    """`method`: ddim, or f_pndm (three Runge-Kutta steps of four evaluations, then Adams-Bashforth 4).

    `window` and `cutoff` are in DDPM's time; candidates are its timesteps, 1/1000 apart. window=0 is the plain method.
    """

    method: str = "ddim"
    window: float = 0.04
    cutoff: float = 0.3

    def __post_init__(self) -> None:
        check_known(self, "method", ("ddim", "f_pndm"))
        for name in ("window", "cutoff"):
            check_number(self, name, lambda v: 0 <= v <= 1, "0 to 1")
        super().__post_init__()

    @property
    def global_order(self) -> float:
        if self.window:
            return 0
        return 1 if self.method == "ddim" else 2

    @property
    def equivariant(self) -> bool:  # type: ignore[override]
        return self.method == "ddim"  # PNDM's Runge-Kutta steps are halved in time

    @property
    def warm_up(self) -> int:
        """How many first steps are Runge-Kutta steps."""
        return 0 if self.method == "ddim" else 3

    def evaluations(self, steps: int) -> int:
        return steps + 3 * min(steps, self.warm_up)

    def step(self, denoise: Denoiser, x: Tensor, step: Step, past: State) -> tuple[Tensor, State]:
        if step.i < self.warm_up:
            eps = noise_prediction(x, denoise(x, step.s), step.s)
            return NOISE.first_order(x, runge_kutta(denoise, x, eps, step), step.s, step.t), (eps, *past)
        nodes = self.shifted(x, step) if step.i else [step.s] * len(x)
        alpha, sigma = (column([getattr(node, name) for node in nodes], x) for name in ("alpha", "sigma"))
        x = x * ((alpha**2 + sigma**2) / (step.s.alpha**2 + step.s.sigma**2)).sqrt()  # 1 on VP schedules
        eps = torch.addcmul(x, alpha, at_each(denoise, x, nodes), value=-1).div_(sigma)
        if self.method == "ddim":
            return transfer(x, eps, nodes, step.t), past
        past = (eps, *past)[:4]
        return transfer(x, combine(*weighted(ADAMS_BASHFORTH[4], past)), nodes, step.t), past

    def shifted(self, x: Tensor, step: Step) -> list[Node]:
        """The node at which each image's variance is that of the noise, within the window around s."""
        now, after = CLOCK.t_at(step.s.lam), CLOCK.t_at(step.t.lam)
        if now <= self.cutoff:
            return [step.s] * len(x)
        half = round(self.window * TIMESTEPS / 2)
        times = [now + k / TIMESTEPS for k in range(-half, half + 1)]
        first = CLOCK.t_at(step.grid.nodes[0].lam)  # beyond it the network may not be trained
        times = [t for t in times if after < t <= first] or [now]
        clock = [CLOCK.node(t) for t in times]
        variance = x.flatten(1).var(1) / (step.s.alpha**2 + step.s.sigma**2)  # of the state of a VP schedule
        noise = torch.tensor([node.sigma**2 for node in clock], dtype=variance.dtype, device=x.device)
        chosen = (variance[:, None] - noise).abs().argmin(1).tolist()
        schedule = step.grid.schedule
        return [schedule.node(schedule.t_at(clock[k].lam)) if times[k] != now else step.s for k in chosen]


def at_each(denoise: Denoiser, x: Tensor, nodes: Sequence[Node]) -> Tensor:
    """D of each image at its own node: one pass per distinct node, one evaluation per image."""
    first, *others = dict.fromkeys(nodes)
    if not others:
        return denoise(x, first)
    inner = denoise
    if isinstance(denoise, Counting):
        inner = denoise.denoiser
        denoise.nfe += 1
    D = torch.empty_like(x)
    for node in (first, *others):
        here = torch.tensor([i for i, n in enumerate(nodes) if n == node], device=x.device)
        if isinstance(inner, OfBatch):
            D[here] = Counting(inner.part(here))(x[here], node)
        else:
            D[here] = Counting(inner)(x, node)[here]
    return D


def transfer(x: Tensor, eps: Tensor, nodes: Sequence[Node], t: Node) -> Tensor:
    """DDIM from each image's node to t along eps."""
    alpha, kappa = (column([getattr(node, name) for node in nodes], x) for name in ("alpha", "kappa"))
    return combine((t.alpha / alpha, x), (t.alpha * (t.kappa - kappa), eps))


def column(values: Sequence[float], x: Tensor) -> Tensor:
    """One number per image, [B, 1, 1, 1]."""
    return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 1))
