"""The TensorFlow Inception of 2015-12-05, on torch-fidelity's port of it.

All FID code bases use this one network and differ in what they do before it: `resize` names the kernel, `scaling` the
way from 0..255 to the network's range. With resize=torch and scaling=127.5 it gives pytorch-fid's features.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evodiff.compat import import_torchvision
from evodiff.errors import MetricError
from evodiff.files import sha256
from evodiff.metrics.features import Extractor, Features
from evodiff.metrics.resize import resize

SIZE = 299
SCALINGS = {"128": (128.0, 128.0), "127.5": (127.5, 127.5)}
"""Offset and divisor; 128 is the graph's own, 127.5 that of TF-GAN and pytorch-fid."""
SPATIAL = "Mixed_6d.branch1x1"
SPATIAL_CHANNELS = 7


def inception(resize_kernel: str, scaling: str, weights: Path | None, device: torch.device) -> Extractor:
    """2048 features, 1008 logits without bias (as torch-fidelity's Inception Score takes them), and 17x17x7 spatial
    features of RGB images of any size.

    Spatial features are the first 7 channels of `mixed_6/conv` in the order [y, x, channel], as in ADM's evaluator
    (arXiv 2103.03841). `weights` is torch-fidelity's or pytorch-fid's file (they hold the same). Raises MetricError for
    another one, ConfigError if it is absent from the registry.
    """
    if weights is None:
        from evodiff.checkpoints import require

        weights = require("inception")
    *stages, (_, classifier) = _network(weights).named_children()
    trunk = _folded(nn.Sequential(OrderedDict(stages))).to(device)
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(classifier, nn.Linear)
    classes = classifier.weight.T.to(device)
    offset, divisor = SCALINGS[scaling]
    seen: list[Tensor] = []
    trunk.get_submodule(SPATIAL).register_forward_hook(lambda module, args, out: seen.append(out))

    def forward(images: Tensor) -> Features:
        seen.clear()
        x = (resize(images, SIZE, resize_kernel) - offset) / divisor
        features = trunk(x.contiguous(memory_format=torch.channels_last)).flatten(1)
        spatial = seen[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(features, features @ classes, spatial)

    return Extractor("inception", sha256(weights), 3, 2048, 1008, device, forward)


def _network(weights: Path) -> nn.Module:
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        # torch-fidelity unpickles without restriction: only what loads as data may reach it
        torch.load(weights, weights_only=True, map_location="cpu")
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise MetricError(
            f"{weights} does not hold the Inception weights of torch-fidelity or pytorch-fid: {reason}"
        ) from e


def _folded(module: nn.Module) -> nn.Module:
    """Batch norms folded into the convolutions before them, in place: the same function in fewer passes."""
    for child in module.modules():
        conv, norm = getattr(child, "conv", None), getattr(child, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            child.conv, child.bn = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return module
