"""DINOv2 ViT-L/14 through torch-fidelity: the features of FD-DINOv2 (arXiv 2306.04675)."""

from pathlib import Path

import torch
from torch import Tensor

from evodiff.compat import import_torchvision
from evodiff.errors import ConfigError
from evodiff.files import sha256
from evodiff.metrics.features import Extractor, Features

NAME = "dinov2-vit-l-14"
FILE = "dinov2_vitl14_pretrain.pth"


def dinov2(weights: Path | None, device: torch.device) -> Extractor:
    """1024 features of RGB images of any size, resized to 224 by the TensorFlow kernel inside torch-fidelity.

    The network and its weights come from torch.hub, into its cache. Raises ConfigError where that is not possible.
    """
    if weights is not None:
        raise ConfigError(f"DINOv2 takes its weights from torch.hub, not from {weights}; leave `weights` out")
    import_torchvision()
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    try:
        network = FeatureExtractorDinoV2(NAME, ["dinov2"]).to(device)
    except Exception as e:
        raise ConfigError(
            f"DINOv2 could not be had from torch.hub ({type(e).__name__}: {e}): on a machine with network access run "
            f"`python -c \"import torch; torch.hub.load('facebookresearch/dinov2', 'dinov2_vitl14')\"` and copy its "
            f"cache to {torch.hub.get_dir()}"
        ) from e
    file = Path(torch.hub.get_dir()) / "checkpoints" / FILE

    def forward(images: Tensor) -> Features:
        return Features(network(images)[0])

    return Extractor("dinov2", sha256(file) if file.exists() else "", 3, 1024, 0, device, forward)
