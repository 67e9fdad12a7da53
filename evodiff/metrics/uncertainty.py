"""How far a Fréchet distance can be trusted: its error bar, its dependence on N, its limit."""

import math

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments

ROWS = 4096
"""Images looked at together."""
SMALLEST_SUBSET = 2
"""Images per feature of the smallest subset of a limit, about as many as the paper's 5,000 are of Inception's."""
LEAST_FOR_A_LIMIT = 20
"""Images, of which the smallest subset is a tenth: two. Many features need more: see `least_for_a_limit`."""


def influence(features: Tensor, reference: Gaussian) -> Tensor:
    """How much each image of features [n, d] moves the Frechet distance to `reference`: [n], of mean 0.

    To first order the distance is a mean over images, of its derivative by the weight of each: with mean m and
    covariance S, and m_r, S_r = F F^T of the reference,

        2 (x - m).(m - m_r) + (x - m)^T (I - F (F^T S F)^(-1/2) F^T) (x - m), less its mean.
    """
    moments = Moments.of(features)
    mean, factor = moments.mean, reference.factor
    values, vectors = torch.linalg.eigh(factor.T @ moments.cov @ factor)
    kept = values > values[-1:] * len(mean) * torch.finfo(torch.float64).eps
    root = factor @ vectors[:, kept] * values[kept] ** -0.25
    moved = []
    for rows in features.split(ROWS):
        x = rows.double() - mean
        moved.append(2 * x @ (mean - reference.mean) + x.square().sum(1) - (x @ root).square().sum(1))
    found = torch.cat(moved)
    return found - found.mean()


def standard_error(influence: Tensor) -> float:
    """Of a distance, from the influence of each of its images; of the difference between two runs of the same seeds,
    from the difference of their influences.

    It is the scatter from this choice of images; the bias from their finite number is not in it. Where the distance is
    of the order of that bias this is an upper estimate, up to twice the scatter: the first order, of which it is made,
    no longer outweighs the second.
    """
    if len(influence) < 2:
        raise MetricError(f"a standard error needs at least 2 images, and there is {len(influence)}")
    return influence.std().item() / math.sqrt(len(influence))


def frechet_infinity(
    features: Tensor, reference: Gaussian, points: int = 15, smallest: int = 5000, seed: int = 0
) -> float:
    """The distance at N -> infinity (arXiv 1911.07023): the intercept of a line in 1/N through `points` subset sizes.

    Sizes are even from `smallest` (or a tenth of n, if that is less) to n, but from twice the number of features at
    least: with fewer images the distance is not linear in 1/N. Subsets are random, as in the paper. Raises MetricError
    below `least_for_a_limit` images.
    """
    n, d = features.shape
    if n < (least := least_for_a_limit(d)):
        raise MetricError(f"a limit in N of {d} features needs at least {least} images, and there are {n}")
    smallest = max(min(smallest, n // 10), SMALLEST_SUBSET * d)
    draw = np.random.default_rng(seed)
    sizes = np.linspace(smallest, n, points).astype(int)
    subsets = (torch.from_numpy(draw.permutation(n)[:size]) for size in sizes)
    distances = [frechet_distance(Moments.of(features, subset), reference) for subset in subsets]
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)


def least_for_a_limit(features: int) -> int:
    """Images, of which the smallest subset may be half: 8,192 of Inception's 2,048 features."""
    return max(LEAST_FOR_A_LIMIT, 2 * SMALLEST_SUBSET * features)
