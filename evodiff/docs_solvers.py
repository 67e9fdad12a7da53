"""`evodiff docs solvers`: docs/solvers.md, made from the solvers themselves: their configurations, docstrings, counted
evaluations, measured orders and recorded runs. With --check the page is only compared, for CI.
"""

import argparse
import importlib
import inspect
import json
import math
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch

from evodiff.config import build, choices, compose
from evodiff.denoiser import Counting
from evodiff.errors import ConfigError
from evodiff.files import whole_file
from evodiff.guidance import ClassifierFree
from evodiff.models.pretrained import Pretrained
from evodiff.noise import SeededNoise
from evodiff.paths import CONFIGS, ROOT
from evodiff.sampling import integrate
from evodiff.schedule import EDM
from evodiff.solvers.base import Solver
from evodiff.verify import orders, schedulers
from evodiff.verify import solvers as released

PAGE = ROOT / "docs" / "solvers.md"
STEPS = 8  # of the runs whose evaluations are counted

REPLAYED = {"quadrature", "orders", "inner", "statistics", "p_pseudo", "use_corrector", "c_pseudo", "lower_order_final"}
"""Fields that a recorded run sets by its own options, to repeat the released sampler call for call."""

EXACT = {
    "bdia": ("test_bdia.py", "noise to image and back, 1e-10"),
    "deis_rhoab1": ("test_solvers_exponential.py", "polynomials, 1e-12"),
    "deis_rhoab2": ("test_solvers_exponential.py", "polynomials, 1e-12"),
    "deis_rhoab3": ("test_solvers_exponential.py", "is iPNDM-v, 1e-9"),
    "deis_tab3": ("test_solvers_exponential.py", "integrals, 1e-11"),
    "dpm2": ("test_solvers_exponential.py", "is DPM-Solver-2, 1e-9"),
    "euler_maruyama": ("test_solvers_stochastic.py", "a Gaussian's law, 5 standard errors"),
    "evodiff_paper": ("test_evodiff_family.py", "the formulas line by line, 1e-12"),
    "ghvb": ("test_ghvb.py", "beta = 1 is its base, 1e-12"),
    "hb_dpmpp_2m": ("test_ghvb.py", "beta = 1 is its base, exactly"),
    "heun_churn": ("test_solvers_stochastic.py", "a Gaussian's law, 5 standard errors"),
    "ipndm_1": ("test_solvers_exponential.py", "is DDIM, 1e-9"),
    "ipndm_v": ("test_solvers_exponential.py", "polynomials, 1e-12"),
    "probability_flow": ("test_solvers_probability_flow.py", "a Gaussian's flow, 10 tolerances"),
    "reverse_diffusion": ("test_solvers_stochastic.py", "a Gaussian's law, 5 standard errors"),
    "scire_2m": ("test_scire.py", "the formulas line by line, 1e-12"),
    "scire_2s": ("test_scire.py", "the formulas line by line, 1e-12"),
    "scire_3m": ("test_scire.py", "the formulas line by line, 1e-12"),
    "scire_3s": ("test_scire.py", "the formulas line by line, 1e-12"),
    "spndm": ("test_solvers_exponential.py", "constant noise, 1e-9"),
    "teleport": ("test_teleport.py", "a Gaussian's flow, 1e-10"),
    "ts_ddim": ("test_time_shift.py", "window = 0 is DDIM, 1e-10"),
    "ts_fpndm": ("test_time_shift.py", "window = 0 is F-PNDM, 1e-10"),
    "unic_deis_tab2": ("test_solvers_exponential.py", "on UniP it is UniPC, 1e-9"),
    "unic_dpmpp_3m": ("test_solvers_exponential.py", "on UniP it is UniPC, 1e-9"),
    "unipc_1": ("test_solvers_exponential.py", "on UniP it is UniC, 1e-9"),
    "unipc_3_noise": ("test_solvers_exponential.py", "polynomials, 1e-11"),
    "unipc_3_vary": ("test_solvers_exponential.py", "polynomials, 1e-11"),
}
"""Samplers of which no recorded run exists: the test that holds them to something exact, and how closely."""

TOP = """\
# Solvers

A diffusion model turns noise into an image in small steps, and each step needs the network. A solver decides where the
steps are and what to make of the network's answers, so a better solver needs fewer answers (evaluations, NFE) for the
same image. Every solver below is one file in `evodiff/solvers/` and one configuration in `configs/solver/`; choose it
by its name, as in `evodiff run solver=unipc_3 nfe=10`, and change a field with `solver.FIELD=VALUE`.

Which one? Without a reason to choose, `unipc_3`: from 10 evaluations on its images are among the closest to the model's
own, and it needs no settings. `evodiff` where a Fréchet distance at 7 to 15 evaluations is what counts, knowing that
its last step adds contrast; `heun` from some 20 evaluations if a plain method will do. This is from one small model of
digits ([Results](results.md) ranks all of them); nothing was measured on photographs, so compare on your own model:
`evodiff run -m solver=unipc_3,dpmpp_3m,evodiff,heun nfe=5,10,20`.

This page is written by `evodiff docs solvers` from the solvers themselves, and `evodiff docs solvers --check` fails
where it no longer agrees with them.

- *order*: if the number of steps doubles, the error falls by 2 to this power. First what the solver states (a test
  holds it to that), then what was measured from {} to {} steps, or from {} to {} of solvers with noise, on the EDM and
  on the linear VP schedule (a mixture of Gaussians; with noise, the law on one Gaussian). Winding down at the end is
  off, and so is EVODiff's final rule; `dpm_v3` has no statistics. A number in between means that the error still passes
  from one power to the other. `(weak)`: of the law of the samples. `-`: none, for the error follows a tolerance, or a
  bias stays.
- *NFE per step*: counted, but for `probability_flow`, which chooses its steps. `1 (+9)` means one for each step and
  nine more in all; `1 (-4)` four fewer.
- *noise*: the solver draws random numbers on its way, so two runs from one start differ unless the seed is the same.
- *guided*: runs with classifier-free guidance, at the same NFE.
- *proved against*: recorded runs of the released code (`evodiff verify solvers`), recorded runs of the library
  diffusers (`tests/test_solvers_diffusers.py`), or an exact result, by the test named. *worst error*: relative, over
  all these runs, rounded up.
"""

FOUND = """\
## What was found

Each line names the command that shows it.

- **Third-order DPM-Solver and DPM-Solver++ (multistep), as released, are of second order**: half of the second
  derivative is left out. UniP-3, the same method with all of it, is of third. The table, and
  `pytest tests/test_solvers_exponential.py -k third_order`.
- **EVODiff as released is of first order**, not of the second that its paper claims, and with its own final rule it
  does not converge unless sigma ends near 0, for that rule scales the image whatever the step size is.
  `pytest tests/test_solvers_common.py -k evodiff`. With every weight fixed it is of second order:
  `pytest tests/test_evodiff_family.py -k ablation`.
- **EVODiff by the paper's formulas is of first order too**: zeta, a sigmoid, is below 1, so the second-order term is
  never whole. `pytest tests/test_evodiff_family.py -k zeta`.
- **SciRE with phi_1(3), the paper's choice, is of order 1** whatever k is; with phi_1(1), the plain finite difference,
  of order 2. `pytest tests/test_scire.py -k order`.
- **The time-shift sampler does not converge**: its window does not shrink with the step. The table.
- **Third-order iPNDM-v of diff-sampler has a bracket misplaced**: where steps differ, its weights are not those of
  Adams-Bashforth. Ours are those of DEIS rhoAB: `pytest tests/test_solvers_exponential.py -k "ipndm or same"`.
- **UniPC's `vary_coeff` corrector, as released, leaves some products out** from order 2 on; ours is the paper's
  algorithm, exact on polynomials: `pytest tests/test_solvers_exponential.py -k vary_coeff`.
- **DEIS tAB, as released, integrates by a sum** that is off by some 1e-5; ours, unless `quadrature` is set, is exact on
  smooth schedules: `pytest tests/test_solvers_exponential.py -k deis_tab`.
- **Multistep methods that start with DDIM owe it an error of second order.** From pure noise it is too small to see;
  starting at sigma = 10, DPM-Solver-v3 and DEIS of higher orders measure 2 in the end:
  `pytest tests/test_dpm_solver_v3.py -k order`.
- **Score-SDE's corrector, as released, takes its norms over the batch**, so that images depend on their batch. Here
  each image has its own: `pytest tests/test_solvers_common.py -k batch`. Its bias, 1 + snr^2 in the variance, stays
  however many steps there are: `pytest tests/test_solvers_stochastic.py -k langevin`.
"""

HEADER = ("solver", "paper", "order", "measured", "NFE per step", "noise", "guided", "proved against", "worst error")


@dataclass(frozen=True)
class Facts:
    """One row of the table, as text."""

    name: str
    paper: str
    order: str
    nfe: str
    noise: str
    guided: str
    source: str

    def row(self, measured: str, error: str) -> str:
        paper = f"[{self.paper}](https://arxiv.org/abs/{self.paper})"
        cells = (f"`{self.name}`", paper, self.order, measured, self.nfe, self.noise, self.guided, self.source, error)
        return f"| {' | '.join(cells)} |"


def configured(name: str) -> Solver:
    return build(compose("run", [f"solver={name}"]).solver)


def facts(name: str) -> Facts:
    """What is known of a solver without long computations."""
    solver = configured(name)
    runs, recording = recorded(solver), diffusers_run(solver)
    if runs:
        source = f"released code, {len(runs)} runs"
    elif recording:
        source = "diffusers, a run of 10 steps"
    elif name in EXACT:
        source = f"`{EXACT[name][0]}`"
    else:
        raise ConfigError(
            f"solver={name} is proved against nothing yet: write a test that holds it to something exact, and name it "
            "in EXACT of evodiff/docs_solvers.py; or record runs of released code for `evodiff verify solvers`."
        )
    return Facts(
        name,
        paper(name, solver),
        "by tolerance" if solver.adaptive else f"{solver.global_order:g}" + " (weak)" * solver.stochastic,
        nfe_per_step(solver),
        "yes" if solver.stochastic else "no",
        "yes" if guided(solver) else "no",
        source,
    )


def paper(name: str, solver: Solver) -> str:
    """The first arXiv number in the comments of the configuration, or else in the docstring of class or module."""
    module = importlib.import_module(type(solver).__module__)
    configuration = (CONFIGS / "solver" / f"{name}.yaml").read_text(encoding="utf-8")
    for text in (configuration, inspect.getdoc(type(solver)), module.__doc__):
        if found := re.search(r"arXiv (\d{4}\.\d{5})", text or ""):
            return found[1]
    raise ConfigError(
        f"{type(solver).__name__} names no paper: its docstring, or its module's, needs one: arXiv NUMBER"
    )


def evaluations(solver: Solver, steps: int, guidance: bool = False) -> int:
    """Counted calls on a grid of `steps` steps; of the guided model with `guidance`."""
    schedule = EDM()
    plain, other = orders.mixture(schedule), orders.mixture(schedule)
    other.means = other.means.flip(0) + 0.1
    model = Pretrained(lambda labels: plain if labels is None else other, shape=(1, 1, 2))
    labels = torch.zeros(8, dtype=torch.int64)
    denoise = Counting(ClassifierFree(1.5)(model, labels) if guidance else plain)
    grid = orders.grid(solver, schedule, 1 if solver.adaptive else steps)
    out = integrate(solver, denoise, orders.start(schedule), grid, SeededNoise(range(8)))
    if not out.isfinite().all():
        raise ConfigError(f"{solver} diverges on a mixture of Gaussians")
    return denoise.nfe


def nfe_per_step(solver: Solver) -> str:
    if solver.adaptive:
        return "6 (+1)"
    first, second = evaluations(solver, STEPS), evaluations(solver, STEPS + 1)
    per_step = second - first
    extra = first - STEPS * per_step
    return f"{per_step} ({extra:+d})" if extra else f"{per_step}"


def guided(solver: Solver) -> bool:
    counted = evaluations(solver, STEPS, guidance=True)
    return solver.adaptive or counted == evaluations(solver, STEPS)


def measured_order(solver: Solver) -> str:
    found = [orders.order(solver, schedule) for schedule in orders.SCHEDULES]
    return ", ".join("-" if p is None else "none" if p < 0.25 else f"{p:.1f}" for p in found)


def recorded(solver: Solver) -> list[dict]:
    """The recorded runs of the released sampler that this solver is, options of single runs aside."""
    return [run for run, ours in golden()[0] if same(ours, solver)]


@cache
def golden() -> tuple[list[tuple[dict, Solver]], dict[str, np.ndarray]]:
    """Every recorded run with the solver that repeats it, and the arrays."""
    with np.load(released.GOLDEN.with_name("solvers.npz")) as file:
        arrays = dict(file)
    runs = json.loads(released.GOLDEN.with_name("solvers.json").read_text())
    return [(run, released.SOLVERS[run["solver"]](run["options"], arrays)) for run in runs], arrays


def diffusers_run(solver: Solver) -> str | None:
    return next((name for name, (ours, _) in schedulers.SOLVERS.items() if same(ours, solver)), None)


def same(a: Solver, b: Solver) -> bool:
    return type(a) is type(b) and all(
        getattr(a, field.name) == getattr(b, field.name)
        for field in fields(a)  # type: ignore[arg-type]
        if field.name not in REPLAYED
    )


def worst_error(name: str) -> str:
    """Repeats the recorded runs; of the others, what their test allows."""
    solver = configured(name)
    if runs := recorded(solver):
        results = [released.repeat(run, golden()[1]) for run in runs]
        if any(nfe != run["nfe"] for run, (_, nfe) in zip(runs, results, strict=True)):
            raise ConfigError(f"{name} makes another number of evaluations than recorded: see evodiff verify solvers")
        return rounded_up(max(error for error, _ in results))
    if recording := diffusers_run(solver):
        return rounded_up(schedulers.repeat(recording)[0])
    return EXACT[name][1]


def rounded_up(error: float) -> str:
    """The next power of ten, from 1e-12 on: below that, errors are rounding and differ from machine to machine."""
    return f"1e{max(-12, math.ceil(math.log10(error))) if error else -12}"


def table(names: list[str]) -> list[str]:
    """The rows of these solvers, complete."""
    return [facts(name).row(measured_order(configured(name)), worst_error(name)) for name in names]


def page() -> str:
    """The whole page. Takes a minute or two: orders are measured and recorded runs repeated."""
    top = TOP.format(*orders.STEPS, *orders.WEAK_STEPS)
    head = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    return "\n".join([top, *head, *table(choices("solver")), "", FOUND])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="evodiff docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", choices=["solvers"])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if the page is out of date")
    args = parser.parse_args(argv)
    text = page()
    if args.check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(f"{relative(PAGE)} {'is up to date' if current else 'is out of date; run: evodiff docs solvers'}")
        return int(not current)
    with whole_file(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{relative(PAGE)} written")
    return 0


def relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
