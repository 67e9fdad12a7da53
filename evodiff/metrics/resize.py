"""The resize kernels of FID tools, as matrices: every one of them is linear and separable."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("tensorflow", "torch", "clean")


def resize(images: Tensor, size: int, kernel: str) -> Tensor:
    """uint8 [B, C, H, W] -> float32 [B, C, size, size] in 0..255, not rounded.

    tensorflow  bilinear between pixel corners, the operator of the 2015 graph (EDM, ADM, TF-GAN, torch-fidelity)
    torch       bilinear between pixel centres, no anti-aliasing (pytorch-fid)
    clean       Pillow's bicubic with anti-aliasing, on floats, cut to 0..255 (clean-fid, arXiv 2104.11222)
    """
    rows, columns = (resize_matrix(n, size, kernel).to(images.device) for n in images.shape[2:])
    resized = rows @ images.float() @ columns.T
    return resized.clamp(0, 255) if kernel == "clean" else resized  # only a bicubic overshoots


@cache
def resize_matrix(n: int, size: int, kernel: str) -> Tensor:
    """[size, n]: what `size` output pixels take of n input pixels."""
    if kernel == "tensorflow":
        return _corner_bilinear(n, size)
    # each column is the answer to one lit pixel; the other axis keeps its length
    lit = torch.eye(n)[None, None]
    if kernel == "torch":
        out = F.interpolate(lit, (size, n), mode="bilinear", align_corners=False)
    elif kernel == "clean":
        # Pillow takes its weights in double precision
        out = F.interpolate(lit.double(), (size, n), mode="bicubic", align_corners=False, antialias=True).float()
    else:
        raise ValueError(f"no resize kernel is called {kernel!r}")
    return out[0, 0]


def _corner_bilinear(n: int, size: int) -> Tensor:
    # positions in float32, as the operator computes them: 299/32 is not a float32 number
    position = torch.arange(size, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
    low = position.long()
    weight = position - low
    matrix = torch.zeros(size, n)
    at = torch.arange(size)
    matrix[at, low] = 1 - weight
    matrix[at, (low + 1).clamp(max=n - 1)] += weight
    return matrix
