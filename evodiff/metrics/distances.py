"""Distances between states, for models whose exact solution can be had: no features involved."""

import math

import torch
from torch import Tensor


def rmse(x: Tensor, exact: Tensor) -> float:
    """Root of the mean squared difference over all entries; both of one shape, in the units of the states."""
    if x.shape != exact.shape:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(exact.shape)} differ")
    return (x.double() - exact.double()).square().mean().sqrt().item()


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance between samples [n, ...] and [m, ...] (Bonneel et al. 2015, definition 9).

    Root of the mean, over `projections` random directions of unit length, of the squared 2-Wasserstein distance between
    the projected samples; in the units of the states. For Gaussians that differ by a shift s it tends to |s| / sqrt(d).
    """
    return wasserstein_of_columns(project(x, projections, seed), project(y, projections, seed))


def project(x: Tensor, projections: int = 256, seed: int = 0) -> Tensor:
    """Samples [n, ...] on random directions of unit length, [n, projections] in float64; a function of the seed."""
    flat = x.flatten(1).double().cpu()
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(flat.shape[1], projections, generator=random, dtype=torch.float64)
    return flat @ (directions / directions.norm(dim=0))


def wasserstein_of_columns(a: Tensor, b: Tensor) -> float:
    """Root mean square, over the columns of [n, p] and [m, p], of their 2-Wasserstein distances."""
    a, b = a.sort(dim=0).values, b.sort(dim=0).values
    if len(a) != len(b):
        a, b = _on_common_steps(a, b)
    return (a - b).square().mean().sqrt().item()


def _on_common_steps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both quantile functions, which are steps of height 1/n and 1/m, on the steps of 1/lcm(n, m)."""
    steps = math.lcm(len(a), len(b))
    return a.repeat_interleave(steps // len(a), 0), b.repeat_interleave(steps // len(b), 0)
