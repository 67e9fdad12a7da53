"""Guidance: a denoiser made of a model's denoisers, one for each batch of labels. One guided call is one NFE."""

from dataclasses import dataclass

from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.models.pretrained import Pretrained


@dataclass(frozen=True)
class Unguided:
    """The model as it is; a class-conditional one with the labels of the batch."""

    def __call__(self, model: Pretrained, labels: Tensor | None) -> Denoiser:
        return model.denoiser(labels)
