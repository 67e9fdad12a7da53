"""The networks of score_sde (Song et al., arXiv 2011.13456, appendix H): DDPM++, NCSN++ and DDPM.

Keys are those of the published files: one flat list `all_modules`, in the order of the forward pass.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evodiff.errors import ConfigError
from evodiff.models.networks.functional import sinusoids
from evodiff.models.networks.ncsnpp_blocks import (
    AttnBlock,
    Combine,
    Downsample,
    FourierProjection,
    Resample,
    ResBlock,
    Style,
    Upsample,
)


class NCSNpp(nn.Module):
    """DDPM++, NCSN++ and, with `name="ddpm"`, the DDPM of score_sde.

    x [B, C, R, R] in [-1, 1] plus noise if `centered`, else in [0, 1]; `labels` [B]: sigma for Fourier embeddings, for
    positional ones 999 t, or with `scale_by_sigma` the index of sigma in `sigmas`. The output is the noise, or with
    `scale_by_sigma` the score.
    """

    sigmas: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        num_channels: int,
        centered: bool,
        nf: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        name: str = "ncsnpp",
        dropout: float = 0.1,
        conditional: bool = True,
        resamp_with_conv: bool = True,
        scale_by_sigma: bool = False,
        sigma_min: float = 0.01,
        sigma_max: float = 50,
        num_scales: int = 1000,
        embedding_type: str = "positional",
        fourier_scale: float = 16,
        resblock_type: str = "biggan",
        fir: bool = False,
        fir_kernel: Sequence[float] = (1, 3, 3, 1),
        skip_rescale: bool = False,
        progressive: str = "none",
        progressive_input: str = "none",
        progressive_combine: str = "sum",
    ):
        super().__init__()
        if name == "ddpm":  # the older code: its own names for the same choices
            embedding_type, resblock_type, fir, skip_rescale = "positional", "ddpm", False, False
        for key, value, known in (
            ("name", name, ("ncsnpp", "ddpm")),
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("resblock_type", resblock_type, ("biggan", "ddpm")),
            ("progressive", progressive, ("none", "output_skip")),
            ("progressive_input", progressive_input, ("none", "input_skip", "residual")),
            ("progressive_combine", progressive_combine, ("sum", "cat")),
        ):
            if value not in known:
                raise ConfigError(f"NCSNpp: {key}={value} is not supported; possible: {', '.join(known)}")
        self.image_size, self.levels, self.num_res_blocks = image_size, len(ch_mult), num_res_blocks
        self.attn_resolutions = tuple(attn_resolutions)
        self.nf, self.centered, self.conditional, self.scale_by_sigma = nf, centered, conditional, scale_by_sigma
        self.fourier, self.biggan = embedding_type == "fourier", resblock_type == "biggan"
        self.progressive, self.progressive_input = progressive, progressive_input
        sigmas = np.exp(np.linspace(float(np.log(sigma_max)), float(np.log(sigma_min)), num_scales))
        self.register_buffer("sigmas", torch.from_numpy(sigmas))

        taps = tuple(fir_kernel) if fir else None
        style = Style(
            groups=(lambda channels: 32) if name == "ddpm" else (lambda channels: min(channels // 4, 32)),
            temb_channels=4 * nf if conditional else 0,
            dropout=dropout,
            fir=taps,
            residual_scale=math.sqrt(0.5) if skip_rescale else 1.0,
            shortcut="Conv_2" if self.biggan else "NIN_0",
        )
        self.residual_scale = style.residual_scale
        self.pyramid_down, self.pyramid_up = Resample(False, taps), Resample(True, taps)
        self.all_modules = nn.ModuleList()
        add = self.all_modules.append

        if self.fourier:
            add(FourierProjection(nf, fourier_scale))
        if conditional:
            add(nn.Linear(2 * nf if self.fourier else nf, 4 * nf))
            add(nn.Linear(4 * nf, 4 * nf))
        add(nn.Conv2d(num_channels, nf, 3, padding=1))

        channels, skips, pyramid_channels = nf, [nf], num_channels
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                add(ResBlock(channels, nf * mult, style))
                channels = nf * mult
                if self.attends(level):
                    add(AttnBlock(channels, style))
                skips.append(channels)
            if level < self.levels - 1:
                if self.biggan:
                    add(ResBlock(channels, channels, style, down=True))
                else:
                    add(Downsample(channels, channels) if resamp_with_conv else Resample(False, None))
                if progressive_input == "input_skip":
                    cat = progressive_combine == "cat"
                    add(Combine(pyramid_channels, channels, cat))
                    channels *= 1 + cat
                elif progressive_input == "residual":
                    add(Downsample(pyramid_channels, channels, taps))
                    pyramid_channels = channels
                skips.append(channels)

        add(ResBlock(channels, channels, style))
        add(AttnBlock(channels, style))
        add(ResBlock(channels, channels, style))

        for level in range(self.levels - 1, -1, -1):
            for _ in range(num_res_blocks + 1):
                add(ResBlock(channels + skips.pop(), nf * ch_mult[level], style))
                channels = nf * ch_mult[level]
            if self.attends(level):
                add(AttnBlock(channels, style))
            if progressive == "output_skip":
                add(style.norm(channels))
                add(nn.Conv2d(channels, num_channels, 3, padding=1))
            if level > 0:
                if self.biggan:
                    add(ResBlock(channels, channels, style, up=True))
                else:
                    add(Upsample(channels) if resamp_with_conv else Resample(True, None))
        if progressive != "output_skip":
            add(style.norm(channels))
            add(nn.Conv2d(channels, num_channels, 3, padding=1))

    def attends(self, level: int) -> bool:
        return self.image_size >> level in self.attn_resolutions

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        take = iter(self.all_modules).__next__  # the list is in the order of use
        sigma = labels if self.fourier else self.sigmas[labels.long()].float() if self.scale_by_sigma else None
        if self.fourier:
            temb = take()(labels.log())
        else:
            cos, sin = sinusoids(labels, self.nf, endpoint=True)
            temb = torch.cat([sin, cos], dim=1)
        if self.conditional:
            temb = take()(temb)
            temb = take()(F.silu(temb))

        def resample(h: Tensor) -> Tensor:
            return take()(h, temb) if self.biggan else take()(h)

        def project(h: Tensor) -> Tensor:
            normed = take()(h)
            return take()(F.silu(normed))

        x = x if self.centered else 2 * x - 1
        pyramid = x
        skips = [take()(x)]
        for level in range(self.levels):
            for _ in range(self.num_res_blocks):
                h = take()(skips[-1], temb)
                skips.append(take()(h) if self.attends(level) else h)
            if level < self.levels - 1:
                h = resample(skips[-1])
                if self.progressive_input == "input_skip":
                    pyramid = self.pyramid_down(pyramid)
                    h = take()(pyramid, h)
                elif self.progressive_input == "residual":
                    h = pyramid = (take()(pyramid) + h) * self.residual_scale
                skips.append(h)

        h = take()(skips[-1], temb)
        h = take()(h)
        h = take()(h, temb)

        out: Tensor | None = None
        for level in range(self.levels - 1, -1, -1):
            for _ in range(self.num_res_blocks + 1):
                h = take()(torch.cat([h, skips.pop()], dim=1), temb)
            if self.attends(level):
                h = take()(h)
            if self.progressive == "output_skip":
                part = project(h)
                out = part if out is None else self.pyramid_up(out) + part
            if level > 0:
                h = resample(h)
        if out is None:
            out = project(h)
        return out if sigma is None or not self.scale_by_sigma else out / sigma.view(-1, 1, 1, 1)
