"""The solvers of this project inside other libraries."""

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from evodiff.solvers.base import Solver
from evodiff.solvers.evodiff import EVODiff


def images(x: Tensor) -> Tensor:
    """[B, C, H, W] as it is; samples of another shape (sound, video, tokens) as one channel each, [B, 1, N, 1]."""
    return x if x.ndim == 4 else x.reshape(len(x), 1, -1, 1)


def ending(solver: Solver, given: Collection[str], to_zero: bool) -> Solver:
    """`solver`, but EVODiff with `final` euler where the last evaluation is the result (`to_zero`) unless it is given.

    Its released last step scales the state by 1 - sqrt(kappa_t kappa_s): it is for the end of a run, at small noise.
    Other programs ask once more wherever that step ends, in few steps at kappa = 0.5, a third of the state being left.
    """
    if to_zero and isinstance(solver, EVODiff) and "final" not in given:
        return replace(solver, final="euler")
    return solver
