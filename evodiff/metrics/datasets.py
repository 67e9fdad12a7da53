"""The real images that reference statistics are made of, by name; crop variants are part of the name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evodiff.checkpoints.registry import offline
from evodiff.compat import import_torchvision
from evodiff.data import mnist_digits
from evodiff.errors import ConfigError
from evodiff.metrics.images import read_images

Prepare = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Dataset:
    """A torchvision data set, and how its images are cut and resized."""

    name: str
    arguments: dict[str, Any]
    crop: str
    resize: str
    prepare: Prepare


def _as_is(image: Image.Image) -> Image.Image:
    return image


def _centre(crop: int, size: int, kernel: Image.Resampling) -> Prepare:
    def prepare(image: Image.Image) -> Image.Image:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        return image.crop((left, top, left + crop, top + crop)).resize((size, size), kernel)

    return prepare


def _ddim_face(image: Image.Image) -> Image.Image:
    """The 128x128 window around pixel (89, 121) of an aligned CelebA face, as DDIM (arXiv 2010.02502) trains on."""
    return image.crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR)


def _shorter_side(size: int) -> Prepare:
    def prepare(image: Image.Image) -> Image.Image:
        scale = size / min(image.size)
        whole = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        return _centre(size, size, Image.Resampling.BICUBIC)(whole)

    return prepare


_CELEBA = {"split": "train", "target_type": []}
DATASETS = {
    "cifar10": Dataset("CIFAR10", {"train": True}, "none", "none", _as_is),
    "cifar10-test": Dataset("CIFAR10", {"train": False}, "none", "none", _as_is),
    "celeba64-ddim": Dataset("CelebA", _CELEBA, "128x128 at (25, 57)", "bilinear", _ddim_face),
    "celeba64-centre140": Dataset(
        "CelebA", _CELEBA, "centre 140", "bilinear", _centre(140, 64, Image.Resampling.BILINEAR)
    ),
    "celeba64-centre148": Dataset(
        "CelebA", _CELEBA, "centre 148", "bilinear", _centre(148, 64, Image.Resampling.BILINEAR)
    ),
    "lsun-bedroom256": Dataset("LSUN", {"classes": ["bedroom_train"]}, "centre", "bicubic", _shorter_side(256)),
}
SIDES = {"cifar10": 32, "lsun_bedroom": 256, "afhqv2": 64, "celeba64": 64, "ffhq64": 64}
SIDES |= {f"imagenet{side}": side for side in (64, 128, 256)}
"""Of the square images of a protocol's `dataset`: published statistics do not say it."""


def dataset_batches(
    name: str, root: Path, channels: int, batch: int = 64, limit: int | None = None, rounding: str = "round"
) -> tuple[Iterator[Tensor], dict[str, Any]]:
    """uint8 batches [B, C, H, W] of a data set in DATASETS, of `mnist`, or of the images at a path, and provenance.

    At a path `rounding` is as in read_images.

    torchvision keeps its data in `root`, and downloads CIFAR-10 and CelebA unless EVODIFF_OFFLINE is set. Raises
    ConfigError where it is absent.
    """
    if name == "mnist":
        images, _ = mnist_digits()
        return iter(images[:limit].split(batch)), {
            "dataset": "mnist",
            "crop": "none",
            "resize": "none, padded to 32x32",
        }
    if name not in DATASETS:
        if not Path(name).exists():
            raise ConfigError(
                f"{name!r} is no data set and no path; there are mnist, {', '.join(DATASETS)}, or give images"
            )
        if limit is not None:
            raise ConfigError("a limit is for named data sets; put fewer images in the folder")
        return read_images(Path(name), channels, rounding, batch), {"dataset": name, "crop": "none", "resize": "none"}
    dataset = DATASETS[name]
    source = _open(dataset, name, root)
    about = {"dataset": name, "crop": dataset.crop, "resize": dataset.resize}
    return _prepared(source, dataset.prepare, batch, limit), about


def _open(dataset: Dataset, name: str, root: Path) -> Any:
    import_torchvision()
    from torchvision import datasets

    download = {} if dataset.name == "LSUN" else {"download": not offline()}
    try:
        return getattr(datasets, dataset.name)(root, **dataset.arguments, **download)
    except Exception as e:
        if offline():
            raise ConfigError(
                f"{name} is not whole in {root} and EVODIFF_OFFLINE is set. On a machine with internet download "
                f"torchvision's {dataset.name}, and copy its folder there, or name another with --root."
            ) from e
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(
            f"{name} could not be opened in {root} or downloaded ({reason}); put torchvision's {dataset.name} there"
        ) from e


def _prepared(source: Any, prepare: Prepare, batch: int, limit: int | None) -> Iterator[Tensor]:
    count = len(source) if limit is None else min(limit, len(source))
    for start in range(0, count, batch):
        images = [np.array(prepare(source[i][0].convert("RGB"))) for i in range(start, min(start + batch, count))]
        yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
