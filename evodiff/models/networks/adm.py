"""The networks of guided-diffusion (Dhariwal & Nichol, arXiv 2105.05233): the ADM U-Net and its classifier.

Keys are those of the published files. `attention_resolutions` are factors of downsampling, not sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.errors import ConfigError
from evodiff.models.networks.functional import attention, nearest_up, sinusoids


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


class Encoder(nn.Module):
    """What the U-Net and the classifier share: the embedding, the way down and the middle."""

    def __init__(self, config: ADMConfig):
        super().__init__()
        self.config, self.dtype = config, torch.float32
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

    def halve(self) -> Self:
        """Convolutions between the first and the last in half precision, as published; the rest stays float32."""
        self.dtype = torch.float16
        for name in ("input_blocks", "middle_block", "output_blocks"):
            for layer in getattr(self, name, nn.Module()).modules():
                if isinstance(layer, nn.Conv1d | nn.Conv2d):
                    layer.half()
        return self

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        emb = self.time_embed(torch.cat(sinusoids(t, self.config.model_channels, endpoint=False), dim=1))
        conditional = self.config.num_classes is not None
        if conditional != (y is not None):
            kind = "class-conditional and needs" if conditional else "unconditional and takes no"
            raise ConfigError(f"this network is {kind} labels")
        return emb if y is None else emb + self.label_emb(y)

    def encode(self, x: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """The outputs of all input blocks, and of the middle."""
        h, skips = x.to(self.dtype), []
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
