"""`evodiff gits`: time grids by dynamic programming on the model's own trajectories (GITS, arXiv 2405.11326).

From fine trajectories of some samples, cost[i, j] is the error of one Euler (DDIM) step from node i to node j. The grid
of n steps is the path of n edges from the first node to the last whose cost, with each later step weighted gamma times
the one before it, is smallest. Two metrics, as in the released code: `dev`, how much farther from the straight line
between the trajectory's ends the step lands than the trajectory is; `l2`, the distance from the trajectory.

The result is a JSON file for `grid=file`: a mapping from the number of steps to times.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError, SamplingError
from evodiff.files import whole_file
from evodiff.grid import Karras, TimeGrid
from evodiff.models.pretrained import Pretrained
from evodiff.noise import SeededNoise
from evodiff.paths import results_folder
from evodiff.progress import progress
from evodiff.sampling import integrate, start
from evodiff.schedule import Node
from evodiff.solvers.dpmpp import DPMSolverPP


class Recorder:
    """A denoiser that keeps y = x / alpha and eps of every call, float64 on the CPU."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.y: list[Tensor] = []
        self.eps: list[Tensor] = []

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        D = self.denoiser(x, node)
        self.y.append((x / node.alpha).double().cpu())
        self.eps.append(((x - node.alpha * D) / node.sigma).double().cpu())
        return D


def costs(denoiser: Denoiser, x: Tensor, grid: TimeGrid, metric: str = "dev") -> np.ndarray:
    """[M + 1, M + 1]: mean cost over the samples of a DDIM step in y from node i to node j > i; inf where j <= i.

    The trajectory is that of 2nd-order DPM-Solver++ from x [B, C, H, W] at the first node.
    """
    recorder = Recorder(denoiser)
    integrate(DPMSolverPP(order=2, lower_order_final=False), recorder, x, grid, denoise_final=True)
    kappa = [node.kappa for node in grid.nodes]
    y, eps = torch.stack(recorder.y), torch.stack(recorder.eps)
    off_line = deviation(y, y[0], y[-1])
    cost = np.full((len(kappa), len(kappa)), np.inf)
    for i in range(len(kappa) - 1):
        dk = torch.tensor(kappa[i + 1 :], dtype=y.dtype) - kappa[i]
        steps = y[i] + dk.view(-1, *[1] * x.ndim) * eps[i]
        if metric == "dev":
            errors = deviation(steps, y[0], y[-1]) - off_line[i + 1 :]
        else:
            errors = (steps - y[i + 1 :]).flatten(2).norm(dim=2)
        cost[i, i + 1 :] = errors.mean(1).numpy()
    return cost


def deviation(y: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Distance [n, B] of points y [n, B, C, H, W] from the lines between `first` and `last` [B, C, H, W]."""
    a, line = (last - y).flatten(2), (last - first).flatten(1)
    line = line / line.norm(dim=1, keepdim=True)
    return (a - (a * line).sum(2, keepdim=True) * line).norm(dim=2)


def shortest(cost: np.ndarray, steps: int, gamma: float) -> list[int]:
    """The best path of `steps` edges from the first node to the last: V_k(j) = min_i cost[j, i] + gamma V_{k-1}(i)."""
    value = np.full(len(cost), np.inf)
    value[-1] = 0.0
    after = []
    for _ in range(steps):
        through = cost + gamma * value
        after.append(through.argmin(1))
        value = through.min(1)
    path = [0]
    for step in reversed(after):
        path.append(int(step[path[-1]]))
    return path


def search(
    model: Pretrained,
    fine: TimeGrid,
    steps: Sequence[int],
    gamma: float = 1.15,
    metric: str = "dev",
    samples: int = 256,
    batch: int = 64,
) -> dict[int, list[float]]:
    """The best grid of each number of steps among the nodes of `fine`, from seeds 0, 1, ...

    Raises ConfigError, and SamplingError where the network returns NaN or inf.
    """
    if not steps:
        raise ConfigError(f"gits: steps is empty: give numbers of steps in 1 to fine={len(fine)}")
    if min(steps) < 1 or max(steps) > len(fine):
        raise ConfigError(f"gits: steps {min(steps)} to {max(steps)} must lie in 1 to fine={len(fine)}")
    if not 0 < gamma < math.inf:
        raise ConfigError(f"gits: gamma={gamma} is impossible; possible: above 0, 1 for errors that just add")
    if metric not in ("dev", "l2"):
        raise ConfigError(f"gits: metric={metric} does not exist; possible: dev, l2")
    total = np.zeros((len(fine.nodes), len(fine.nodes)))
    with progress("gits", samples, "samples") as advance:
        for first in range(0, samples, batch):
            noise = SeededNoise(range(first, min(first + batch, samples)))
            labels = noise.labels(model.num_classes).to(model.device) if model.num_classes else None
            x = start(noise, model.shape, fine.nodes[0], model.device)
            total += len(x) * costs(model.denoiser(labels), x, fine, metric)
            advance(len(x))
    if not np.isfinite(total[np.triu_indices(len(total), 1)]).all():
        raise SamplingError("gits: the network returned NaN or inf. Check the checkpoint, or try another precision.")
    return {n: [fine.nodes[k].t for k in shortest(total / samples, n, gamma)] for n in steps}


def main(argv: list[str]) -> int:
    """`evodiff gits model=NAME [steps=4-25] [fine=60] [samples=256] [gamma=1.15] [metric=dev] [out=FILE]`."""
    from evodiff.settings import model_of, parse

    defaults = {"steps": "4-25", "fine": 60, "samples": 256, "batch": 64, "gamma": 1.15, "metric": "dev", "out": None}
    given, overrides = parse("gits", __doc__, argv, defaults)
    low, _, high = given["steps"].partition("-")
    if not low.isdigit() or not (high or low).isdigit() or int(high or low) < int(low):
        raise ConfigError(f"steps={given['steps']} is no range: expected first-last or one number, like steps=4-25")
    steps = range(int(low), int(high or low) + 1)
    cfg, model, ends = model_of("gits", overrides)
    schedule = model.schedule
    fine = TimeGrid.at(Karras().times(given["fine"], schedule, *ends), schedule)
    out = Path(given["out"] or results_folder() / "grids" / f"gits_{cfg.model.name}.json")
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder: name the file in it, like out={out}/gits.json")
    with whole_file(out) as temporary:  # before the search: a place that cannot be written is found out now
        found = search(model, fine, steps, given["gamma"], given["metric"], given["samples"], given["batch"])
        temporary.write_text(json.dumps({str(n): times for n, times in found.items()}, indent=1) + "\n")
    print(f"{out}: grids of {steps.start} to {steps.stop - 1} steps. Use them with grid=file grid.path={out}")
    return 0
