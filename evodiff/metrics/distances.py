"""What is measured on samples without features: how far they are from a converged run's, and how they look."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from evodiff.store import SampleStore


def rmse(store: SampleStore, reference: SampleStore, of: str = "x") -> float:
    """Root mean square of x - x_ref over all samples and pixels of the same seeds, x in [-1, 1] and beyond."""
    total, count = 0.0, 0
    pairs = (recut(s.batches("seeds", of)) for s in (store, reference))
    for (seeds, x), (ref_seeds, ref) in zip(*pairs, strict=True):
        assert np.array_equal(seeds, ref_seeds)
        total += float(((x.astype(np.float64) - ref) ** 2).sum())
        count += x.size
    return float(np.sqrt(total / count))


def rmse_images(store: SampleStore, reference: SampleStore) -> float:
    """The same of the images, in the same units: what lies beyond [-1, 1] is clipped, and grey levels are rounded,
    which alone makes up to 0.003."""
    return rmse(store, reference, of="images") / 127.5


def sliced_wasserstein(store: SampleStore, reference: SampleStore) -> float:
    """Sliced 2-Wasserstein distance between the states of two runs (Bonneel et al. 2015, definition 9).

    Root of the mean, over random directions of unit length, of the squared 2-Wasserstein distance between the projected
    samples; in the units of the states. For Gaussians that differ by a shift s it tends to |s| / sqrt(d).
    """
    a, b = (torch.cat([project(torch.from_numpy(x)) for (x,) in s.batches("x")]) for s in (store, reference))
    return wasserstein_of_columns(a, b)


def project(x: Tensor, projections: int = 256, seed: int = 0) -> Tensor:
    """Samples [n, ...] on random directions of unit length, [n, projections] in float64; a function of the seed."""
    flat = x.flatten(1).double().cpu()
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(flat.shape[1], projections, generator=random, dtype=torch.float64)
    return flat @ (directions / directions.norm(dim=0))


def wasserstein_of_columns(a: Tensor, b: Tensor) -> float:
    """Root mean square, over the columns of two [n, p], of their 2-Wasserstein distances."""
    return (a.sort(dim=0).values - b.sort(dim=0).values).square().mean().sqrt().item()


def contrast(images: np.ndarray) -> np.ndarray:
    """Standard deviation of each image's pixels, in grey levels: uint8 [N, C, H, W] -> [N]."""
    return images.reshape(len(images), -1).std(axis=1, dtype=np.float64)


def saturated(images: np.ndarray) -> np.ndarray:
    """Share of each image's values that are 0 or 255, where ends what lies beyond the range: [N, C, H, W] -> [N]."""
    return ((images == 0) | (images == 255)).mean((1, 2, 3))


AGAINST_REFERENCE: dict[str, Callable[[SampleStore, SampleStore], float]] = {
    "rmse": rmse,
    "rmse_images": rmse_images,
    "sw": sliced_wasserstein,
}
"""Distances of the states, or the images, to those of the reference run, which both have to keep."""
OF_IMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"contrast": contrast, "saturated": saturated}
"""What describes images and is neither good nor bad; of a run, the mean."""
FROM_IMAGES = {"rmse_images", *OF_IMAGES}
"""Metrics for which a run has to keep its images."""


def recut(parts: Iterator[tuple[np.ndarray, ...]], size: int = 500) -> Iterator[tuple[np.ndarray, ...]]:
    """The same rows in tuples of `size` rows, whatever the shards they lie in."""
    held: tuple[np.ndarray, ...] | None = None
    for part in parts:
        held = part if held is None else tuple(map(np.concatenate, zip(held, part, strict=True)))
        while len(held[0]) >= size:
            yield tuple(a[:size] for a in held)
            held = tuple(a[size:] for a in held)
    if held is not None and len(held[0]):
        yield held
