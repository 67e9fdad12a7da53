"""What a denoiser is, and the wrappers that count its calls, divide its batch or limit its output."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from evodiff.errors import ConfigError, SamplingError
from evodiff.schedule import Node, NoiseSchedule


class Denoiser(Protocol):
    """The data prediction D(x, t) = E[x_0 | x_t = x], with the noise schedule it was trained or written for."""

    schedule: NoiseSchedule

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        """x [B, C, H, W] at `node` -> D of the same shape, dtype and device."""
        ...


class Counting:
    """Counts calls: one call is one NFE, guided or not. Raises SamplingError for a result of another shape, and for a
    denoiser that changes its input."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.nfe = 0

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        self.nfe += 1
        version = None if x.is_inference() else x._version  # which counts changes in place
        D = self.denoiser(x, node)
        if version is not None and x._version != version:
            raise SamplingError(
                "the denoiser changed its input in place, which is the sampler's state: work on a copy, x.clone()."
            )
        if not isinstance(D, Tensor) or D.shape != x.shape:  # a solver would broadcast it
            got = f"{list(D.shape)}" if isinstance(D, Tensor) else f"a {type(D).__name__}"
            raise SamplingError(
                f"the denoiser was given {list(x.shape)} and returned {got}; expected the data prediction, of "
                f"the shape of its input."
            )
        return D


class OfBatch:
    """The denoiser that `make` has for the labels of a batch, int64 [B] or None, which can be had for a part of it."""

    def __init__(self, make: Callable[[Tensor | None], Denoiser], labels: Tensor | None):
        self.make, self.labels = make, labels
        self.denoiser = make(labels)
        self.schedule = self.denoiser.schedule

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        return self.denoiser(x, node)

    def part(self, images: Tensor) -> Denoiser:
        """The denoiser of some `images`, their places in the batch, int64 [b]."""
        return self.denoiser if self.labels is None else self.make(self.labels[images])


class Clipped:
    """D clipped to [-bound, bound] (DDPM's clip_denoised)."""

    def __init__(self, denoiser: Denoiser, bound: float = 1.0):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.bound = bound

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        return self.denoiser(x, node).clamp(-self.bound, self.bound)


class DynamicThreshold:
    """Imagen's dynamic thresholding (arXiv 2205.11487, section 2.3).

    Per sample, s = max(`bound`, the `ratio` quantile of |D|); D is clipped to [-s, s] and divided by s / bound.
    """

    def __init__(self, denoiser: Denoiser, ratio: float = 0.995, bound: float = 1.0):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.ratio, self.bound = ratio, bound

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        D = self.denoiser(x, node)
        s = torch.quantile(D.flatten(1).abs(), self.ratio, dim=1).clamp(min=self.bound)
        s = s.view(-1, *[1] * (D.ndim - 1))
        return D.clamp(-s, s) * (self.bound / s)


THRESHOLDS: dict[str, Callable[[Denoiser], Denoiser]] = {
    "none": lambda denoiser: denoiser,
    "clip": Clipped,
    "dynamic": DynamicThreshold,
}
"""By the names of the key `threshold`."""


def threshold_of(name: str, latent: bool) -> Callable[[Denoiser], Denoiser]:
    """One of THRESHOLDS. Raises ConfigError for another name, and for one that clips latents, which have no range."""
    if name not in list(THRESHOLDS):
        raise ConfigError(f"threshold={name} does not exist; possible: {', '.join(THRESHOLDS)}.")
    if latent and name != "none":
        raise ConfigError(f"threshold={name} keeps images in [-1, 1], and this model samples latents. Use none.")
    return THRESHOLDS[name]
