"""Making reference statistics from images."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evodiff.metrics.features import Extractor
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.metrics.reference import Reference

NOISE_FLOOR_SEED = 0


def build_reference(batches: Iterable[Tensor], extract: Extractor, **provenance: Any) -> Reference:
    """Reference statistics and features of uint8 images [B, C, H, W]; `provenance` is stored with them.

    Stores the noise floor too: the distance between two random halves of the real images, below which no score on that
    many images has a meaning.
    """
    sizes = set()
    parts = []
    for images in batches:
        sizes.add((images.shape[3], images.shape[2]))
        parts.append(extract(images).features)
    features = torch.cat(parts)
    about = {
        **provenance,
        "image_size": sorted(map(list, sizes)),
        "extractor": extract.name,
        "extractor_sha256": extract.sha256,
        "noise_floor": noise_floor(features),
    }
    return Reference(Gaussian.of(Moments.of(features)), about, features=features)


def noise_floor(features: Tensor, seed: int = NOISE_FLOOR_SEED) -> dict[str, float | int]:
    """Fréchet distance between the two halves of `features` [n, d] in the order of numpy's PCG64(seed)."""
    half = len(features) // 2
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    a, b = features[order[:half]], features[order[half : 2 * half]]
    return {"distance": frechet_distance(Moments.of(a), Moments.of(b)), "n": half, "seed": seed}
