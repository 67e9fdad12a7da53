"""The Inception Score (arXiv 1606.03498)."""

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError

PARTS = 10
SHUFFLE_SEED = 2020
"""torch-fidelity's; splitting images that are sorted by class would lower the score."""


def inception_score(logits: Tensor, part: int | None = None) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) | p(y)): mean and standard deviation over parts of the shuffled logits [n, k].

    A part has `part` images, the last one perhaps fewer; None: a tenth of them, as torch-fidelity takes.
    """
    n = len(logits)
    if n < PARTS:
        raise MetricError(f"an Inception Score needs at least {PARTS} images, and there are {n}")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(n)  # noqa: NPY002  the generator torch-fidelity uses
    cuts = [i * n // PARTS for i in range(1, PARTS)] if part is None else range(part, n, part)
    scores = []
    for chosen in np.split(order, cuts):
        log_p = logits[torch.from_numpy(chosen)].double().log_softmax(1)
        p = log_p.exp()
        log_marginal = p.mean(0).log()
        # a class that no image of the part can have: 0 log 0
        divergence = torch.where(p > 0, p * (log_p - log_marginal), 0.0).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))
