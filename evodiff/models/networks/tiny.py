"""The small network of `mnist_tiny`."""

from evodiff.models.networks.precond import EDMPrecond, PixelUnshuffled
from evodiff.models.networks.song_unet import SongUNet


def tiny_denoiser() -> EDMPrecond:
    """0.7 M parameters on 4x16x16: fast enough for a CPU, good enough for digits."""
    unet = SongUNet(
        img_resolution=16,
        in_channels=4,
        out_channels=4,
        model_channels=16,
        channel_mult=(1, 2, 4),
        num_blocks=1,
        attn_resolutions=(),
        dropout=0.0,
    )
    return EDMPrecond(PixelUnshuffled(unet, 2))
