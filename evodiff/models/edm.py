"""EDM-preconditioned networks as denoisers (Karras et al., arXiv 2206.00364)."""

import torch
from torch import Tensor, nn

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
        sigma = torch.tensor(node.kappa, device=x.device)
        return self.net(x / node.alpha, sigma, self.class_labels).to(x.dtype)
