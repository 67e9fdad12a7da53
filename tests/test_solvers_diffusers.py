"""Samplers without a released golden, against recorded runs of the library diffusers (golden/diffusers/record.py)."""

import pytest

from evodiff.solvers.ddim import DDIM
from evodiff.solvers.score_sde import PredictorCorrector
from evodiff.verify import schedulers


@pytest.mark.parametrize("name", schedulers.SOLVERS)
def test_agrees_with_diffusers(name):
    error, same_nfe = schedulers.repeat(name)
    assert error < schedulers.SOLVERS[name][1]
    assert same_nfe


@pytest.mark.parametrize(("name", "wrong"), [("ddim_0.5", DDIM(eta=0.51)), ("pc", PredictorCorrector(snr=0.161))])
def test_the_comparison_can_fail(monkeypatch, name, wrong):
    monkeypatch.setitem(schedulers.SOLVERS, name, (wrong, 0))
    assert schedulers.repeat(name)[0] > 1e-4
