"""Between two network calls nothing waits for the device: no step reads a number back from a tensor."""

import pytest

from evodiff.config import build, choices, compose
from evodiff.errors import BudgetError
from evodiff.grid import LogSNR, grid_for
from evodiff.noise import SeededNoise
from evodiff.sampling import integrate
from evodiff.schedule import EDM

READING = {
    "probability_flow": "its steps are chosen by an error",
    "ts_ddim": "its times are chosen by the variance of the state",
    "ts_fpndm": "likewise, after its first three steps of four evaluations",
}


class Shrink:
    schedule = EDM()

    def __call__(self, x, node):
        return x / (1 + node.kappa**2)


def sample(name, device):
    solver = build(compose("run", [f"solver={name}"]).solver)
    for nfe in range(24, 40):
        try:
            ready = solver if solver.adaptive else solver.for_budget(nfe)
            grid = grid_for(None if solver.adaptive else nfe, ready, LogSNR(), EDM())
            break
        except BudgetError:
            continue
    noise = SeededNoise(range(2))
    x = 80 * noise.latents((1, 4, 4)).double().to(device)
    return integrate(ready, Shrink(), x, grid, noise)


@pytest.mark.parametrize("name", sorted({*choices("solver")} - READING.keys()))
def test_no_step_waits(name):
    """Tensors on `meta` have no values: whatever reads one, by item, tolist or a copy to the CPU, raises."""
    assert sample(name, "meta").is_meta


@pytest.mark.parametrize("name", READING)
def test_the_others_have_to_read(name):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        sample(name, "meta")
