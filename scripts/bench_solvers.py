"""What solvers cost outside the network, beside the official EVODiff code where a checkout of it is given:
`python scripts/bench_solvers.py [--official PATH]` writes results/bench/solvers.json and .md.

The network's answers are recorded noise, handed over at no cost. All solvers take turns, repeat by repeat, so that
whatever else the machine does falls on all of them; times are medians with quartiles, on a CPU of the processor, not
of the clock on the wall. `moved` counts, whatever the machine, the images of the batch that the operations of a step
read and write.
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from benchmark import Findings, machine, on
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evodiff.config import build, choices, compose
from evodiff.device import finished
from evodiff.errors import BudgetError
from evodiff.grid import LogSNR, TimeGrid, grid_for
from evodiff.noise import SeededNoise
from evodiff.paths import results_folder
from evodiff.sampling import integrate
from evodiff.schedule import EDM, Node
from evodiff.solvers.base import Solver
from evodiff.solvers.dpm_solver_v3 import DPMSolverV3, Statistics

NFE = 10
IMAGE = (3, 32, 32)
OFFICIAL, AS_RUN = "official EVODiff, solver alone", "official EVODiff, with its model wrapper"
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Recorded:
    """A network whose answers were made beforehand; one answer for ever where the solver chooses its steps by them."""

    schedule = EDM()

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        random = torch.Generator().manual_seed(0)
        image = torch.rand(shape, generator=random, dtype=dtype) * 2 - 1
        self.all = [
            (image + 0.05 * torch.randn(shape, generator=random, dtype=dtype)).to(device) for _ in range(NFE + 1)
        ]
        self.start()

    def start(self, constant: bool = False) -> None:
        self.answers: Iterator[Tensor] = cycle(self.all[:1] if constant else self.all)
        self.calls = 0

    def __call__(self, x: Tensor, node: Node | None = None) -> Tensor:
        self.calls += 1
        return next(self.answers)


class Moved(TorchDispatchMode):
    """Counts how many images of `size` numbers operations read and write."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.images = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.images += sum(t.numel() // self.size for t in tensors if t.is_floating_point())
        return out


def cases() -> Iterator[tuple[str, Solver, TimeGrid]]:
    """Every configured solver, on the first budget from NFE on that it can spend, and DPM-Solver-v3 with statistics."""
    for name in choices("solver"):
        solver: Solver = build(compose("run", [f"solver={name}"]).solver)
        yield name, *planned(solver)
        if isinstance(solver, DPMSolverV3):
            lambdas = torch.linspace(-4.5, 6.3, 121, dtype=torch.float64)
            l, s, b = 0.1 * torch.rand(3, 121, *IMAGE, dtype=torch.float64)  # noqa: E741
            yield f"{name} with statistics", *planned(replace(solver, statistics=Statistics(lambdas, l, s, b)))


def planned(solver: Solver) -> tuple[Solver, TimeGrid]:
    for nfe in [None] if solver.adaptive else range(NFE, 2 * NFE):
        try:
            ready = solver if nfe is None else solver.for_budget(nfe)
            return ready, grid_for(nfe, ready, LogSNR(), EDM())
        except BudgetError:
            continue
    raise AssertionError(solver)


def official(path: Path) -> tuple[Any, Any, str]:
    """The modules samplers.evodiff and samplers.utils of a checkout, and its commit."""
    found = sorted(path.rglob("samplers/evodiff.py"))
    if not found:
        sys.exit(f"--official {path}: no samplers/evodiff.py in it; expected a checkout of ShiguiLi/EVODiff")
    sys.path.insert(0, str(found[0].parent.parent))
    git = subprocess.run(["git", "-C", path, "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = git.stdout.strip() if git.returncode == 0 else "unknown"
    return importlib.import_module("samplers.evodiff"), importlib.import_module("samplers.utils"), commit


def official_runs(code: Any, utils: Any, network: Recorded, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Its sampler on the same answers; with its wrapper, which turns them to noise and back, in float64 only."""
    options = {"steps": NFE, "t_start": 80.0, "t_end": 0.002, "order": 2, "skip_type": "logSNR"}

    def solver() -> Tensor:
        network.start()
        sampler = code.EVODiff_edm(utils.NoiseScheduleEDM())
        sampler.data_prediction_fn = lambda x, t: network(x)
        return sampler.sample(None, x, **options)

    def as_run() -> Tensor:
        network.start()
        schedule = utils.NoiseScheduleEDM()
        model = utils.model_wrapper(lambda x, t, label: network(x), schedule)
        return code.EVODiff_edm(schedule).sample(model, x, **options)

    return {OFFICIAL: solver, AS_RUN: as_run} if x.dtype == torch.float64 else {OFFICIAL: solver}


def measure(dtype: torch.dtype, shape: tuple[int, ...], repeats: int, device: str, code: Any) -> dict[str, Any]:
    """Seconds per step and image of every solver: median and quartiles; and images moved per step."""
    network = Recorded(shape, dtype, device)
    x = 80 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype).to(device)
    runs: dict[str, Callable[[], Tensor]] = {}
    steps: dict[str, int] = {}
    adaptive: set[str] = set()
    for name, solver, grid in cases():

        def run(solver: Solver = solver, grid: TimeGrid = grid) -> Tensor:
            network.start(constant=solver.adaptive)
            noise = SeededNoise(range(shape[0])) if solver.stochastic else None
            return integrate(solver, network, x, grid, noise)

        runs[name], steps[name] = run, len(grid)
        adaptive |= {name} if solver.adaptive else set()
    if code:
        runs |= official_runs(*code[:2], network, x)
        steps |= {OFFICIAL: NFE, AS_RUN: NFE}
    rows = {}
    for name, call in runs.items():
        call()  # fills the caches of coefficients
        if name in adaptive:
            steps[name] = (network.calls - 1) // 6
        with Moved(x.numel()) as moved:
            out = call()
        assert out.dtype == dtype, name
        rows[name] = {"steps": steps[name], "moved": round(moved.images / steps[name], 1)}
        if name.startswith("official"):
            rows[name]["difference from evodiff"] = ((out - runs["evodiff"]()).norm() / out.norm()).item()
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for _ in range(repeats):
        for name, call in runs.items():
            finished(device)
            started = clock()
            call()
            finished(device)
            times[name].append((clock() - started) / steps[name] / shape[0])
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        rows[name] |= {"seconds": median, "quartiles": [low, high]}
    return rows


def main(path: Path | None, device: str, batch: int, repeats: int) -> None:
    """Measure on one device; what was recorded of other devices stays."""
    code = official(path) if path else None
    shape = (batch, *IMAGE)
    measured = {
        "machine": machine(device),
        "shape": shape,
        "repeats": repeats,
        "official_commit": code[2] if code else None,
        **{name: measure(dtype, shape, repeats, device, code) for name, dtype in DTYPES.items()},
    }
    findings = Findings(results_folder() / "bench", "solvers", markdown)
    findings.add(device.split(":")[0], measured)
    print(findings.md.read_text())


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Solvers: time outside the network", ""]
    lines += [" ".join(__doc__.split("\n\n")[1].split()), ""]
    for device, part in found.items():
        lines += [f"## {device}: {' x '.join(map(str, part['shape']))}, {NFE} evaluations or the next possible", ""]
        lines += [
            f"{on(part['machine'])} {part['repeats']} repeats. Microseconds per step and image: median (quartiles)."
        ]
        lines += ["", *headline(part), ""]
        columns = [
            name for dtype in DTYPES for name in (dtype, "of official" if part["official_commit"] else "of DDIM")
        ]
        lines += [
            f"| | steps | {' | '.join(columns)} | images moved per step |",
            "|---|" + "---:|" * (len(columns) + 2),
        ]
        for name, row in part["float64"].items():
            cells = [name, str(row["steps"])]
            for dtype in DTYPES:
                cells += times(part[dtype], name, OFFICIAL if part["official_commit"] else "ddim")
            lines.append(f"| {' | '.join([*cells, format(row['moved'], 'g')])} |")
        lines.append("")
    return "\n".join(lines)


def times(rows: dict[str, Any], name: str, base: str) -> list[str]:
    if name not in rows:
        return ["-", "-"]
    row = rows[name]
    low, high = (f"{1e6 * value:.1f}" for value in row["quartiles"])
    return [f"{1e6 * row['seconds']:.1f} ({low}-{high})", f"{row['seconds'] / rows[base]['seconds']:.2f}"]


def headline(part: dict[str, Any]) -> list[str]:
    """EVODiff beside the official code, in words."""
    if not part["official_commit"]:
        return ["Without a checkout of the official code."]
    lines = [f"Official code: ShiguiLi/EVODiff at {part['official_commit'][:7]}."]
    for dtype in DTYPES:
        rows = part[dtype]
        ours = rows["evodiff"]
        for name in (OFFICIAL, AS_RUN):
            if name in rows:
                lines.append(
                    f"In {dtype} `evodiff` takes {ours['seconds'] / rows[name]['seconds']:.2f} of the time of `{name}` "
                    f"and moves {ours['moved']:g} images per step, that {rows[name]['moved']:g}; the results differ by "
                    f"{rows[name]['difference from evodiff']:.0e}, for its times are float32."
                )
    return [" ".join(lines)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="a checkout of github.com/ShiguiLi/EVODiff, only read")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=500, help="images of 3x32x32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    main(args.official, args.device, args.batch, args.repeats)
