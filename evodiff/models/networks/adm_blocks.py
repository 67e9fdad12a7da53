"""Blocks of the networks of guided-diffusion (Dhariwal & Nichol, arXiv 2105.05233)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.models.networks.functional import attention, nearest_up


class Norm(nn.GroupNorm):
    """Group norm of 32 groups, computed in float32 whatever the input."""

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class ResBlock(nn.Module):
    """Residual block; the embedding scales and shifts after the second norm, or is added before it."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.use_scale_shift_norm, self.up, self.down = use_scale_shift_norm, up, down
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (1 + use_scale_shift_norm)))
        self.out_layers = nn.Sequential(
            Norm(out_channels), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def resample(self, x: Tensor) -> Tensor:
        return nearest_up(x) if self.up else F.avg_pool2d(x, 2) if self.down else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        emb_out = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(self.resample(x)) + h


class Downsample(nn.Module):
    """Stride-2 convolution, or a 2x2 mean."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if with_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution if `with_conv`."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nearest_up(x))


def heads_first(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """[B, 3C, T] -> q, k, v as [3, B, heads, C / heads, T].

    The channels of the published networks are heads x (q, k, v) x C/heads; in the `new_order`, q, k, v come first.
    """
    B, width, T = qkv.shape
    if new_order:
        return qkv.view(B, 3, heads, width // 3 // heads, T).transpose(0, 1)
    return qkv.view(B, heads, 3, width // 3 // heads, T).permute(2, 0, 1, 3, 4)


class AttentionBlock(nn.Module):
    """Self-attention with a residual."""

    def __init__(self, channels: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        q, k, v = heads_first(self.qkv(self.norm(flat)), self.heads, self.new_order)
        return (flat + self.proj_out(attention(q, k, v).reshape(flat.shape))).view(x.shape)


class AttentionPool(nn.Module):
    """The pixels and their mean attend to each other; the mean's token is the output (CLIP, arXiv 2103.00020)."""

    def __init__(self, size: int, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + self.positional_embedding
        q, k, v = heads_first(self.qkv_proj(tokens), self.heads, new_order=True)
        # only the first token is kept, so only it need attend
        return self.c_proj(attention(q[..., :1], k, v).reshape(len(x), -1, 1))[:, :, 0]


class Block(nn.Sequential):
    """Layers one after the other; residual blocks also see the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x
