"""From what a network predicts, on the process it was trained on, to the data prediction D on any schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.errors import ConfigError, SamplingError
from evodiff.schedule import EDM, Node, NoiseSchedule

PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Node], Tensor]] = {
    "eps": lambda x, out, node: (x - node.sigma * out) / node.alpha,
    "x0": lambda x, out, node: out,
    "v": lambda x, out, node: (node.alpha * x - node.sigma * out) / (node.alpha**2 + node.sigma**2),
    "score": lambda x, out, node: (x + node.sigma**2 * out) / node.alpha,
    "flow": lambda x, out, node: (x - node.sigma * out) / (node.alpha + node.sigma),
}
"""What the output is -> D: eps of x = alpha x_0 + sigma eps; v = alpha eps - sigma x_0 (arXiv 2202.00512); the score
-eps / sigma; flow = eps - x_0 (arXiv 2209.03003)."""


@dataclass(frozen=True)
class ContinuousTime:
    """The label scale * t of a network trained on continuous times."""

    scale: float = 999.0

    def __call__(self, node: Node) -> float:
        return self.scale * node.t


@dataclass(frozen=True)
class DiscreteTime:
    """The label N t - 1 in 0..N - 1 of a network trained on times (i + 1) / N; between them it is a fraction.

    `whole` rounds to the nearest, for networks that look labels up in a table. Raises SamplingError outside the range.
    """

    num_timesteps: int = 1000
    whole: bool = False

    def __call__(self, node: Node) -> float:
        label = self.num_timesteps * node.t - 1
        last = self.num_timesteps - 1
        if not -1e-6 <= label <= last + 1e-6:
            raise SamplingError(
                f"t={node.t:.6g} is outside the times {1 / self.num_timesteps:.6g} to 1 of this model. "
                f"Set t_start and t_end within its own range; where churn (S_churn) goes beyond it, a lower S_max."
            )
        label = min(max(label, 0.0), last)
        return float(round(label)) if self.whole else label


@dataclass(frozen=True)
class NoiseLevel:
    """The label sigma (of a VE network trained on continuous times)."""

    def __call__(self, node: Node) -> float:
        return node.sigma


@dataclass(frozen=True)
class NoiseLevelIndex:
    """The nearest of `count` noise levels, evenly spaced in log sigma, counted from the largest (of a VE network
    trained on those, arXiv 2011.13456, appendix C)."""

    sigma_min: float
    sigma_max: float
    count: int

    def __call__(self, node: Node) -> float:
        below_max = math.log(self.sigma_max / node.sigma) / math.log(self.sigma_max / self.sigma_min)
        return float(min(max(round((self.count - 1) * below_max), 0), self.count - 1))


@dataclass(frozen=True)
class Process:
    """The process a network was trained on (`native`), seen from the `schedule` it is sampled on.

    Two processes at the same sigma / alpha differ by a scale only, so x on one is x on the other times the ratio of
    their alphas. `data_range` is what the network calls black and white; the sampler's are -1 and 1.
    """

    native: NoiseSchedule
    schedule: NoiseSchedule
    label: Callable[[Node], float]
    data_range: tuple[float, float] = (-1.0, 1.0)

    @property
    def contrast(self) -> float:
        return (self.data_range[1] - self.data_range[0]) / 2

    @property
    def middle(self) -> float:
        return (self.data_range[1] + self.data_range[0]) / 2

    def to_native(self, x: Tensor, node: Node) -> tuple[Tensor, Node]:
        if self.schedule is self.native and self.data_range == (-1.0, 1.0):
            return x, node
        own = self.native.node(self.native.t_at(node.lam - math.log(self.contrast)))
        return x * (own.alpha * self.contrast / node.alpha) + own.alpha * self.middle, own

    def from_native(self, D: Tensor) -> Tensor:
        return D if self.data_range == (-1.0, 1.0) else (D - self.middle) / self.contrast

    def labels(self, own: Node, like: Tensor) -> Tensor:
        """[B] float32 on the device of `like`."""
        return torch.full((len(like),), self.label(own), dtype=torch.float32, device=like.device)


def process(
    native: NoiseSchedule,
    label: Callable[[Node], float],
    schedule: str = "own",
    data_range: tuple[float, float] = (-1.0, 1.0),
) -> Process:
    """A process sampled on its `own` schedule, or on `edm`: x_0 + sigma z between the same noise levels."""
    contrast = (data_range[1] - data_range[0]) / 2
    if schedule == "edm" or (schedule == "own" and contrast != 1):
        first, last = (native.node(t).kappa / contrast for t in (native.t_start, native.t_end))
        return Process(native, EDM(first, last), label, data_range)
    if schedule != "own":
        raise ConfigError(f"schedule={schedule} does not exist; possible: own, edm.")
    return Process(native, native, label, data_range)


class NetworkDenoiser:
    """D(x, node) of a network(x, labels) that predicts one of PREDICTIONS.

    The network gets float32 x [B, C, H, W] and labels [B]; channels beyond C, a learned variance, are left out.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], predicts: str, process: Process):
        if predicts not in PREDICTIONS:
            raise ConfigError(f"predicts={predicts} does not exist; possible: {', '.join(PREDICTIONS)}.")
        self.network, self.to_data, self.process = network, PREDICTIONS[predicts], process
        self.schedule = process.schedule

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        native, own = self.process.to_native(x, node)
        # always a copy: networks may work in place, and this may be the solver's own state
        out = self.network(native.to(torch.float32, copy=True), self.process.labels(own, x))[:, : x.shape[1]]
        return self.process.from_native(self.to_data(native, out.to(x.dtype), own))
