"""The networks of the benchmark; those of published sizes have random weights, which cost what trained ones do."""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import nn

from evodiff.models.adapter import DiscreteTime, NetworkDenoiser, process
from evodiff.models.edm import Preconditioned
from evodiff.models.guided_diffusion import NoisyClassifier
from evodiff.models.mnist import mnist_tiny
from evodiff.models.networks import build as build_network
from evodiff.models.pretrained import Pretrained
from evodiff.schedule import DiscreteVP


def random_weights(architecture: str, config: dict[str, Any], device: str) -> nn.Module:
    """A network whose layers that start at zero have small random weights too, so that all of it computes."""
    torch.manual_seed(0)
    network = build_network(architecture, config)
    for weights in network.parameters():
        if not weights.any():
            nn.init.normal_(weights, std=0.01)
    return network.eval().requires_grad_(False).to(device)


@cache
def edm_cifar10_weights(device: str) -> nn.Module:
    """Drawn once: random numbers for 55.7 million parameters take longer than loading them."""
    return random_weights(
        "edm",
        {"class_name": "EDMPrecond", "model_type": "SongUNet", "embedding_type": "positional", "label_dim": 0}
        | {"encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1]}
        | {"model_channels": 128, "channel_mult": [2, 2, 2], "augment_dim": 9, "img_resolution": 32, "img_channels": 3},
        device,
    )


def edm_cifar10(device: str = "cpu") -> Pretrained:
    network = deepcopy(edm_cifar10_weights(device))
    denoiser = Preconditioned(network)
    return Pretrained(lambda labels: denoiser, (3, 32, 32), device=torch.device(device), networks=(network,))


def tiny(device: str = "cpu") -> Pretrained:
    """The shipped one, trained."""
    return mnist_tiny(device=device)


def adm256(device: str = "cpu") -> Pretrained:
    shared = {"image_size": 256, "in_channels": 3, "num_res_blocks": 2, "attention_resolutions": [8, 16, 32]}
    shared |= {"num_head_channels": 64, "use_scale_shift_norm": True, "resblock_updown": True}
    unet = {"model_channels": 256, "out_channels": 6, "channel_mult": [1, 1, 2, 2, 4, 4], "num_classes": 1000}
    guide = {"model_channels": 128, "out_channels": 1000, "channel_mult": [1, 1, 2, 2, 4, 4], "pool": "attention"}
    network = random_weights("guided_diffusion", shared | unet | {"num_heads": 4}, device)
    classifier = random_weights("guided_diffusion_classifier", shared | guide, device)
    seen = process(DiscreteVP.linear(), DiscreteTime())
    return Pretrained(
        lambda labels: NetworkDenoiser(lambda x, t: network(x, t, labels), "eps", seen),
        (3, 256, 256),
        num_classes=1000,
        device=torch.device(device),
        classifier=NoisyClassifier(classifier, seen),
        networks=(network, classifier),
    )
