"""DINOv2 ViT-L/14 through torch-fidelity: the features of FD-DINOv2 (arXiv 2306.04675)."""

import os
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from evodiff.checkpoints.registry import offline
from evodiff.compat import import_torchvision
from evodiff.errors import ConfigError
from evodiff.files import sha256
from evodiff.metrics.features import Extractor, Features

NAME = "dinov2-vit-l-14"
COMMIT = "b8931f7bf91576930313be2c6d6af376033b35f0"
"""The network is code that torch.hub fetches and runs: of this commit, not of whatever the main branch holds today."""
REPOSITORY = f"facebookresearch/dinov2:{COMMIT}"
MODEL = "dinov2_vitl14"
WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"


def dinov2(weights: Path | None, device: torch.device) -> Extractor:
    """1024 features of RGB images of any size, resized to 224 by the TensorFlow kernel inside torch-fidelity.

    The network and its weights come from torch.hub, into its cache; under EVODIFF_OFFLINE they must be there. Raises
    ConfigError where they cannot be had.
    """
    if weights is not None:
        raise ConfigError(f"DINOv2 takes its weights from torch.hub, not from {weights}; leave `weights` out")
    cache = Path(torch.hub.get_dir())
    code, file = cache / f"facebookresearch_dinov2_{COMMIT}", cache / "checkpoints" / Path(WEIGHTS).name
    how = (
        f"on a machine with internet run `python -c \"import torch; torch.hub.load('{REPOSITORY}', '{MODEL}', "
        f'skip_validation=True)"`, and copy {code.name} and checkpoints/{file.name} of its torch.hub cache to {cache}'
    )
    if offline() and not (code.is_dir() and file.is_file()):
        raise ConfigError(f"DINOv2 is not here and EVODIFF_OFFLINE is set: {how}")
    try:
        network = _network().to(device)
    except Exception as e:
        raise ConfigError(f"DINOv2 could not be had from torch.hub ({type(e).__name__}: {e}): {how}") from e

    def forward(images: Tensor) -> Features:
        return Features(network(images)[0])

    return Extractor("dinov2", sha256(file) if file.exists() else "", 3, 1024, 0, device, forward)


def _network() -> nn.Module:
    """torch-fidelity's extractor around the network of COMMIT, with weights that are loaded as data."""
    import_torchvision()
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class Pinned(FeatureExtractorDinoV2):
        def __init__(self) -> None:  # in place of one that loads the main branch, and unpickles the weights
            FeatureExtractorBase.__init__(self, NAME, ["dinov2"])
            self.feature_extractor_internal_dtype = torch.float32
            self.model = _backbone()
            self.requires_grad_(False).eval()

    return Pinned()


def _backbone() -> nn.Module:
    os.environ["XFORMERS_DISABLED"] = "1"  # as torch-fidelity does: the features must not depend on what is installed
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="xFormers is")
        # torch.hub's check knows the heads of branches only, and a full hash can name nothing but its commit
        network = torch.hub.load(REPOSITORY, MODEL, pretrained=False, skip_validation=True, verbose=False)
        network.load_state_dict(torch.hub.load_state_dict_from_url(WEIGHTS, map_location="cpu", weights_only=True))
    assert isinstance(network, nn.Module)
    return network
