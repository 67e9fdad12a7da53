"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797), from k-nearest-neighbour balls."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evodiff.errors import MetricError

BLOCK_BYTES = 128 * 2**20
"""Distances held at one time."""
PIECE = 4096
"""Rows centred at one time."""
NEIGHBOURS = 3


@dataclass(frozen=True)
class Coverage:
    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(fake: Tensor, real: Tensor, k: int = NEIGHBOURS) -> Coverage:
    """Of features [n, d] of generated and [m, d] of real images. The ball of a point reaches to its k-th neighbour in
    its own set (k = 3 as in torch-fidelity and ADM; the authors of density and coverage use 5).

    precision  generated points in some real ball          recall    real points in some generated ball
    density    real balls around a generated point, over k  coverage  real balls that hold a generated point

    Distances are taken block by block, in the dtype of the features. Raises MetricError below k + 1 points.
    """
    if min(len(fake), len(real)) <= k:
        raise MetricError(f"balls of {k} neighbours need more than {k} images; there are {len(fake)} and {len(real)}")
    centre = real.mean(0)
    fake_radii, real_radii = (_squared_radii(points, k, centre) for points in (fake, real))
    precise = balls = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for rows, distances in _blocks(fake, real, centre):
        in_real = distances <= real_radii
        precise += int(in_real.any(1).sum())
        balls += int(in_real.sum())
        covered |= in_real.any(0)
        recalled |= (distances <= fake_radii[rows, None]).any(0)
    n, m = len(fake), len(real)
    return Coverage(precise / n, recalled.sum().item() / m, balls / (k * n), covered.sum().item() / m)


def _squared_radii(points: Tensor, k: int, centre: Tensor) -> Tensor:
    # the nearest is the point itself
    return torch.cat([d.topk(k + 1, largest=False).values[:, k] for _, d in _blocks(points, points, centre)])


def _blocks(a: Tensor, b: Tensor, centre: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of some rows of a to all rows of b.

    From inner products, which far from the origin cancel badly: both sides are taken relative to `centre`, piece by
    piece so that neither is copied as a whole.
    """
    size = max(1, BLOCK_BYTES // (len(b) * b.element_size()))
    distances = torch.empty(min(size, len(a)), len(b), dtype=b.dtype)
    norms = torch.cat([(piece - centre).square().sum(1) for piece in b.split(PIECE)])
    for start in range(0, len(a), size):
        rows = slice(start, min(start + size, len(a)))
        part = a[rows] - centre
        block = distances[: len(part)]
        for column in range(0, len(b), PIECE):
            columns = slice(column, column + PIECE)
            block[:, columns] = part @ (b[columns] - centre).T
        block.mul_(-2).add_(norms).add_(part.square().sum(1, keepdim=True)).clamp_(min=0)
        yield rows, block
