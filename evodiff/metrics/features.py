"""Extractors: uint8 images in, features and logits out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from evodiff.errors import ConfigError, MetricError
from evodiff.files import sha256
from evodiff.paths import CHECKPOINTS
from evodiff.precision import computing


@dataclass(frozen=True)
class Features:
    """What an extractor says of B images, in float32 on the CPU: features [B, d], logits [B, k], spatial [B, s]."""

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


Forward = Callable[[Tensor], Features]


@dataclass(frozen=True)
class Extractor:
    """A network that defines a metric. `forward` maps uint8 [B, channels, H, W] on `device` to Features.

    Batch size and device change features by float32 rounding only: some 1e-6 of their norm.
    """

    name: str
    sha256: str
    channels: int
    dim: int
    classes: int
    device: torch.device
    forward: Forward
    size: int | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Raises MetricError unless `images` is uint8 [B, channels, H, W], of side `size` where the network has one."""
        check_images(images, self.channels, self.size)
        with computing("fp32", self.device):  # TF32 moves Inception features in the third digit
            out = self.forward(images.to(self.device))
        logits, spatial = (None if x is None else x.float().cpu() for x in (out.logits, out.spatial))
        return Features(out.features.float().cpu(), logits, spatial)


def check_images(images: Tensor, channels: int, size: int | None = None) -> None:
    if not isinstance(images, Tensor):
        raise MetricError(f"images must be uint8 tensors [B, C, H, W], and these are a {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise MetricError(
            f"images must be uint8 in 0..255, and these are {images.dtype}: use evodiff.sampling.to_uint8"
        )
    if images.ndim != 4 or images.shape[1] != channels:
        kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
        raise MetricError(
            f"this protocol scores {kind} images [B, {channels}, H, W], and these have shape {tuple(images.shape)}"
        )
    if size is not None and images.shape[2:] != (size, size):
        raise MetricError(
            f"this protocol scores {size}x{size} images, and these are {images.shape[3]}x{images.shape[2]}"
        )


def mnist_classifier(weights: Path | None, device: torch.device) -> Extractor:
    """The shipped digit classifier: 64 features and 10 logits of grey 32x32 images."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from evodiff.models.networks.digit_classifier import DigitClassifier

    path = weights or CHECKPOINTS / "mnist_classifier" / "classifier.safetensors"
    network = DigitClassifier()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as e:
        raise ConfigError(f"weights={path} are no digit classifier: {' '.join(str(e).split())[:200]}") from e
    network.requires_grad_(False).eval().to(device)
    return Extractor(
        "mnist_classifier", sha256(path), 1, network.feature_dim, 10, device, lambda x: Features(*network(x)), size=32
    )


NETWORKS = ("dinov2", "inception", "mnist_classifier")


@cache
def extractor(
    network: str,
    device: str = "cpu",
    resize: str = "native",
    scaling: str = "native",
    weights: Path | None = None,
) -> Extractor:
    """An extractor, built once. `resize` and `scaling` belong to `inception`; the others have only their own (native).

    `weights` replaces the file of the registry. Raises ConfigError for what is not possible or not there.
    """
    if network not in NETWORKS:
        raise ConfigError(f"no extractor is called {network!r}; there are {', '.join(NETWORKS)}")
    where = torch.device(device)
    if network == "inception":
        from evodiff.metrics.inception import SCALINGS, inception
        from evodiff.metrics.resize import KERNELS

        if resize not in KERNELS or scaling not in SCALINGS:
            raise ConfigError(
                f"inception cannot have resize={resize} and scaling={scaling}; there are "
                f"resize={'|'.join(KERNELS)} and scaling={'|'.join(SCALINGS)}"
            )
        return inception(resize, scaling, weights, where)
    if (resize, scaling) != ("native", "native"):
        raise ConfigError(f"{network} has its own resize and scaling: set both to native, not {resize} and {scaling}")
    if network == "dinov2":
        from evodiff.metrics.dinov2 import dinov2

        return dinov2(weights, where)
    return mnist_classifier(weights, where)
