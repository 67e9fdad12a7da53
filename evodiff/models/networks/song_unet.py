"""SongUNet: the DDPM++ and NCSN++ networks of Song et al. (arXiv 2011.13456) as EDM rebuilt them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.models.networks.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)


class SongUNet(nn.Module):
    """U-Net F(x, noise_labels) of EDM (arXiv 2206.00364, table 7). Keys are those of the published pickles.

    DDPM++: embedding positional, encoder and decoder standard, resample_filter (1, 1), channel_mult_noise 1.
    NCSN++: embedding fourier, encoder residual, resample_filter (1, 3, 3, 1), channel_mult_noise 2.
    x [B, in_channels, R, R], noise_labels [B], class_labels [B, label_dim] one-hot or None.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        for name, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"SongUNet: {name}={value!r} is unknown; possible: {', '.join(known)}")
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        block: dict[str, Any] = {
            "emb_channels": emb_channels,
            "num_heads": 1,
            "dropout": dropout,
            "skip_scale": math.sqrt(0.5),
            "eps": 1e-6,
            "resample_filter": resample_filter,
            "resample_proj": True,
            "adaptive_scale": False,
            "gain_zero": 1e-5,
            "gain_attention": math.sqrt(0.2),
        }

        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        def at(level: int) -> str:
            return f"{img_resolution >> level}x{img_resolution >> level}"

        self.enc = nn.ModuleDict()
        c_out = c_aux = in_channels
        skips = []
        for level, mult in enumerate(channel_mult):
            if level == 0:
                c_in, c_out = c_out, model_channels
                self.enc[f"{at(level)}_conv"] = Conv2d(c_in, c_out, 3)
            else:
                self.enc[f"{at(level)}_down"] = UNetBlock(c_out, c_out, down=True, **block)
                if encoder_type == "skip":
                    self.enc[f"{at(level)}_aux_down"] = Conv2d(
                        c_aux, c_aux, 0, down=True, resample_filter=resample_filter
                    )
                    self.enc[f"{at(level)}_aux_skip"] = Conv2d(c_aux, c_out, 1)
                if encoder_type == "residual":
                    self.enc[f"{at(level)}_aux_residual"] = Conv2d(
                        c_aux, c_out, 3, down=True, resample_filter=resample_filter, fused=True
                    )
                    c_aux = c_out
            skips.append(c_out)
            for i in range(num_blocks):
                c_in, c_out = c_out, model_channels * mult
                attention = img_resolution >> level in attn_resolutions
                self.enc[f"{at(level)}_block{i}"] = UNetBlock(c_in, c_out, attention=attention, **block)
                skips.append(c_out)

        self.dec = nn.ModuleDict()
        last = len(channel_mult) - 1
        for level in range(last, -1, -1):
            if level == last:
                self.dec[f"{at(level)}_in0"] = UNetBlock(c_out, c_out, attention=True, **block)
                self.dec[f"{at(level)}_in1"] = UNetBlock(c_out, c_out, **block)
            else:
                self.dec[f"{at(level)}_up"] = UNetBlock(c_out, c_out, up=True, **block)
            for i in range(num_blocks + 1):
                c_in, c_out = c_out + skips.pop(), model_channels * channel_mult[level]
                attention = i == num_blocks and img_resolution >> level in attn_resolutions
                self.dec[f"{at(level)}_block{i}"] = UNetBlock(c_in, c_out, attention=attention, **block)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < last:
                    self.dec[f"{at(level)}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{at(level)}_aux_norm"] = GroupNorm(c_out, eps=1e-6)
                self.dec[f"{at(level)}_aux_conv"] = Conv2d(c_out, out_channels, 3, gain=1e-5)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)

        out: Tensor | None = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                h = F.silu(layer(x))
            elif "aux_conv" in name:
                h = layer(h)
                out = h if out is None else out + h
            else:
                if "_block" in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        assert out is not None  # level 0 always has an output convolution
        return out

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)  # score_sde's order, kept by EDM
        if self.map_label is not None:
            if class_labels is None:
                class_labels = emb.new_zeros(1, self.map_label.in_features)
            if self.training and self.label_dropout:
                keep = torch.rand(len(emb), 1, device=emb.device) >= self.label_dropout
                class_labels = class_labels * keep
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
