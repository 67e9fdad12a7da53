"""Linear combinations of images: one new image, one pass over it per term.

A solver's differences are kept as weights (numbers, or a number per channel or pixel) until the end. Each temporary
image saved is a pass over memory saved, and on a CPU often its allocation too, which costs several passes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

Weight = float | Tensor


def combine(first: tuple[Weight, Tensor], *others: tuple[Weight, Tensor]) -> Tensor:
    """sum_j weight_j x_j on a fresh tensor; a weight is a number, or a tensor that broadcasts to x."""
    weight, x = first
    return add_(weight * x, *others)


def add_(total: Tensor, *terms: tuple[Weight, Tensor]) -> Tensor:
    """`total` += sum_j weight_j x_j in place: for tensors that nobody else has seen."""
    for weight, x in terms:
        if isinstance(weight, Tensor):
            total.addcmul_(weight, x)
        else:
            total.add_(x, alpha=weight)
    return total


def unit_weights(n: int) -> Sequence[np.ndarray]:
    """The weights [n] of each of n model terms in terms of all: what differences of them are written in."""
    return list(np.eye(n))


def weighted(weights: Iterable[float], terms: Iterable[Tensor]) -> list[tuple[Weight, Tensor]]:
    """Pairs for `combine`."""
    return [(float(w), x) for w, x in zip(weights, terms, strict=True)]
