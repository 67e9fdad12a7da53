"""EVODiff in a pipeline of diffusers: one line, `pipe.scheduler = EVODiffScheduler.from_config(pipe.scheduler.config)`.

The network is the shipped one, dressed as the noise-predicting U-Net that DDPMPipeline expects. Needs `diffusers`.

    python examples/diffusers_pipeline.py [digits.png]
"""

import sys
from pathlib import Path

import torch
from torch import nn

from evodiff.interop.diffusers import EVODiffScheduler  # before diffusers itself: torchvision may need help

# isort: split
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from evodiff.models.mnist import mnist_tiny
from evodiff.schedule import DiscreteVP


class Digits(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size: int = 32, in_channels: int = 1):
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(1))  # pipelines ask a network for its dtype
        self.schedule, self.denoise = DiscreteVP.linear(), mnist_tiny().denoiser(None)

    def forward(self, x, timestep):
        node = self.schedule.node((float(timestep) + 1) / 1000)
        return UNet2DOutput(sample=(x - node.alpha * self.denoise(x, node)) / node.sigma)


def main(path: Path) -> None:
    pipe = DDPMPipeline(Digits(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    for name in ("DDIM", "EVODiff"):
        if name == "EVODiff":
            pipe.scheduler = EVODiffScheduler.from_config(pipe.scheduler.config, spacing="logsnr")
        images = pipe(8, torch.Generator().manual_seed(0), num_inference_steps=8).images
        for i, image in enumerate(images):
            image.save(path.with_name(f"{path.stem}_{name}_{i}.png"))
        print(f"{name}: {len(images)} images in 8 steps, {path.stem}_{name}_0.png ...")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pipeline.png"))
