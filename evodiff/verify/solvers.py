"""`evodiff verify solvers`: every recorded run of a released sampler, repeated with ours.

A golden is a pair of files PATH.json and PATH.npz: runs on a Gaussian mixture whose exact denoiser is known, with the
grid, the result and the number of denoiser calls of the released code.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evodiff.denoiser import Counting
from evodiff.errors import ConfigError
from evodiff.grid import Karras, LogSNR, Spacing, TimeGrid, TimeUniform
from evodiff.models.analytic import GaussianMixture
from evodiff.paths import ROOT
from evodiff.sampling import integrate
from evodiff.schedule import EDM, DiscreteVP, LinearVP, Node, NoiseSchedule
from evodiff.solvers.base import Solver
from evodiff.solvers.deis import DEIS
from evodiff.solvers.dpm import DPMSolver
from evodiff.solvers.dpm_solver_v3 import DPMSolverV3, Statistics
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.evodiff import EVODiff
from evodiff.solvers.heun import Heun
from evodiff.solvers.ipndm import IPNDM
from evodiff.solvers.singlestep import DPMSolverPPSinglestep, DPMSolverSinglestep
from evodiff.solvers.unipc import UniPC
from evodiff.verify.recorded import MALFORMED, golden_files

GOLDEN = ROOT / "tests" / "golden" / "solvers"
TOLERANCE = 1e-9

Arrays = Mapping[str, np.ndarray]

SPACINGS: dict[str, Spacing] = {
    "logSNR": LogSNR(),
    "edm": Karras(),
    "time_uniform": TimeUniform(),
    "time_quadratic": TimeUniform(power=2),
}
"""A golden's spacing -> ours: singlestep methods space their inner evaluations by it."""

SOLVERS: dict[str, Callable[[dict[str, Any], Arrays], Solver]] = {
    "deis_tab": lambda o, _: DEIS(order=o["order"], quadrature=100_000),
    "dpm_multistep": lambda o, _: DPMSolver(order=o["order"]),
    "dpm_singlestep": lambda o, _: DPMSolverSinglestep(o["order"], o["orders"], SPACINGS[o["spacing"]]),
    "dpm_solver_v3": lambda o, arrays: DPMSolverV3(
        order=o["order"],
        statistics=Statistics(*(_tensor(arrays, f"ems_{part}") for part in ("lambdas", "l", "s", "b"))),
        p_pseudo=o["p_pseudo"],
        use_corrector=o["use_corrector"],
        c_pseudo=o["c_pseudo"],
    ),
    "dpmpp_multistep": lambda o, _: DPMSolverPP(order=o["order"]),
    "dpmpp_singlestep": lambda o, _: DPMSolverPPSinglestep(o["order"], o["orders"], SPACINGS[o["spacing"]]),
    "evodiff": lambda o, _: EVODiff(),
    "heun": lambda o, _: Heun(),
    "ipndm": lambda o, _: IPNDM(order=o["order"]),
    "unipc": lambda o, _: UniPC(order=o["order"], variant=o["variant"]),
}
"""The released sampler's name in a golden -> our solver with the options of one run; `Arrays` is the whole npz."""

TOLERANCES: dict[str, float] = {"dpm_solver_v3": 1e-6}
"""Solvers whose reference is less exact than TOLERANCE, and how exact it is."""

SCHEDULES: dict[str, NoiseSchedule] = {"edm": EDM(), "vp_linear": LinearVP(), "vp_discrete": DiscreteVP.linear()}


@dataclass
class Result:
    """All runs of one solver in a golden."""

    cases: int = 0
    worst: float = 0.0
    nfe_mismatches: int = 0


def verify(golden: Path) -> tuple[dict[str, Result], dict[str, int]]:
    """Results by solver, and how many runs there are of solvers this installation does not have.

    `golden` is the path without extension, or the .npz or .json. Raises ConfigError for a file that is no golden.
    """
    try:
        described, recorded = golden_files(golden)
        runs = json.loads(described.read_text())
        with np.load(recorded) as file:
            arrays = dict(file)
        results: dict[str, Result] = {}
        missing: dict[str, int] = {}
        for run in runs:
            name = run["solver"]
            if name not in SOLVERS:
                missing[name] = missing.get(name, 0) + 1
                continue
            error, nfe = repeat(run, arrays)
            result = results.setdefault(name, Result())
            result.cases += 1
            result.worst = max(result.worst, error)
            result.nfe_mismatches += nfe != run["nfe"]
    except MALFORMED as e:
        raise ConfigError(
            f"{golden} is no golden of solvers: {type(e).__name__}: {e}. Expected PATH.json and PATH.npz beside it."
        ) from e
    return results, missing


def repeat(run: dict[str, Any], arrays: Arrays) -> tuple[float, int]:
    """One recorded run with our solver: relative L2 error of the result (nan counts as inf), and calls made."""
    schedule = SCHEDULES[run["schedule"]]
    nodes = tuple(Node(*map(float, row)) for row in arrays[f"nodes_{run['id']}"])
    means, stds, weights = (_tensor(arrays, f"mixture_{part}") for part in ("means", "stds", "weights"))
    mixture = GaussianMixture(means, stds, weights, schedule)
    denoise = Counting(mixture)
    x = _tensor(arrays, "noise") * (nodes[0].sigma if run["schedule"] == "edm" else 1.0)
    solver = SOLVERS[run["solver"]](run["options"], arrays)
    out = integrate(solver, denoise, x, TimeGrid(nodes, schedule), None, run["options"]["denoise_final"])
    expected = _tensor(arrays, f"out_{run['id']}")
    if expected.shape != out.shape:  # which could still be subtracted
        raise ValueError(f"out_{run['id']} is {tuple(expected.shape)}, and noise {tuple(out.shape)}")
    error = ((out - expected).norm() / expected.norm()).item()
    return (error if error == error else float("inf")), denoise.nfe


def _tensor(arrays: Arrays, key: str) -> Tensor:
    return torch.from_numpy(arrays[key])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evodiff verify solvers", description=__doc__)
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="PATH without extension, or the .npz")
    parser.add_argument("--strict", action="store_true", help="a solver that is missing here counts as a failure")
    args = parser.parse_args(argv)
    results, missing = verify(args.golden)
    failed = bool(missing) and args.strict
    for name, r in sorted(results.items()):
        tolerance = TOLERANCES.get(name, TOLERANCE)
        ok = r.worst <= tolerance and not r.nfe_mismatches
        failed |= not ok
        print(
            f"{'ok  ' if ok else 'FAIL'}  {name:<18} {r.cases:>4} cases  worst relative error {r.worst:.1e} "
            f"(allowed {tolerance:.0e})  NFE mismatches {r.nfe_mismatches}"
        )
    for name, cases in sorted(missing.items()):
        print(f"{'FAIL' if args.strict else 'miss'}  {name:<18} {cases:>4} cases  not in this installation")
    if not results and not missing:
        raise ConfigError(f"{args.golden} holds no runs")
    return int(failed)
