"""The loop, and the way from seeds to images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.denoiser import Counting, Denoiser
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import TimeGrid
from evodiff.noise import Noise, SeededNoise
from evodiff.precision import products
from evodiff.schedule import Node
from evodiff.solvers.base import Solver


@torch.no_grad()
def integrate(
    solver: Solver,
    denoise: Denoiser,
    x: Tensor,
    grid: TimeGrid,
    noise: Noise | None = None,
    denoise_final: bool = False,
) -> Tensor:
    """From x at the first node of `grid` to the last one, and with `denoise_final` to D there. The only loop.

    Raises SamplingError if a step returns something else than x and the state.
    """
    state = solver.init(noise)
    for step in grid.steps():
        result = solver.step(denoise, x, step, state)
        if not isinstance(result, tuple) or len(result) != 2:
            raise SamplingError(f"the step of {type(solver).__name__} must return x and the state: return x, state.")
        x, state = result
    return denoise(x, grid.nodes[-1]) if denoise_final else x


ROUNDINGS = ("round", "truncate")


def to_uint8(x: Tensor, rounding: str = "round") -> Tensor:
    """[-1, 1] -> 0..255: `round` is round(127.5 x + 127.5) clipped; `truncate` drops the fraction (older scripts).

    Raises ConfigError for another rounding.
    """
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding} does not exist; possible: {', '.join(ROUNDINGS)}.")
    if x.device.type == "mps":  # which has no float64
        x = x.cpu()
    grey = 127.5 * x.double() + 127.5
    grey = grey.round() if rounding == "round" else grey.floor()
    return grey.clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, repr=False)
class Generated:
    """One batch: `x` is what the sampler returned [B, C, H, W], `images` the same as uint8; of a model with classes
    `labels`, int64 [B]."""

    seeds: tuple[int, ...]
    x: Tensor
    images: Tensor
    nfe: int
    labels: Tensor | None = None

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"<{len(self.seeds)} images of {shape}, seeds {self.seeds[0]} to {self.seeds[-1]}, nfe {self.nfe}>"


def start(
    noise: Noise,
    shape: Sequence[int],
    node: Node,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The first state, [B, *shape]: sigma z; on VP schedules z, as in papers, also from a time at which sigma < 1."""
    # not EDM's alpha = 1, however small its sigma
    variance_preserving = node.alpha < 1 and math.isclose(node.alpha**2 + node.sigma**2, 1, abs_tol=1e-6)
    return noise.latents(shape).to(device, dtype) * (1.0 if variance_preserving else node.sigma)


def generate(
    denoiser: Denoiser,
    solver: Solver,
    grid: TimeGrid,
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    denoise_final: bool = False,
    noise: Noise | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    rounding: str = "round",
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Generated:
    """Sample one image per seed, in one batch: `shape` [C, H, W] is that of the state, which `decode` turns to images.

    `noise` is by default that of the seeds.

    Raises SamplingError if the network was called another number of times than the solver declares, or if the result,
    before or after `decode`, is not finite, and ConfigError for a `dtype` that the device lacks.
    """
    if dtype == torch.float64 and torch.device(device).type == "mps":
        raise ConfigError(f"device={device} has no float64, and the state is in float64. Set dtype=float32.")
    noise = noise or SeededNoise(seeds)
    x = start(noise, shape, grid.nodes[0], device, dtype)
    counting = Counting(denoiser)
    x = integrate(solver, counting, x, grid, noise, denoise_final)
    declared = solver.evaluations(len(grid)) + denoise_final
    if counting.nfe != declared and not solver.adaptive:
        name = type(solver).__name__
        raise SamplingError(f"{name} declares {declared} evaluations on {len(grid)} steps but made {counting.nfe}")
    _check_finite(x, seeds, "the network returned NaN or inf, or the solver diverged", "solver")
    images = x
    if decode:
        with products("fp32"):  # also where a run's other products are coarser
            images = decode(x)
        _check_finite(images, seeds, "their latents are, but the decoder returned NaN or inf", "decoder")
    return Generated(tuple(seeds), x, to_uint8(images, rounding), counting.nfe)


def _check_finite(x: Tensor, seeds: Sequence[int], why: str, other: str) -> None:
    bad = [seed for seed, ok in zip(seeds, x.flatten(1).isfinite().all(1).tolist(), strict=True) if not ok]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise SamplingError(
            f"{len(bad)} of {len(seeds)} images are not finite (seeds {shown}): {why}. Nothing of this batch was kept; "
            f"check the checkpoint, or try another precision or {other}."
        )
