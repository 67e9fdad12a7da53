"""Between two network calls nothing waits for the device: no step reads a number back from a tensor."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evodiff.config import build, choices, compose
from evodiff.errors import BudgetError
from evodiff.grid import LogSNR, grid_for
from evodiff.noise import SeededNoise
from evodiff.sampling import integrate
from evodiff.schedule import EDM


class ReadBack(TorchDispatchMode):
    """Counts the operations that copy a value of a tensor to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


class Shrink:
    schedule = EDM()

    def __call__(self, x, node):
        return x / (1 + node.kappa**2)


def read_backs(name):
    solver = build(compose("run", [f"solver={name}"]).solver)
    for nfe in range(8, 20):
        try:
            ready = solver if solver.adaptive else solver.for_budget(nfe)
            grid = grid_for(None if solver.adaptive else nfe, ready, LogSNR(), EDM())
            break
        except BudgetError:
            continue
    noise = SeededNoise(range(2))
    x = 80 * noise.latents((1, 4, 4)).double()
    with ReadBack() as mode:
        integrate(ready, Shrink(), x, grid, noise)
    return mode.count, solver.adaptive


@pytest.mark.parametrize("name", choices("solver"))
def test_no_step_waits(name):
    count, adaptive = read_backs(name)
    if adaptive:
        assert count > 0, "it chooses its steps by an error that it has to read"
    else:
        assert count == 0
