"""A pretrained model as the rest of the project sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from evodiff.denoiser import Denoiser
from evodiff.schedule import Node, NoiseSchedule


class Classifier(Protocol):
    """log p(y | x) of noisy images, differentiable in x: x [B, C, H, W] at `node`, labels int64 [B] -> [B]."""

    def __call__(self, x: Tensor, node: Node, labels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pretrained:
    """What a `configs/model/*.yaml` builds.

    `denoiser(labels)` is D(x, node) for one batch: `labels` int64 [B], or None for an unconditional model or the
    unconditional branch of guidance. `shape` is [C, H, W] of one sample, in [-1, 1] unless `decode` turns samples into
    images [B, 3, H', W'] in [-1, 1] (latent models). `files` maps each weight file to its sha256, for the records.
    `unconditional` tells whether denoiser(None) was trained, as classifier-free guidance needs it, and `takes_labels`
    whether labels change the answer: the classes may be those of a classifier beside an unconditional network.
    `classifier` is what classifier guidance follows; `networks` are the modules that compute, for evodiff.precision.
    """

    denoiser: Callable[[Tensor | None], Denoiser]
    shape: tuple[int, int, int]
    num_classes: int = 0
    unconditional: bool = True
    decode: Callable[[Tensor], Tensor] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    classifier: Classifier | None = None
    networks: tuple[nn.Module, ...] = ()
    takes_labels: bool = True

    @property
    def schedule(self) -> NoiseSchedule:
        """On which the denoiser is given its states."""
        return self.denoiser(None).schedule
