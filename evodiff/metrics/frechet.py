"""The Fréchet distance between two Gaussians, without a matrix square root."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.metrics.moments import Moments


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [d] and covariance [d, d] in float64, and from how many vectors they were estimated (None: unknown)."""

    mean: Tensor
    cov: Tensor
    n: int | None = None

    @classmethod
    def of(cls, moments: Moments) -> "Gaussian":
        return cls(moments.mean, moments.cov, moments.n)

    def __post_init__(self) -> None:
        d = len(self.mean)
        if self.mean.ndim != 1 or self.cov.shape != (d, d):
            raise MetricError(f"mean {tuple(self.mean.shape)} and covariance {tuple(self.cov.shape)} do not fit")
        if not (self.mean.isfinite().all() and self.cov.isfinite().all()):
            raise MetricError("mean or covariance is not finite: the features overflow or hold NaN")

    @property
    def max_rank(self) -> int:
        d = len(self.mean)
        return d if self.n is None else min(d, self.n - 1)

    @cached_property
    def factor(self) -> Tensor:
        """F [d, r] with F F^T = cov, computed once: Cholesky, or the leading eigenvectors of a deficient covariance."""
        if self.max_rank == len(self.mean):
            factor, failed = torch.linalg.cholesky_ex(self.cov)
            if not failed:
                return factor
        values, vectors = torch.linalg.eigh(self.cov)
        values, vectors = values[-self.max_rank :], vectors[:, -self.max_rank :]
        kept = values > values[-1] * len(self.mean) * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Gaussian | Moments, b: Gaussian | Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared 2-Wasserstein distance (Dowson and Landau 1982).

    With S_b = F F^T the trace of the root is the sum of the roots of the eigenvalues of the symmetric F^T S_a F.
    Exactly 0 for equal inputs, symmetric to rounding, never negative and never NaN. F is taken from the argument of
    lower rank, otherwise from b: pass the reference there, its factor is kept. Raises MetricError if dimensions differ.
    """
    a, b = (Gaussian.of(g) if isinstance(g, Moments) else g for g in (a, b))
    if a.mean.shape != b.mean.shape:
        raise MetricError(f"distributions of dimension {len(a.mean)} and {len(b.mean)} cannot be compared")
    if torch.equal(a.mean, b.mean) and torch.equal(a.cov, b.cov):
        return 0.0
    if a.max_rank < b.max_rank:
        a, b = b, a
    # NumPy's OpenBLAS needs three quarters of the time of torch's MKL here (results/bench/metrics.md)
    eigenvalues = np.linalg.eigvalsh(_lower_of_product(b.factor, a.cov).numpy(), UPLO="L")
    cross = np.sqrt(eigenvalues.clip(min=0)).sum()
    difference = a.mean - b.mean
    return max(0.0, (difference @ difference + a.cov.trace() + b.cov.trace() - 2 * cross).item())


def _lower_of_product(f: Tensor, s: Tensor, block: int = 256) -> Tensor:
    """F^T S F, of which only the lower triangle is right: where F is lower triangular its zeros are skipped, in blocks
    of columns, which is a third of the multiplications."""
    d, rank = f.shape
    if rank < d or f.triu(1).any():
        return f.T @ s @ f
    sf = torch.cat([s[:, j:] @ f[j:, j : j + block] for j in range(0, d, block)], dim=1)
    product = torch.zeros_like(s)
    for i in range(0, d, block):
        product[i : i + block, : i + block] = f[i:, i : i + block].T @ sf[i:, : i + block]
    return product
