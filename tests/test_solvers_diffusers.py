"""Samplers without a released golden, against recorded runs of the library diffusers (golden/diffusers/record.py)."""

import pytest

from evodiff.solvers.ddim import DDIM
from evodiff.verify import schedulers


@pytest.mark.parametrize("name", schedulers.SOLVERS)
def test_agrees_with_diffusers(name):
    error, same_nfe = schedulers.repeat(name)
    assert error < schedulers.SOLVERS[name][1]
    assert same_nfe


def test_the_comparison_can_fail(monkeypatch):
    monkeypatch.setitem(schedulers.SOLVERS, "ddim_0.5", (DDIM(eta=0.51), 1e-11))
    assert schedulers.repeat("ddim_0.5")[0] > 1e-4
