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


def build_reference(
    batches: Iterable[Tensor], extract: Extractor, protocol: Protocol, *, features: bool = True, **provenance: Any
) -> Reference:
    """Reference statistics of uint8 images [B, C, H, W], and their `features`, which kid and pr need; `provenance` is
    stored with them. Without features the memory it takes does not grow with the number of images.

    Stores the noise floor too: the distance between two random halves of the real images, what chance alone does at
    that number.
    """
    parts: list[Tensor] = []
    halves = [Moments.zeros(extract.dim), Moments.zeros(extract.dim)]
    draw = np.random.default_rng(NOISE_FLOOR_SEED)
    size: list[int] | None = None
    spatial: Moments | None = None
    for images in batches:
        if size not in (None, [images.shape[3], images.shape[2]]):
            raise MetricError(f"reference images must be of one size; there are {size} and {list(images.shape[:1:-1])}")
        size = [images.shape[3], images.shape[2]]
        out = extract(images)
        if features:
            parts.append(out.features)
        else:
            first = torch.from_numpy(draw.random(len(images)) < 0.5)
            for half, own in zip(halves, (first, ~first), strict=True):
                half.add(out.features[own])
        if out.spatial is not None:
            spatial = spatial or Moments.zeros(out.spatial.shape[1])
            spatial.add(out.spatial)
    if size is None:
        raise MetricError("there are no images to make reference statistics of")
    kept = torch.cat(parts) if features else None
    parts.clear()  # of millions of images they would not fit in memory twice
    about = {
        **provenance,
        "image_size": size,
        "extractor": extract.name,
        "extractor_sha256": extract.sha256,
        "extractor_resize": protocol.resize,
        "extractor_scaling": protocol.scaling,
        "noise_floor": _floor(halves[0], halves[1]) if kept is None else noise_floor(kept),
    }
    gaussian = Gaussian.of(halves[0] + halves[1] if kept is None else Moments.of(kept))
    return Reference(gaussian, about, Gaussian.of(spatial) if spatial else None, kept)


def noise_floor(features: Tensor, seed: int = NOISE_FLOOR_SEED) -> dict[str, float | int] | None:
    """Fréchet distance between the two halves of `features` [n, d] in the order of numpy's PCG64(seed)."""
    half = len(features) // 2
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    return _floor(Moments.of(features, order[:half]), Moments.of(features, order[half : 2 * half]), seed)


def _floor(a: Moments, b: Moments, seed: int = NOISE_FLOOR_SEED) -> dict[str, float | int] | None:
    n = min(a.n, b.n)
    return {"distance": frechet_distance(a, b), "n": n, "seed": seed} if n > 1 else None
