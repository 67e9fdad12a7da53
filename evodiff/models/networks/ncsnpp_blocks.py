"""Blocks of the networks of score_sde (Song et al., arXiv 2011.13456, appendix H)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.models.networks.functional import attention, fir_down, fir_kernel, fir_up, nearest_up


@dataclass(frozen=True)
class Style:
    """What all blocks of one network share. `fir` is the resampling filter, or None for nearest and 2x2 mean."""

    groups: Callable[[int], int]
    temb_channels: int
    dropout: float
    fir: tuple[float, ...] | None
    residual_scale: float
    shortcut: str

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(self.groups(channels), channels, eps=1e-6)


class Resample(nn.Module):
    """Twice (`up`) or half the resolution, without parameters."""

    kernel: Tensor | None

    def __init__(self, up: bool, fir: Sequence[float] | None):
        super().__init__()
        self.up = up
        self.register_buffer("kernel", None if fir is None else fir_kernel(fir), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return nearest_up(x) if self.up else F.avg_pool2d(x, 2)
        return fir_up(x, self.kernel) if self.up else fir_down(x, self.kernel)


class NIN(nn.Module):
    """A 1x1 convolution kept as y = x W + b over channels, W [in, out]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(in_channels, out_channels) / math.sqrt(in_channels))
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.T[:, :, None, None], self.b)


class ResBlock(nn.Module):
    """BigGAN-style residual block, `up` or `down` inside it, or DDPM's, which differs only in its 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, style: Style, up: bool = False, down: bool = False):
        super().__init__()
        self.style = style
        self.GroupNorm_0 = style.norm(in_channels)
        self.resample = Resample(up, style.fir) if up or down else nn.Identity()
        self.Conv_0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.Dense_0 = nn.Linear(style.temb_channels, out_channels) if style.temb_channels else None
        self.GroupNorm_1 = style.norm(out_channels)
        self.Conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels or up or down:
            make = NIN if style.shortcut == "NIN_0" else lambda i, o: nn.Conv2d(i, o, 1)
            self.add_module(style.shortcut, make(in_channels, out_channels))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.Conv_0(self.resample(F.silu(self.GroupNorm_0(x))))
        if self.Dense_0 is not None:
            h = h + self.Dense_0(F.silu(temb))[:, :, None, None]
        h = self.Conv_1(F.dropout(F.silu(self.GroupNorm_1(h)), self.style.dropout, self.training))
        x = self.resample(x)
        if hasattr(self, self.style.shortcut):
            x = getattr(self, self.style.shortcut)(x)
        return (x + h) * self.style.residual_scale


class AttnBlock(nn.Module):
    """Self-attention of one head with a residual."""

    def __init__(self, channels: int, style: Style):
        super().__init__()
        self.style = style
        self.GroupNorm_0 = style.norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (layer(h).flatten(2)[:, None] for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        return (x + self.NIN_3(attention(q, k, v).reshape(x.shape))) * self.style.residual_scale


class Downsample(nn.Module):
    """Half the resolution outside a residual block: FIR and stride-2 convolution, or the convolution alone."""

    kernel: Tensor | None

    def __init__(self, in_channels: int, out_channels: int, fir: Sequence[float] | None = None):
        super().__init__()
        self.register_buffer("kernel", None if fir is None else fir_kernel(fir), persistent=False)
        self.name = "Conv_0" if fir is None else "Conv2d_0"
        self.add_module(self.name, nn.Conv2d(in_channels, out_channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        conv = self.get_submodule(self.name)
        if self.kernel is None:
            return conv(F.pad(x, (0, 1, 0, 1)))
        weight = self.kernel.expand(x.shape[1], 1, -1, -1)
        return conv(F.conv2d(x, weight, padding=self.kernel.shape[-1] // 2, groups=x.shape[1]))


class Upsample(nn.Module):
    """Nearest neighbour and convolution: DDPM's way to twice the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.Conv_0 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.Conv_0(nearest_up(x))


class Combine(nn.Module):
    """A 1x1 convolution of the input pyramid, added to the features or put before them."""

    def __init__(self, pyramid_channels: int, channels: int, cat: bool):
        super().__init__()
        self.cat = cat
        self.Conv_0 = nn.Conv2d(pyramid_channels, channels, 1)

    def forward(self, pyramid: Tensor, h: Tensor) -> Tensor:
        return torch.cat([self.Conv_0(pyramid), h], dim=1) if self.cat else self.Conv_0(pyramid) + h


class FourierProjection(nn.Module):
    """log sigma [B] -> (sin | cos)(2 pi W log sigma), [B, 2 nf]; W is drawn once and never trained."""

    def __init__(self, nf: int, scale: float):
        super().__init__()
        self.W = nn.Parameter(torch.randn(nf) * scale, requires_grad=False)

    def forward(self, log_sigma: Tensor) -> Tensor:
        angle = log_sigma[:, None] * self.W[None] * 2 * math.pi
        return torch.cat([angle.sin(), angle.cos()], dim=1)
