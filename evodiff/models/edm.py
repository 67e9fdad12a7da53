"""EDM-preconditioned networks as denoisers (Karras et al., arXiv 2206.00364)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.models.loading import load_network, schedule_of
from evodiff.models.pretrained import Pretrained
from evodiff.schedule import EDM, Node, NoiseSchedule


class Preconditioned:
    """A network that predicts D(y; kappa) of y = x_0 + kappa z, sampled on any schedule: y = x / alpha.

    The network sees its own dtype; the result comes back in the dtype of x. `class_labels` one-hot [B, K] or None.
    """

    def __init__(self, net: nn.Module, schedule: NoiseSchedule | None = None, class_labels: Tensor | None = None):
        self.net = net
        self.schedule = schedule or EDM()
        self.class_labels = class_labels

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        sigma = torch.full((), node.kappa, dtype=torch.float32, device=x.device)  # filled there: nothing to wait for
        return self.net(x / node.alpha, sigma, self.class_labels).to(x.dtype)


def edm(checkpoint: str, schedule: NoiseSchedule | None = None, device: torch.device | str = "cpu") -> Pretrained:
    """A network of NVlabs/edm, by name or file; sampled on the EDM schedule of its noise levels, or on another one."""
    net, file = load_network(checkpoint, "edm", device)
    size, channels, classes = (file.config.get(k, 0) for k in ("img_resolution", "img_channels", "label_dim"))
    schedule = schedule or schedule_of(file.schedule)
    if not hasattr(schedule, "node"):
        raise ConfigError(
            f"schedule={schedule!r} is no noise schedule; expected null, EDM's own, or an object of evodiff.schedule, "
            f"like model.schedule={{_target_: evodiff.schedule.LinearVP}}."
        )

    def denoiser(labels: Tensor | None) -> Denoiser:
        one_hot = None
        if classes and labels is not None:
            one_hot = F.one_hot(labels, classes).to(device, torch.float32)
        return Preconditioned(net, schedule, one_hot)

    return Pretrained(
        denoiser,
        shape=(channels, size, size),
        num_classes=classes,
        unconditional=not classes or file.config.get("label_dropout", 0) > 0,
        files={Path(checkpoint).name: file.sha256},
        device=torch.device(device),
        networks=(net,),
    )
