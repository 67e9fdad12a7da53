"""Linear combinations of images, and the types of a solver's fields."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from evodiff.errors import ConfigError
from evodiff.fields import matches
from evodiff.grid import LogSNR, Spacing
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.linear import add_, combine, unit_weights, weighted

X = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PER_CHANNEL = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)


@pytest.mark.parametrize("first", [1.0, 1, -0.3, PER_CHANNEL])
@pytest.mark.parametrize("second", [0.7, PER_CHANNEL])
def test_combine_is_the_sum_on_a_fresh_tensor(first, second):
    before = X.clone()
    out = combine((first, X[0]), (second, X[1]), (-1.0, X[2]))
    torch.testing.assert_close(out, first * X[0] + second * X[1] - X[2], rtol=1e-14, atol=1e-14)
    alone = combine((first, X[0]))
    alone += 1
    out += 1
    assert torch.equal(X, before)


def test_add_is_in_place():
    total = X[0].clone()
    assert add_(total, (2.0, X[1]), (PER_CHANNEL, X[2])) is total
    torch.testing.assert_close(total, X[0] + 2 * X[1] + PER_CHANNEL * X[2], rtol=1e-14, atol=1e-14)


def test_weights_of_differences():
    """(m0 - m1) / 2 + m2 as weights, and as what they are weights of."""
    m0, m1, m2 = unit_weights(3)
    w = (m0 - m1) / 2 + m2
    np.testing.assert_array_equal(w, [0.5, -0.5, 1])
    torch.testing.assert_close(combine(*weighted(w, X)), (X[0] - X[1]) / 2 + X[2], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (float, [1, 0.5], [True, "1", None, float("nan"), float("inf")]),
        (int, [1], [True, 1.0, "1"]),
        (bool, [True], [1, "true"]),
        (str, ["a"], [1, None]),
        (float | None, [None, 1.0], ["null"]),
        (tuple[int, ...] | None, [None, (1, 2), [3]], [(1.5,), 3, "12"]),
        (Spacing, [LogSNR()], ["logsnr", {"a": 1}, None]),
        (DDIM, [DDIM()], [LogSNR(), "ddim"]),
        (object, [1, "a", None], []),
    ],
)
def test_types_of_fields(hint, good, bad):
    assert all(matches(value, hint) for value in good)
    assert not any(matches(value, hint) for value in bad)


def test_a_solver_of_ones_own_is_checked_too():
    @dataclass(frozen=True)
    class Mine(DDIM):
        strength: int = 1

    assert Mine(strength=3).strength == 3
    with pytest.raises(ConfigError, match="Mine: strength='much' is impossible; possible: a whole number"):
        Mine(strength="much")
