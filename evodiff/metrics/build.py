"""Making reference statistics from images."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.metrics.features import Extractor
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import Protocol
from evodiff.metrics.reference import Reference

NOISE_FLOOR_SEED = 0


def build_reference(batches: Iterable[Tensor], extract: Extractor, protocol: Protocol, **provenance: Any) -> Reference:
    """Reference statistics and features of uint8 images [B, C, H, W]; `provenance` is stored with them.

    Stores the noise floor too: the distance between two random halves of the real images, what chance alone does at
    that number.
    """
    parts: list[Tensor] = []
    size: list[int] | None = None
    spatial: Moments | None = None
    for images in batches:
        if size not in (None, [images.shape[3], images.shape[2]]):
            raise MetricError(f"reference images must be of one size; there are {size} and {list(images.shape[:1:-1])}")
        size = [images.shape[3], images.shape[2]]
        out = extract(images)
        parts.append(out.features)
        if out.spatial is not None:
            spatial = spatial or Moments.zeros(out.spatial.shape[1])
            spatial.add(out.spatial)
    if not parts:
        raise MetricError("there are no images to make reference statistics of")
    features = torch.cat(parts)
    about = {
        **provenance,
        "image_size": size,
        "extractor": extract.name,
        "extractor_sha256": extract.sha256,
        "extractor_resize": protocol.resize,
        "extractor_scaling": protocol.scaling,
        "noise_floor": noise_floor(features),
    }
    return Reference(Gaussian.of(Moments.of(features)), about, Gaussian.of(spatial) if spatial else None, features)


def noise_floor(features: Tensor, seed: int = NOISE_FLOOR_SEED) -> dict[str, float | int] | None:
    """Fréchet distance between the two halves of `features` [n, d] in the order of numpy's PCG64(seed)."""
    half = len(features) // 2
    if half < 2:
        return None
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    a, b = features[order[:half]], features[order[half : 2 * half]]
    return {"distance": frechet_distance(Moments.of(a), Moments.of(b)), "n": half, "seed": seed}
