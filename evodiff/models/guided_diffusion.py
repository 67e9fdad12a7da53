"""The networks of guided-diffusion as denoisers, and its classifiers of noisy images (arXiv 2105.05233)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evodiff.checkpoints import Checkpoint
from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.models.adapter import DiscreteTime, NetworkDenoiser, Process, process
from evodiff.models.loading import discrete_schedule_of, load_network
from evodiff.models.pretrained import Pretrained
from evodiff.schedule import Node


class NoisyClassifier:
    """log p(y | x) of a classifier trained on the noise of `process`: x [B, C, H, W] at `node`, labels [B] -> [B].

    Differentiable in x.
    """

    def __init__(self, net: Callable[[Tensor, Tensor], Tensor], process: Process):
        self.net, self.process = net, process

    def __call__(self, x: Tensor, node: Node, labels: Tensor) -> Tensor:
        native, own = self.process.to_native(x, node)
        logits = self.net(native.float(), self.process.labels(own, x))
        return logits.log_softmax(dim=1)[torch.arange(len(x), device=x.device), labels]


def guided_diffusion(
    checkpoint: str,
    classifier: str | None = None,
    schedule: str = "own",
    whole_labels: bool = False,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """An ADM network by name or file, and the classifier that can guide it (`guidance=classifier`).

    `schedule`: `own`, or `edm` for the same noise levels on EDM's. `whole_labels` rounds the time label to a trained
    one. Published tables were made with precision=fp16.
    """
    net, file = load_network(checkpoint, "guided_diffusion", device)
    files = {Path(checkpoint).name: file.sha256}
    native = discrete_schedule_of(file.schedule)
    seen = process(native, DiscreteTime(len(native.log_alphas), whole_labels), schedule)
    classes = file.config.get("num_classes") or 0
    log_p, networks = None, [net]
    if classifier is not None:
        guide, guide_file = load_network(classifier, "guided_diffusion_classifier", device)
        _check_pair(classifier, guide_file, file)
        name = Path(classifier).name
        files[f"classifier/{name}" if name in files else name] = guide_file.sha256  # trainers call both model000000.pt
        log_p = NoisyClassifier(guide, seen)
        networks.append(guide)
        classes = classes or guide_file.config["out_channels"]
    size = file.config["image_size"]
    return Pretrained(
        partial(_denoiser, net, seen),
        shape=(file.config["in_channels"], size, size),
        num_classes=classes,
        unconditional=net.config.num_classes is None,
        files=files,
        device=torch.device(device),
        classifier=log_p,
        networks=tuple(networks),
        takes_labels=net.config.num_classes is not None,
    )


def _check_pair(classifier: str, guide: Checkpoint, network: Checkpoint) -> None:
    """Raises ConfigError for a classifier of images, classes or noise other than those of the network."""
    classes = guide.config["out_channels"]
    for fact, its, networks, same in (
        ("image_size", guide.config["image_size"], network.config["image_size"], None),
        ("classes", classes, network.config.get("num_classes") or classes, None),
        ("schedule", guide.schedule, network.schedule, discrete_schedule_of),  # two ways of saying one are one
    ):
        if same(its) != same(networks) if same else its != networks:
            raise ConfigError(
                f"model.classifier={classifier} is none for this network: its {fact} is {its}, the network's "
                f"{networks}. Give the one that was trained for it, or convert it with the schedule.key=value it has."
            )


def _denoiser(net: Any, seen: Process, labels: Tensor | None) -> Denoiser:
    y = labels if net.config.num_classes is not None else None
    return NetworkDenoiser(lambda x, t: net(x, t, y), "eps", seen)
