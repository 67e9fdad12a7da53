"""How far a Fréchet distance can be trusted: its error bar, its dependence on N, its limit."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments

GROUPS = 20


def jackknife(parts: Iterable[Moments], total: Moments, reference: Gaussian) -> float:
    """Standard error of the distance of `total`, the sum of `parts`, to `reference`, by leaving out one part at a time.

    Parts should be of about equal size and independent (`groups`, shards of seeds). It is the scatter from this choice
    of images; the bias from their finite number is not in it.
    """
    distances = []
    for part in parts:
        rest = Moments(total.n - part.n, total.total - part.total, total.outer - part.outer)
        distances.append(frechet_distance(rest, reference))
    g = len(distances)
    if g < 2:
        raise MetricError(f"a jackknife needs at least 2 parts, and there is {g}")
    return math.sqrt((g - 1) * np.var(distances))


def groups(features: Tensor, count: int = GROUPS, seed: int = 0) -> Iterator[Moments]:
    """Moments of `count` random parts of features [n, d]: in a folder, neighbours are often of one class."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    return (_moments(features, rows) for rows in order.tensor_split(min(count, len(features))))


def frechet_infinity(
    features: Tensor, reference: Gaussian, points: int = 15, smallest: int = 5000, seed: int = 0
) -> float:
    """The distance at N -> infinity (arXiv 1911.07023): the intercept of a line in 1/N through `points` subset sizes.

    Sizes are even from `smallest` (or a tenth of n, if that is less) to n; subsets are random, as in the paper.
    """
    n = len(features)
    smallest = min(smallest, n // 10)
    if smallest < 2:
        raise MetricError(f"a limit in N needs at least 20 images, and there are {n}")
    draw = np.random.default_rng(seed)
    sizes = np.linspace(smallest, n, points).astype(int)
    subsets = (torch.from_numpy(draw.permutation(n)[:size]) for size in sizes)
    distances = [frechet_distance(_moments(features, subset), reference) for subset in subsets]
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)


def _moments(features: Tensor, rows: Tensor) -> Moments:
    """Of some rows, without a copy of them all."""
    moments = Moments.zeros(features.shape[1])
    for part in rows.split(4096):
        moments.add(features[part])
    return moments
