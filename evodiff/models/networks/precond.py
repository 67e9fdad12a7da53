"""Preconditioning: how a raw network F becomes the data prediction D(x, sigma) (EDM, arXiv 2206.00364, table 1)."""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Coefficients(NamedTuple):
    """D = skip x + out F(in x, noise); each of the shape of sigma."""

    skip: Tensor
    out: Tensor
    in_: Tensor
    noise: Tensor


class Precond(nn.Module):
    """D = c_skip x + c_out F(c_in x, c_noise), for x = x_0 + sigma z.

    x [B, C, R, R] in any float dtype, sigma [B] or scalar tensor, class_labels one-hot [B, label_dim] or None.
    Returns D in float32. F may have more channels than x: those beyond are its variance. `sigma_min`, `sigma_max`: what
    the network was trained on.
    """

    sigma_min: float
    sigma_max: float

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients: ...

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        x = x.float()
        c = self.coefficients(sigma.float().reshape(-1, 1, 1, 1))
        extra = () if augment_labels is None else (augment_labels,)
        raw = self.model(c.in_ * x, c.noise.flatten().expand(len(x)), class_labels, *extra)
        return c.skip * x + c.out * raw[:, : x.shape[1]].float()


class EDMPrecond(Precond):
    """Unit variance at the network's input and target (eq. 7)."""

    def __init__(self, model: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.0, sigma_max: float = math.inf):
        super().__init__(model)
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        variance = sigma**2 + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / variance,
            out=sigma * self.sigma_data / variance.sqrt(),
            in_=1 / variance.sqrt(),
            noise=sigma.log() / 4,
        )


class VPPrecond(Precond):
    """A DDPM-style network of Song et al. as a function of sigma: F is the noise, its label 999 t."""

    def __init__(self, model: nn.Module, beta_d=19.9, beta_min=0.1, M: int = 1000, epsilon_t=1e-5):
        super().__init__(model)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        # float32 on purpose: the published value of sigma_min is 2^-10, a rounding away from the exact 0.0010000
        t = torch.tensor([epsilon_t, 1.0], device="cpu")
        low, high = ((0.5 * beta_d * t**2 + beta_min * t).exp() - 1).sqrt().tolist()
        self.sigma_min, self.sigma_max = low, high

    def time(self, sigma: Tensor) -> Tensor:
        """The t in (0, 1] at which sigma/alpha of the VP process is `sigma`."""
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            in_=1 / (sigma**2 + 1).sqrt(),
            noise=(self.M - 1) * self.time(sigma),
        )


class VEPrecond(Precond):
    """A score network of Song et al.'s VE process, whose label is log(sigma / 2)."""

    def __init__(self, model: nn.Module, sigma_min: float = 0.02, sigma_max: float = 100):
        super().__init__(model)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log())


class IDDPMPrecond(Precond):
    """Improved DDPM's cosine process at its M discrete levels `u`: F is noise and variance, its label an index."""

    u: Tensor

    def __init__(self, model: nn.Module, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000):
        super().__init__(model)
        self.M = M
        u = torch.zeros(M + 1, device="cpu")

        def alpha_bar(j: int) -> Tensor:
            return (0.5 * math.pi * torch.tensor(j, device="cpu") / M / (C_2 + 1)).sin() ** 2

        for j in range(M, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar(j - 1) / alpha_bar(j)).clip(min=C_1) - 1).sqrt()
        self.register_buffer("u", u)
        self.sigma_min, self.sigma_max = u[M - 1].item(), u[0].item()

    def index(self, sigma: Tensor) -> Tensor:
        """The nearest level."""
        return (sigma.reshape(-1, 1) - self.u).abs().argmin(1).view(sigma.shape)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            in_=1 / (sigma**2 + 1).sqrt(),
            noise=(self.M - 1 - self.index(sigma)).float(),
        )


class PixelUnshuffled(nn.Module):
    """A network that sees `factor` x `factor` patches as channels: fewer, wider pixels, so a fast U-Net on a CPU."""

    def __init__(self, model: nn.Module, factor: int):
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(self.model(F.pixel_unshuffle(x, self.factor), noise_labels, class_labels), self.factor)
