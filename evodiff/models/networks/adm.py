"""The networks of guided-diffusion (Dhariwal & Nichol, arXiv 2105.05233): the ADM U-Net and its classifier.

Keys are those of the published files. `attention_resolutions` are factors of downsampling, not sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evodiff.errors import ConfigError
from evodiff.models.networks.adm_blocks import (
    AttentionBlock,
    AttentionPool,
    Block,
    Downsample,
    Norm,
    ResBlock,
    Upsample,
)
from evodiff.models.networks.functional import sinusoids


@dataclass(frozen=True)
class ADMConfig:
    """Constructor arguments of the published networks, by their names; `pool` is the classifier's head."""

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    dropout: float = 0.0
    channel_mult: Sequence[float] = (1, 2, 4, 8)
    conv_resample: bool = True
    num_classes: int | None = None
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    pool: str = "adaptive"


class Encoder(nn.Module):
    """What the U-Net and the classifier share: the embedding, the way down and the middle."""

    def __init__(self, config: ADMConfig):
        super().__init__()
        self.config = config
        width, emb_channels = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb_channels)

        channels = int(config.channel_mult[0] * width)
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        self.widths = [channels]  # of the skip connections
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [self.res_block(channels, int(mult * width))]
                channels = int(mult * width)
                if 2**level in config.attention_resolutions:
                    layers.append(self.attention_block(channels, config.num_heads))
                self.input_blocks.append(Block(*layers))
                self.widths.append(channels)
            if level < len(config.channel_mult) - 1:
                down: nn.Module = Downsample(channels, config.conv_resample)
                if config.resblock_updown:
                    down = self.res_block(channels, channels, down=True)
                self.input_blocks.append(Block(down))
                self.widths.append(channels)
        self.middle_block = Block(
            self.res_block(channels, channels),
            self.attention_block(channels, config.num_heads),
            self.res_block(channels, channels),
        )

    def res_block(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        c = self.config
        return ResBlock(channels, 4 * c.model_channels, c.dropout, out_channels, c.use_scale_shift_norm, up, down)

    def attention_block(self, channels: int, num_heads: int) -> AttentionBlock:
        per_head = self.config.num_head_channels
        heads = num_heads if per_head == -1 else channels // per_head
        return AttentionBlock(channels, heads, self.config.use_new_attention_order)

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        emb = self.time_embed(torch.cat(sinusoids(t, self.config.model_channels, endpoint=False), dim=1))
        conditional = self.config.num_classes is not None
        if conditional != (y is not None):
            kind = "class-conditional and needs" if conditional else "unconditional and takes no"
            raise ConfigError(f"this network is {kind} labels")
        return emb if y is None else emb + self.label_emb(y)

    def encode(self, x: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """The outputs of all input blocks, and of the middle."""
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return skips, self.middle_block(h, emb)


class UNetModel(Encoder):
    """ADM's U-Net: x [B, in_channels, R, R] in [-1, 1], t [B] the label 0..999, whole or not, y int64 [B] or None.

    Returns the noise, followed by the learned variance where `out_channels` is twice `in_channels`; float32.
    """

    def __init__(self, config: ADMConfig):
        super().__init__(config)
        heads = config.num_heads if config.num_heads_upsample == -1 else config.num_heads_upsample
        widths, channels = list(self.widths), self.widths[-1]
        self.output_blocks = nn.ModuleList()
        for level in range(len(config.channel_mult) - 1, -1, -1):
            for i in range(config.num_res_blocks + 1):
                out = int(config.model_channels * config.channel_mult[level])
                layers: list[nn.Module] = [self.res_block(channels + widths.pop(), out)]
                channels = out
                if 2**level in config.attention_resolutions:
                    layers.append(self.attention_block(channels, heads))
                if level > 0 and i == config.num_res_blocks:
                    up: nn.Module = Upsample(channels, config.conv_resample)
                    if config.resblock_updown:
                        up = self.res_block(channels, channels, up=True)
                    layers.append(up)
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(
            Norm(channels), nn.SiLU(), nn.Conv2d(self.widths[0], config.out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.embed(t, y)
        skips, h = self.encode(x, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))


class EncoderUNetModel(Encoder):
    """ADM's classifier of noisy images: x and t as for the U-Net -> logits [B, out_channels] in float32."""

    def __init__(self, config: ADMConfig):
        super().__init__(config)
        channels, out = self.widths[-1], config.out_channels
        features = sum(self.widths) + channels  # every input block and the middle
        match config.pool:
            case "adaptive":
                head = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, out, 1), nn.Flatten())
                self.out = nn.Sequential(Norm(channels), nn.SiLU(), *head)
            case "attention":
                size = config.image_size >> (len(config.channel_mult) - 1)
                if config.num_head_channels == -1:
                    raise ConfigError("classifier: pool=attention needs num_head_channels")
                pool = AttentionPool(size, channels, config.num_head_channels, out)
                self.out = nn.Sequential(Norm(channels), nn.SiLU(), pool)
            case "spatial":
                self.out = nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out))
            case "spatial_v2":
                self.out = nn.Sequential(nn.Linear(features, 2048), Norm(2048), nn.SiLU(), nn.Linear(2048, out))
            case other:
                known = "adaptive, attention, spatial, spatial_v2"
                raise ConfigError(f"classifier: pool={other} does not exist; possible: {known}")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skips, h = self.encode(x, self.embed(t, None))
        if self.config.pool.startswith("spatial"):
            return self.out(torch.cat([part.to(x.dtype).mean(dim=(2, 3)) for part in (*skips, h)], dim=1))
        return self.out(h.to(x.dtype))
