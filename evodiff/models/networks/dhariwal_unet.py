"""DhariwalUNet: the ADM network of Dhariwal & Nichol (arXiv 2105.05233) as EDM rebuilt it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.models.networks.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    kaiming_uniform_,
)


class DhariwalUNet(nn.Module):
    """U-Net F(x, noise_labels) of EDM (arXiv 2206.00364, table 7, column ADM). Keys are those of the published pickles.

    x [B, in_channels, R, R], noise_labels [B], class_labels [B, label_dim] one-hot or None.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        self.label_dim, self.label_dropout = label_dim, label_dropout
        emb_channels = model_channels * channel_mult_emb
        how: dict[str, Any] = {"init": kaiming_uniform_, "gain": math.sqrt(1 / 3)}
        block: dict[str, Any] = {"emb_channels": emb_channels, "channels_per_head": 64, "dropout": dropout, **how}

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            Linear(augment_dim, model_channels, bias=False, init=kaiming_uniform_, gain=0.0) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels, **how)
        self.map_layer1 = Linear(emb_channels, emb_channels, **how)
        self.map_label = (
            Linear(label_dim, emb_channels, bias=False, init=kaiming_uniform_, gain=math.sqrt(label_dim))
            if label_dim
            else None
        )

        def at(level: int) -> str:
            return f"{img_resolution >> level}x{img_resolution >> level}"

        self.enc = nn.ModuleDict()
        channels = model_channels * channel_mult[0]
        self.enc[f"{at(0)}_conv"] = Conv2d(in_channels, channels, 3, **how)
        skips = [channels]
        for level, mult in enumerate(channel_mult):
            attention = img_resolution >> level in attn_resolutions
            if level > 0:
                self.enc[f"{at(level)}_down"] = UNetBlock(channels, channels, down=True, **block)
                skips.append(channels)
            for i in range(num_blocks):
                c_in, channels = channels, model_channels * mult
                self.enc[f"{at(level)}_block{i}"] = UNetBlock(c_in, channels, attention=attention, **block)
                skips.append(channels)

        self.dec = nn.ModuleDict()
        last = len(channel_mult) - 1
        for level in range(last, -1, -1):
            attention = img_resolution >> level in attn_resolutions
            if level == last:
                self.dec[f"{at(level)}_in0"] = UNetBlock(channels, channels, attention=True, **block)
                self.dec[f"{at(level)}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{at(level)}_up"] = UNetBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                c_in, channels = channels + skips.pop(), model_channels * channel_mult[level]
                self.dec[f"{at(level)}_block{i}"] = UNetBlock(c_in, channels, attention=attention, **block)
        self.out_norm = GroupNorm(channels, eps=1e-5)
        self.out_conv = Conv2d(channels, out_channels, 3, init=kaiming_uniform_, gain=0.0)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            if class_labels is None:
                class_labels = emb.new_zeros(1, self.label_dim)
            if self.training and self.label_dropout:
                class_labels = class_labels * (torch.rand(len(emb), 1, device=emb.device) >= self.label_dropout)
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)
