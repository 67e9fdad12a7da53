"""The Kernel Inception Distance (arXiv 1801.01401): an unbiased estimate of a squared MMD."""

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError

SUBSETS = 100
SUBSET_SIZE = 1000
SUBSET_SEED = 2020
"""All three as in torch-fidelity."""


def kid(fake: Tensor, real: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of `size` rows of features [n, d] and [m, d]; slightly below 0 is
    possible and right. Computed in float64. Raises MetricError when there are fewer rows than `size`."""
    if min(len(fake), len(real)) < size:
        raise MetricError(
            f"KID takes subsets of {size}, and there are {len(fake)} generated and {len(real)} real images: "
            f"score more images, or leave kid out"
        )
    draw = np.random.RandomState(SUBSET_SEED)  # noqa: NPY002  torch-fidelity's subsets
    values = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(draw.choice(len(fake), size, replace=False))]
        y = real[torch.from_numpy(draw.choice(len(real), size, replace=False))]
        values.append(mmd2(x.double(), y.double()))
    return float(np.mean(values)), float(np.std(values))


def mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of [n, d] and [m, d] under k(a, b) = (a.b / d + 1)^3."""
    within = sum(_mean_off_diagonal(_kernel(a, a)) for a in (x, y))
    return (within - 2 * _kernel(x, y).mean()).item()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    k = (a @ b.T).div_(a.shape[1]).add_(1)
    return k * k * k


def _mean_off_diagonal(k: Tensor) -> Tensor:
    return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
