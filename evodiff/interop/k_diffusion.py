"""The solvers of this project as sampler functions of k-diffusion, for the programs that take such functions.

    from evodiff.interop.k_diffusion import sample_evodiff

    x = sample_evodiff(model, x, sigmas, extra_args={"cond": cond})

`sample_<name>` exists for each solver of configs/solver; `sampler(name, **fields)` makes one with other fields. The
package k-diffusion itself is not needed.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from evodiff.api import named_solver
from evodiff.config import choices
from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import Step, TimeGrid
from evodiff.interop import ending, images
from evodiff.progress import progress
from evodiff.sampling import integrate
from evodiff.schedule import EDM, Node, NoiseSchedule
from evodiff.solvers.base import Solver, State, Wrapping

Model = Callable[..., Tensor]
"""model(x, sigma, **extra_args) -> the denoised x_0, for x = x_0 + sigma z and sigma [B]."""
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""noise_sampler(sigma, sigma_next) -> standard normal noise of the shape of x, given two of `sigmas` in its dtype."""


@torch.no_grad()
def sample(
    solver: Solver,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """From x [B, C, ...] at sigmas[0] to sigmas[-1], one step between each two of `sigmas` [n + 1], which fall.

    Where the last sigma is 0, the last step is one evaluation, the denoised image itself. `callback` is called once in
    each step that evaluates the model (teleport's first ones do not), with x, i, sigma, sigma_hat (that of the network:
    above sigma with churn) and denoised. `disable` leaves the progress bar out. Computed in float32 at least, returned
    in the dtype of x. An adaptive solver goes from the first sigma to the last above 0 in steps of its own. Raises
    ConfigError for sigmas that do not fall, and SamplingError for a `noise_sampler` that has one noise for each pair of
    sigmas (a Brownian tree) where the solver draws several times in a step.
    """
    times = [float(sigma) for sigma in sigmas]
    if len(times) < 2 or times[-1] < 0 or not all(a > b for a, b in pairwise(times)):
        raise ConfigError("sigmas must be at least two falling numbers, of which only the last may be 0.")
    to_zero = times[-1] == 0
    times = times[:-1] if to_zero else times
    if solver.adaptive and len(times) > 1:
        times = [times[0], times[-1]]
    schedule = EDM(times[0], times[-1]) if len(times) > 1 else EDM()
    y = images(x.to(torch.promote_types(x.dtype, torch.float32)))
    steps = len(times) - 1
    silent = nullcontext(lambda n: None)
    with silent if disable else progress(type(solver).__name__, steps + to_zero, "steps") as advance:
        denoise = _Model(model, x, torch.as_tensor(sigmas), schedule, extra_args or {}, callback)
        if steps:
            grid = TimeGrid.at(times, schedule)
            solver.check(grid, y.shape[1:])
            noise: Any = _SampledNoise(noise_sampler, denoise)
            y = integrate(_Watched(solver, denoise, advance), denoise, y, grid, noise)
        if to_zero:
            denoise.start(steps, times[-1], 0.0)
            y = denoise(y, schedule.node(times[-1]))
            advance(1)
    return y.reshape(x.shape).to(x.dtype)


def sampler(name: str, **fields: Any) -> Callable[..., Tensor]:
    """`sample_<name>(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None, **fields)`.

    `fields` are those of the solver; those given in the call come after those given here. Where the last sigma is 0
    EVODiff's `final` is euler unless it is given (`evodiff.interop.ending`). Raises ConfigError.
    """
    named_solver(name, **fields)

    def sample_named(
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
        noise_sampler: NoiseSampler | None = None,
        **others: Any,
    ) -> Tensor:
        given = {**fields, **others}
        solver = ending(named_solver(name, **given), given, to_zero=0 in sigmas[-1:])
        return sample(solver, model, x, sigmas, extra_args, callback, disable, noise_sampler)

    sample_named.__name__ = sample_named.__qualname__ = f"sample_{name}"
    sample_named.__doc__ = f"`sample` with solver={name}; its fields are further keyword arguments."
    return sample_named


def __getattr__(name: str) -> Callable[..., Tensor]:
    solver = name.removeprefix("sample_")
    if solver != name and solver in choices("solver"):
        return sampler(solver)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(f"sample_{name}" for name in choices("solver"))})


class _Model:
    """k-diffusion's model as a denoiser, which tells the callback of the first evaluation of each step."""

    def __init__(
        self,
        model: Model,
        like: Tensor,
        sigmas: Tensor,
        schedule: NoiseSchedule,
        extra_args: Mapping[str, Any],
        callback: Callback | None,
    ):
        self.model, self.like, self.sigmas, self.extra_args = model, like, sigmas, extra_args
        self.schedule: NoiseSchedule = schedule
        self.callback = callback
        self.step, self.announced = 0, True
        self.sigma = self.sigma_next = sigmas[0]

    def start(self, step: int, sigma: float, sigma_next: float) -> None:
        self.step, self.announced = step, False
        # in the dtype of `sigmas`, as k-diffusion has them: half precision would round them off a Brownian tree's own
        self.sigma, self.sigma_next = (self.sigmas.new_tensor(value) for value in (sigma, sigma_next))

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        state = x.reshape(self.like.shape).to(self.like.dtype)
        denoised = self.model(state, state.new_full((len(state),), node.sigma), **self.extra_args)
        if denoised.shape != state.shape:
            raise SamplingError(f"the model was given {list(state.shape)} and returned {list(denoised.shape)}")
        if not self.announced:
            self.announced = True
            if self.callback is not None:
                sigma = {"sigma": self.sigma, "sigma_hat": self.sigmas.new_tensor(node.sigma)}
                self.callback({"x": state, "i": self.step, **sigma, "denoised": denoised})
        return denoised.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class _Watched(Wrapping):
    """`base`, telling the denoiser where each step begins, and `advance` that one is done."""

    denoiser: _Model
    advance: Callable[[int], None]

    @property
    def global_order(self) -> float:
        return self.base.global_order

    def step(self, denoise: Denoiser, x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        self.denoiser.start(step.i, step.s.sigma, step.t.sigma)
        result = self.base.step(denoise, x, step, state)
        self.advance(1)
        return result


class _SampledNoise:
    """The noise of a stochastic step, from k-diffusion's noise sampler; by default torch's global generator."""

    def __init__(self, noise_sampler: NoiseSampler | None, denoiser: _Model):
        self.noise_sampler, self.denoiser = noise_sampler, denoiser
        self.step, self.drawn = -1, torch.empty(0)

    def normal(self, like: Tensor) -> Tensor:
        if self.noise_sampler is None:
            return torch.randn_like(like)
        drawn = self.noise_sampler(self.denoiser.sigma, self.denoiser.sigma_next)
        if self.step == self.denoiser.step and torch.equal(drawn, self.drawn):
            raise SamplingError(
                "this solver draws noise more than once in a step, and noise_sampler gave the same for the same two "
                "sigmas again: leave it out (noise_sampler=None), or give one that draws afresh each time."
            )
        self.step, self.drawn = self.denoiser.step, drawn.clone()  # which a sampler may overwrite
        return drawn.reshape(like.shape).to(like.device, like.dtype)
