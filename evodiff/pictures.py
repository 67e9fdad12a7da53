"""Images as files: a PNG of many, or one of each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evodiff.files import whole_file


def save_grid(path: Path, images: np.ndarray, columns: int, scale: int = 2) -> None:
    """uint8 [N, C, H, W] as one PNG, row by row, with a thin gap; every pixel `scale` x `scale`."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0) if channels == 3 else image[0][..., None]
    with whole_file(path) as temporary:
        Image.fromarray(canvas.repeat(scale, 0).repeat(scale, 1)).save(temporary)


def png_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def save_pngs(folder: Path, seeds: Sequence[int], images: np.ndarray) -> None:
    """uint8 [N, C, H, W] as `000012.png` for seed 12, each file whole or absent; compressed without loss. One that is
    there is left as it is."""
    for seed, image in zip(seeds, images, strict=True):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        if not (path := png_path(folder, seed)).exists():
            with whole_file(path) as temporary:
                Image.fromarray(pixels).save(temporary)


def mosaic(images: np.ndarray, across: int) -> np.ndarray:
    """The first `across`^2 images [N, C, H, W] as one [across H, across W, C], without gaps."""
    _, channels, height, width = images.shape
    tiles = images[: across**2].reshape(across, across, channels, height, width)
    return tiles.transpose(0, 3, 1, 4, 2).reshape(across * height, across * width, channels)
