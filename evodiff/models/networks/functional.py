"""Operations that every U-Net here is made of: sinusoidal embeddings, attention, separable FIR resampling."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoids(t: Tensor, channels: int, endpoint: bool, max_period: float = 10000) -> tuple[Tensor, Tensor]:
    """(cos, sin) of t / max_period^(i / n), n = channels / 2, or n - 1 with `endpoint`; each [B, channels / 2].

    score_sde and DDIM concatenate sin | cos with the endpoint, guided-diffusion cos | sin without it.
    """
    half = channels // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(i * (-math.log(max_period) / (half - endpoint)))
    return angle.cos(), angle.sin()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(C)) v over tokens; q, k, v and the result [B, heads, C, T], channels before tokens."""
    # the fused kernels want a token's channels side by side; the other ones hold the [T, T] matrix, in float32
    q, k, v = (part.transpose(2, 3).contiguous() for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3)


def fir_kernel(taps: Sequence[float]) -> Tensor:
    """The separable filter f f^T / sum(f)^2 as [1, 1, n, n]; real numbers even where modules are built on `meta`."""
    f = torch.tensor(list(taps), dtype=torch.float32, device="cpu")
    return (f.outer(f) / f.sum().square())[None, None]


def fir_up(x: Tensor, kernel: Tensor) -> Tensor:
    """x [B, C, H, W] at twice the resolution: zeros between the pixels, then the filter with gain 4."""
    pad = (kernel.shape[-1] - 1) // 2
    weight = (kernel * 4).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=2, padding=pad, groups=x.shape[1])


def fir_down(x: Tensor, kernel: Tensor, padding: int | None = None) -> Tensor:
    """x filtered, then every second pixel."""
    pad = (kernel.shape[-1] - 1) // 2 if padding is None else padding
    return F.conv2d(x, kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1), stride=2, padding=pad, groups=x.shape[1])


def nearest_up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
