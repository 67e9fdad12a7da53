"""The Inception Score (arXiv 1606.03498)."""

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError

SPLITS = 10
SHUFFLE_SEED = 2020
"""torch-fidelity's; splitting images that are sorted by class would lower the score."""


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) | p(y)): mean and standard deviation over `splits` parts of shuffled logits [n, k]."""
    n = len(logits)
    if n < splits:
        raise MetricError(f"an Inception Score in {splits} parts needs at least {splits} images, and there are {n}")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(n)  # noqa: NPY002  the generator torch-fidelity uses
    scores = []
    for i in range(splits):
        part = order[i * n // splits : (i + 1) * n // splits]
        log_p = logits[torch.from_numpy(part)].double().log_softmax(1)
        p = log_p.exp()
        log_marginal = p.mean(0).log()
        # a class that no image of the part can have: 0 log 0
        divergence = torch.where(p > 0, p * (log_p - log_marginal), 0.0).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))
