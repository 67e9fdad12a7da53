"""The models on real MNIST digits: the shipped network, and the exact denoiser of blurred digits."""

import torch
from safetensors.torch import load_file
from torch import Tensor

from evodiff.data import mnist_digits
from evodiff.denoiser import Denoiser
from evodiff.device import widest_float
from evodiff.errors import ConfigError
from evodiff.files import sha256
from evodiff.models.analytic import GaussianMixture
from evodiff.models.edm import Preconditioned
from evodiff.models.networks.tiny import tiny_denoiser
from evodiff.models.pretrained import Pretrained
from evodiff.paths import CHECKPOINTS, ROOT
from evodiff.schedule import NoiseSchedule


def mnist_tiny(weights: str = "ema", device: torch.device | str = "cpu") -> Pretrained:
    """The shipped network; `weights` names a file of checkpoints/mnist_tiny, without extension."""
    path = CHECKPOINTS / "mnist_tiny" / f"{weights}.safetensors"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.safetensors"))) or "none"
        raise ConfigError(
            f"mnist_tiny: weights={weights} is no file of {path.parent}; possible: {known}. "
            f"`python scripts/train.py mnist_tiny` trains it anew."
        )
    net = tiny_denoiser()
    net.load_state_dict(load_file(path))
    net = net.eval().requires_grad_(False).to(device)
    denoiser = Preconditioned(net)
    return Pretrained(
        lambda labels: denoiser,
        shape=(1, 32, 32),
        files={str(path.relative_to(ROOT)): sha256(path)},
        device=torch.device(device),
        networks=(net,),
    )


def mixture_digits(
    digits: int = 500, std: float = 0.1, schedule: NoiseSchedule | None = None, device: torch.device | str = "cpu"
) -> Pretrained:
    """An exact oracle: x_0 is one of `digits` real digits plus Gaussian noise of `std`."""
    images, _ = mnist_digits()
    if not 1 <= digits <= len(images):
        raise ConfigError(f"mixture_digits: digits={digits} is impossible; there are 1 to {len(images)}")
    if std <= 0:
        raise ConfigError(f"mixture_digits: std={std} must be above 0")
    rows = torch.arange(digits, device="cpu") * len(images) // digits
    means: Tensor = (images[rows].double() / 127.5 - 1).to(device, widest_float(device))
    stds = torch.full((digits,), std, dtype=torch.float32, device="cpu").to(device)
    denoiser: Denoiser = GaussianMixture(means, stds, torch.full_like(stds, 1 / digits), schedule)
    return Pretrained(lambda labels: denoiser, shape=(1, 32, 32), device=torch.device(device))
