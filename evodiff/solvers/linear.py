"""Linear combinations of images: one new image, one pass over it per term.

A temporary image costs a pass to write and one to read, and on a CPU often the allocation of its pages, which is
several passes more. So differences of model terms are weights of these terms until the state is built from them.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Term = tuple[float | Tensor, Tensor]
"""A weight, which is a number or broadcasts to the image, and the image."""


def combine(*terms: Term) -> Tensor:
    """sum_j weight_j x_j on a fresh tensor."""
    (weight, x), *others = terms
    if others and not isinstance(weight, Tensor) and weight == 1:
        (w, y), *others = others
        return add_(torch.addcmul(x, w, y) if isinstance(w, Tensor) else torch.add(x, y, alpha=w), *others)
    return add_(weight * x, *others)


def add_(total: Tensor, *terms: Term) -> Tensor:
    """`total` += sum_j weight_j x_j in place: for tensors that nobody else has seen."""
    for weight, x in terms:
        if isinstance(weight, Tensor):
            total.addcmul_(weight, x)
        else:
            total.add_(x, alpha=weight)
    return total


def unit_weights(n: int) -> list[np.ndarray]:
    """m_0, m_1, ... m_{n-1} as weights [n] of themselves: differences of model terms are differences of these."""
    return list(np.eye(n))


def weighted(weights: Iterable[float], terms: Iterable[Tensor]) -> list[Term]:
    """The terms of sum_j weights_j terms_j for `combine`."""
    return [(float(weight), x) for weight, x in zip(weights, terms, strict=True)]
