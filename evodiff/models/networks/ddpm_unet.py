"""The DDPM network (Ho et al., arXiv 2006.11239) as in the code of DDIM (arXiv 2010.02502): CelebA, CIFAR-10, LSUN."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.models.networks.functional import attention, nearest_up, sinusoids


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + W silu(temb)))), with a 1x1 convolution of x where channels change."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), self.dropout, self.training))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """Self-attention of one head with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2)[:, None] for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attention(q, k, v).reshape(x.shape))


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and below only; 2x2 mean without `with_conv`."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution if `with_conv`."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return nearest_up(x) if self.conv is None else self.conv(nearest_up(x))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if there is any, and a change of resolution."""

    def __init__(self, blocks: list[ResnetBlock], with_attention: bool, **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        channels = [block.conv2.out_channels for block in blocks]
        self.attn = nn.ModuleList([AttnBlock(c) for c in channels] if with_attention else [])
        for name, module in resample.items():  # "downsample" or "upsample"
            self.add_module(name, module)

    @property
    def resample(self) -> nn.Module | None:
        return self._modules.get("downsample") or self._modules.get("upsample")

    def apply_block(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        x = self.block[i](x, temb)
        return self.attn[i](x) if self.attn else x


class DDPMUNet(nn.Module):
    """eps(x, t): x [B, in_channels, R, R] in [-1, 1], t [B] the label 0..num_timesteps - 1, whole or not.

    Keys are those of ermongroup/ddim's `Model`; `up` is indexed by level, 0 the full resolution.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_ch: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
    ):
        super().__init__()
        self.ch = ch
        temb_ch = 4 * ch
        attends = [image_size >> level in attn_resolutions for level in range(len(ch_mult))]
        last = len(ch_mult) - 1

        self.temb = nn.ModuleDict({"dense": nn.ModuleList([nn.Linear(ch, temb_ch), nn.Linear(temb_ch, temb_ch)])})
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)

        channels, skips = ch, [ch]
        self.down: Any = nn.ModuleList()
        for level, mult in enumerate(ch_mult):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(channels, ch * mult, temb_ch, dropout))
                channels = ch * mult
                skips.append(channels)
            down = {"downsample": Downsample(channels, resamp_with_conv)} if level < last else {}
            skips += [channels] * bool(down)
            self.down.append(Level(blocks, attends[level], **down))

        self.mid = nn.ModuleDict(
            {
                "block_1": ResnetBlock(channels, channels, temb_ch, dropout),
                "attn_1": AttnBlock(channels),
                "block_2": ResnetBlock(channels, channels, temb_ch, dropout),
            }
        )

        ups: list[Level] = []
        for level in range(last, -1, -1):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(channels + skips.pop(), ch * ch_mult[level], temb_ch, dropout))
                channels = ch * ch_mult[level]
            up = {"upsample": Upsample(channels, resamp_with_conv)} if level > 0 else {}
            ups.insert(0, Level(blocks, attends[level], **up))
        self.up: Any = nn.ModuleList(ups)

        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cos, sin = sinusoids(t, self.ch, endpoint=True)
        first, second = self.temb["dense"].children()
        temb = second(F.silu(first(torch.cat([sin, cos], dim=1))))
        skips = [self.conv_in(x)]
        for level in self.down:
            for i in range(len(level.block)):
                skips.append(level.apply_block(i, skips[-1], temb))
            if level.resample is not None:
                skips.append(level.resample(skips[-1]))
        h = self.mid["attn_1"](self.mid["block_1"](skips[-1], temb))
        h = self.mid["block_2"](h, temb)
        for level in reversed(self.up):
            for i in range(len(level.block)):
                h = level.apply_block(i, torch.cat([h, skips.pop()], dim=1), temb)
            if level.resample is not None:
                h = level.resample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
