"""Guidance: a denoiser made of a model's denoisers, one for each batch of labels. One guided call is one NFE.

What a call costs beside that is its `network_passes`: how many networks it runs on the batch.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError, SamplingError
from evodiff.fields import check_number
from evodiff.models.pretrained import Classifier as LogProbability
from evodiff.models.pretrained import Pretrained
from evodiff.schedule import Node


@dataclass(frozen=True)
class Unguided:
    """The model as it is; a class-conditional one with the labels of the batch."""

    network_passes: ClassVar[int] = 1

    def __call__(self, model: Pretrained, labels: Tensor | None) -> Denoiser:
        return model.denoiser(labels)


@dataclass(frozen=True)
class Classifier:
    """Classifier guidance (arXiv 2105.05233, section 4): eps - scale sigma grad_x log p(y | x), the gradient at the
    same x and time as the denoiser; in D, + scale sigma^2 / alpha grad_x log p(y | x).

    Raises ConfigError for a model without a classifier.
    """

    scale: float = 2.0
    network_passes: ClassVar[int] = 2  # the denoiser, and the classifier with its gradient

    def __post_init__(self) -> None:
        check_number(self, "scale", math.isfinite, "a number")

    def __call__(self, model: Pretrained, labels: Tensor | None) -> Denoiser:
        if model.classifier is None or labels is None:
            raise ConfigError(
                "guidance=classifier needs a model with a classifier, and this one has none. "
                "Use model=imagenet256_adm or imagenet256_adm_uncond, or guidance=none."
            )
        return _ClassifierGuided(model.denoiser(labels), model.classifier, labels, self.scale)


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (arXiv 2207.12598): D_uncond + scale (D_cond - D_uncond); scale 1 is unguided.

    Raises ConfigError for a model without labels, or without an unconditional branch.
    """

    scale: float = 7.5
    network_passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number(self, "scale", math.isfinite, "a number")

    def __call__(self, model: Pretrained, labels: Tensor | None) -> Denoiser:
        if labels is None or not model.takes_labels:
            raise ConfigError(
                "guidance=classifier_free needs a conditional model, and this one's network takes no labels. "
                f"Use guidance={'none' if model.classifier is None else 'classifier or guidance=none'}."
            )
        if not model.unconditional:
            raise ConfigError(
                "guidance=classifier_free needs a network that was trained with labels left out, too, and this one was "
                "always given its own. Use guidance=none, or a model with an unconditional branch, like sd15."
            )
        return _ClassifierFreeGuided(model.denoiser(labels), model.denoiser(None), self.scale)


class _ClassifierGuided:
    def __init__(self, denoiser: Denoiser, log_p: LogProbability, labels: Tensor, scale: float):
        self.denoiser, self.log_p, self.labels, self.scale = denoiser, log_p, labels, scale
        self.schedule = denoiser.schedule

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        D = self.denoiser(x, node)
        # of this x only: no graph outlives the call; a tensor of inference mode has no gradient, a copy of it has
        with torch.inference_mode(False), torch.enable_grad():
            leaf, labels = x.detach().clone().requires_grad_(), self.labels.clone()
            try:
                (gradient,) = torch.autograd.grad(self.log_p(leaf, node, labels).sum(), leaf)
            except RuntimeError as e:
                if "inference tensor" not in str(e).lower():
                    raise
                raise SamplingError(
                    "guidance=classifier needs a gradient, and this classifier was made under torch.inference_mode(), "
                    "which allows none: make the model outside of it, or under torch.no_grad()."
                ) from e
        return D + self.scale * node.sigma**2 / node.alpha * gradient


class _ClassifierFreeGuided:
    def __init__(self, conditional: Denoiser, unconditional: Denoiser, scale: float):
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale
        self.schedule = conditional.schedule

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        D = self.unconditional(x, node)
        return D + self.scale * (self.conditional(x, node) - D)
