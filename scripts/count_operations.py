"""Floating-point operations of one evaluation of each model, for `evodiff status`: `python scripts/count_operations.py`
writes results/bench/operations.json, in GFLOP (a multiplication and an addition are two).

Counted by torch on networks without weights, of the architectures whose manifests the tests hold; `classifier` is its
answer with the gradient in the image. Decoders of latent models are left out: they work once an image.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evodiff.checkpoints.registry import Entry, find
from evodiff.compat import import_torchvision
from evodiff.config import choices, compose
from evodiff.files import whole_file
from evodiff.models.mnist import mnist_tiny
from evodiff.models.networks import build
from evodiff.paths import ROOT
from evodiff.tables.throughput import OPERATIONS

MANIFESTS = ROOT / "tests" / "golden" / "network_manifests.json"
AS_FFHQ = {"afhqv2_edm_ve": "edm-ffhq-64x64-uncond-ve"}
"""Without a manifest of its own, and of the same architecture."""


def config_of(entry: Entry) -> dict[str, Any]:
    """The constructor's arguments: of the manifest of files, or of the pickle's own description."""
    described: dict[str, Any] = json.loads(MANIFESTS.read_text())
    name = AS_FFHQ.get(entry.name, Path(entry.file).stem)
    return dict(entry.config) or described[name]["constructor_kwargs"]


def counted(network: nn.Module, *inputs: Any, gradient: bool = False) -> float:
    """GFLOP of one call, with the gradient of its sum in the first input if that is wanted."""
    network.eval()
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with torch.set_grad_enabled(gradient), plain, FlopCounterMode(display=False) as counter:
        image = inputs[0].requires_grad_(gradient).clone()  # the counter can't follow a gradient to a leaf it is given
        out = network(image, *inputs[1:])
        if gradient:
            torch.autograd.grad(out.sum(), inputs[0])
    return counter.get_total_flops() / 1e9


def of_checkpoint(name: str) -> float:
    """GFLOP of an entry of checkpoints/manifest.yaml."""
    entry = find(name)
    config = config_of(entry)
    of_data = config.get("data", config)
    size = of_data["img_resolution"] if "img_resolution" in of_data else of_data["image_size"]
    with torch.device("meta"):
        network, image, t = build(entry.architecture, config), torch.zeros(1, 3, size, size), torch.ones(1)
        if classes := config.get("label_dim"):
            return counted(network, image, t, torch.zeros(1, classes))
        if config.get("num_classes"):
            return counted(network, image, t, torch.zeros(1, dtype=torch.int64))
        return counted(network, image, t, gradient=entry.kind == "classifier")


def of_latent(name: str) -> float:
    """GFLOP of the U-Nets of latent diffusion on LSUN-Bedroom (arXiv 2112.10752) and of Stable Diffusion 1.5."""
    import_torchvision()  # diffusers' models import it, and beside a CPU build of torch it fails without this
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        if name == "lsun_bedroom_ldm":
            config = {"image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224, "num_res_blocks": 2}
            config |= {"attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 4], "num_head_channels": 32}
            return counted(build("guided_diffusion", config), torch.zeros(1, 3, 64, 64), torch.ones(1))
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return counted(network, torch.zeros(1, 4, 64, 64), torch.ones(1), torch.zeros(1, 77, 768))


def operations(name: str) -> dict[str, float]:
    """What operations.json holds of a model; nothing of one without a network."""
    model = compose("run", [f"model={name}"]).model
    if name == "mnist_tiny":
        (network,) = mnist_tiny().networks
        return {"network": counted(network, torch.zeros(1, 1, 32, 32), torch.ones(1))}
    if "pipeline" in model:
        return {"network": of_latent(name)}
    if "checkpoint" not in model:
        return {}
    found = {"network": of_checkpoint(model.checkpoint)}
    return found | ({"classifier": of_checkpoint(model.classifier)} if model.get("classifier") else {})


def main() -> None:
    found = {name: counts for name in choices("model") if (counts := operations(name))}
    rounded = {name: {part: float(f"{g:.5g}") for part, g in counts.items()} for name, counts in found.items()}
    with whole_file(OPERATIONS) as temporary:
        temporary.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
