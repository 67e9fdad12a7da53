"""Preconditioning: how a raw network F becomes the data prediction D(x, sigma) (EDM, arXiv 2206.00364, table 1)."""

import torch.nn.functional as F
from torch import Tensor, nn


class EDMPrecond(nn.Module):
    """D = c_skip x + c_out F(c_in x, ln(sigma) / 4), with unit variance at the network's input and target (eq. 7).

    x [B, C, R, R] in any float dtype, sigma [B] or scalar tensor, class_labels one-hot [B, label_dim] or None.
    Returns D in float32.
    """

    def __init__(self, model: nn.Module, sigma_data: float = 0.5):
        super().__init__()
        self.model = model
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x = x.float()
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = (sigma.log() / 4).flatten().expand(len(x))
        return c_skip * x + c_out * self.model(c_in * x, c_noise, class_labels).float()


class PixelUnshuffled(nn.Module):
    """A network that sees `factor` x `factor` patches as channels: fewer, wider pixels, so a fast U-Net on a CPU."""

    def __init__(self, model: nn.Module, factor: int):
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(self.model(F.pixel_unshuffle(x, self.factor), noise_labels, class_labels), self.factor)
