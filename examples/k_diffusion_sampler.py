"""Our solvers where k-diffusion's samplers are expected: model(x, sigma), a list of sigmas, a callback.

python examples/k_diffusion_sampler.py
"""

import torch

from evodiff.grid import Karras
from evodiff.interop.k_diffusion import sample_dpmpp_2m, sample_evodiff
from evodiff.models.mnist import mnist_tiny

denoise = mnist_tiny().denoiser(None)


def model(x, sigma):
    """k-diffusion's denoiser: x = x_0 + sigma z, sigma [B]."""
    return denoise(x, denoise.schedule.node(sigma[0].item()))


def told(step):
    contrast = step["denoised"].std().item()
    print(f"  step {step['i']}: sigma {step['sigma'].item():8.3f}, contrast of the denoised images {contrast:.3f}")


def main() -> None:
    sigmas = torch.tensor([*Karras().times(6, denoise.schedule, 80.0, 0.02), 0.0])
    torch.manual_seed(0)
    x = sigmas[0] * torch.randn(8, 1, 32, 32)
    for sample in (sample_evodiff, sample_dpmpp_2m):
        print(sample.__name__)
        images = sample(model, x, sigmas, callback=told, disable=True)
        print(f"  images from {images.min():.2f} to {images.max():.2f}")


if __name__ == "__main__":
    main()
