"""Blocks shared by the U-Nets: resampling convolutions, group norm, attention, noise embeddings.

Attribute names are those of the published EDM checkpoints, so that a `state_dict` of theirs loads unchanged.
Source of the mathematics: Karras et al., EDM (arXiv 2206.00364), appendix C and table 7.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.models.networks.functional import attention, fir_down, fir_kernel, fir_up, nearest_up, sinusoids


def xavier_uniform_(weight: Tensor, fan_in: int, fan_out: int, gain: float = 1.0) -> None:
    """Fill with U(-a, a), a = gain sqrt(6 / (fan_in + fan_out)) (EDM table 7, DDPM++ column)."""
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    with torch.no_grad():
        weight.uniform_(-bound, bound)


def kaiming_uniform_(weight: Tensor, fan_in: int, fan_out: int, gain: float = 1.0) -> None:
    """Fill with U(-a, a), a = gain sqrt(3 / fan_in)."""
    bound = gain * math.sqrt(3 / fan_in)
    with torch.no_grad():
        weight.uniform_(-bound, bound)


class Linear(nn.Linear):
    """`nn.Linear` with the initialisation of the EDM networks: `init(weight, fan_in, fan_out, gain)`, bias zero."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init=xavier_uniform_, gain=1.0):
        super().__init__(in_features, out_features, bias)
        init(self.weight, in_features, out_features, gain)
        if bias:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Module):
    """Convolution, optionally after doubling (`up`) or halving (`down`) the resolution with a separable FIR filter.

    `kernel=0` only resamples. `fused` convolves before the filter (EDM's residual encoder skips need it).
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
        init=xavier_uniform_,
        gain: float = 1.0,
    ):
        super().__init__()
        self.up, self.down, self.fused = up, down, fused
        self.weight = self.bias = None
        if kernel:
            fan_in, fan_out = in_channels * kernel**2, out_channels * kernel**2
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(out_channels))
            init(self.weight, fan_in, fan_out, gain)
        self.box = len(resample_filter) == 2 and resample_filter[0] == resample_filter[1]  # 2x2 mean, nearest neighbour
        self.register_buffer("resample_filter", fir_kernel(resample_filter) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return self.resample(x)
        pad = self.weight.shape[-1] // 2
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if self.fused and self.down:
            f_pad = (self.resample_filter.shape[-1] - 1) // 2
            return fir_down(F.conv2d(x, weight, bias, padding=pad + f_pad), self.resample_filter, padding=0)
        return F.conv2d(self.resample(x), weight, bias, padding=pad)

    def resample(self, x: Tensor) -> Tensor:
        if self.up:
            return nearest_up(x) if self.box else fir_up(x, self.resample_filter)
        if self.down:
            return F.avg_pool2d(x, 2) if self.box else fir_down(x, self.resample_filter)
        return x


class GroupNorm(nn.GroupNorm):
    """Group norm of min(32, channels // 4) groups, of inputs in half precision in float32, returned in their dtype."""

    def __init__(self, channels: int, eps: float):
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps).to(x.dtype)


class PositionalEmbedding(nn.Module):
    """t [B] -> (cos | sin)(t / max_positions^(i / n)), n = half, or half - 1 if `endpoint`. [B, channels]."""

    def __init__(self, channels: int, max_positions: float = 10000, endpoint: bool = False):
        super().__init__()
        self.channels, self.max_positions, self.endpoint = channels, max_positions, endpoint

    def forward(self, t: Tensor) -> Tensor:
        return torch.cat(sinusoids(t, self.channels, self.endpoint, self.max_positions), dim=1)


class FourierEmbedding(nn.Module):
    """t [B] -> (cos | sin)(2 pi f t) with fixed random frequencies f ~ N(0, scale^2). [B, channels]."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.outer((2 * math.pi * self.freqs).to(t.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional resampling and self-attention (EDM appendix C, one block).

    `adaptive_scale`: the embedding scales and shifts after the second norm (ADM) instead of being added before it
    (DDPM++). The qkv channels are laid out per head with q, k, v as the fastest index.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init=xavier_uniform_,
        gain: float = 1.0,
        gain_zero: float = 0.0,
        gain_attention: float | None = None,
    ):
        super().__init__()
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        self.num_heads = 0
        if attention:
            self.num_heads = num_heads if num_heads is not None else out_channels // channels_per_head
        how = {"init": init, "gain": gain}
        zero = {"init": init, "gain": gain_zero}

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up, down, resample_filter, **how)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **how)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **zero)

        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, up, down, resample_filter, **how)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            attn = how if gain_attention is None else {"init": init, "gain": gain_attention}
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, **attn)
            self.proj = Conv2d(out_channels, out_channels, 1, **zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + params))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            x = (self.proj(self.attend(self.norm2(x))) + x) * self.skip_scale
        return x

    def attend(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(x).reshape(B, self.num_heads, C // self.num_heads, 3, H * W)
        return attention(*qkv.unbind(3)).reshape(B, C, H, W)
