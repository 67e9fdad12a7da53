"""What the README shows is run as it stands there."""

import csv
import json
import re
import sys
import types

import pytest
from bench_network import throughput
from test_solvers_common import BUDGETS, RANGES, errors, slope

from evodiff.cli import COMMANDS
from evodiff.config import build, choices, compose
from evodiff.data import mnist_digits
from evodiff.paths import ROOT
from evodiff.tables.table import Table
from evodiff.tables.throughput import known_rates, rate_on

README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^evodiff (\w+)((?: [^\s#]+)*)", re.M)


def block(language, after):
    return re.search(rf"```{language}\n(.*?)```", README.partition(after)[2], re.S)[1]


def test_the_solver_in_how_to_add_a_solver(monkeypatch):
    module = types.ModuleType("evodiff.solvers.midpoint")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("python", "## How to add a solver"), vars(module))
    fields = dict(line.split(": ") for line in block("yaml", "## How to add a solver").splitlines())
    solver = build({**fields, "r": float(fields["r"])})
    assert solver == module.Midpoint()
    for schedule in RANGES.values():
        assert slope(errors(solver, *schedule, BUDGETS)) == pytest.approx(solver.global_order, abs=0.25)


def test_every_command_is_one():
    found = COMMAND.findall(README)
    assert len(found) > 4
    for name, rest in found:
        assert name in COMMANDS
        if name == "run":
            for key, values in re.findall(r"([\w.]+)=(\S+)", rest):
                for value in values.split(","):
                    compose("run", [f"{key}={value}"])
        if name == "table":
            assert rest.split()[0] in choices("table")


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_where_the_second_is_not_told_apart_is_as_the_results_say():
    told, results = (" ".join(text.split()) for text in (README, (ROOT / "docs" / "results.md").read_text()))
    unsure = re.search(r"\(At ([\d, and]+) the second is not told apart from the first", told)[1]
    leads = results.partition("Lowest `fd_mnist` at")[2].partition(", by more than")[0].split("; ")
    budgets = [lead.partition(", at ")[2] for lead in leads if "not told apart" in lead]
    assert re.findall(r"\d+", unsure) == sorted(re.findall(r"\d+", " ".join(budgets)), key=int)


def test_the_numbers_beside_the_figure_are_those_of_the_records():
    told = " ".join(README.partition("Ten thousand images")[2].partition("## Start")[0].split())
    tables = ROOT / "results" / "tables"
    cells = {(r["solver"], r["nfe"], r["metric"]): float(r["value"]) for r in rows(tables / "mnist" / "table.csv")}
    matched = {(r["solver"], r["nfe"]): r for r in rows(tables / "mnist" / "matched.csv")}
    of_parts = rows(tables / "mnist_parts" / "table.csv")
    parts = {(r["solver"], r["nfe"], r["metric"]): float(r["value"]) for r in of_parts}
    assert f"are {cells['EVODiff', '10', 'rmse_images@10000']:.3g} from" in told
    assert f"UniPC-3's {cells['UniPC-3', '10', 'rmse_images@10000']:.3g} (`rmse_images`" in told
    for solver in ("DPM-Solver++ 3M", "UniPC-3"):
        plain, gained = (float(matched[solver, "10"][key]) for key in ("plain", "free"))
        assert f"from {plain:.1f} to {gained:.1f}" in told
    assert f"beside {float(matched['EVODiff', '10']['free']):.1f} for EVODiff" in told
    of_all = [r for r in rows(tables / "mnist_solvers" / "matched.csv") if r["nfe"] == "10"]
    plain, gained = ([r["solver"] for r in sorted(of_all, key=lambda r: float(r[by]))] for by in ("plain", "free"))
    assert (plain[0], gained[0], gained[2]) == ("evodiff", "dpm_v3", "evodiff")
    own = next(float(r["free"]) for r in of_all if r["solver"] == "evodiff")
    assert sum(own < float(r["free"]) < own + 2 for r in of_all) == 8 and "eight others following within 2;" in told
    least = min(float(r["free"]) for r in of_all)
    assert f"all {len(of_all)} solvers" in told and f"(which has statistics of the model) at {least:.1f};" in told
    for table, nfe in (
        ("mnist_solvers", "3"),
        ("mnist_solvers", "5"),
        *(("mnist_solvers_1k", n) for n in ("20", "30", "50")),
    ):
        column = [r for r in rows(tables / table / "table.csv") if (r["nfe"], r["metric"][:3]) == (nfe, "fd_")]
        done = [r for r in column if r["value"]]
        assert min(done, key=lambda r: float(r["value"]))["solver"] != "evodiff"
    euler, released = (parts[row, "10", "fd_mnist@10000"] for row in ("plain Euler at the end", "as released"))
    assert f"scores {euler:.1f} in place of {released:.1f}," in told
    jump = (cells["EVODiff", nfe, "fd_mnist@10000"] for nfe in ("15", "16"))
    assert "{:.1f} to {:.1f}.".format(*jump) in told
    images, _ = mnist_digits()
    black_or_white = ((images == 0) | (images == 255)).double().mean()
    assert f"real digits {black_or_white:.0%} are".replace("%", " %") in told
    (converged,) = [r for r in records(tables / "mnist") if r["run"]["solver"]["name"] == "heun"]
    at_20 = [r for r in rows(tables / "mnist_solvers" / "table.csv") if (r["nfe"], r["metric"][:3]) == ("20", "fd_")]
    assert min(at_20, key=lambda r: float(r["value"]))["solver"] == "heun"
    assert min(float(r["value"]) for r in at_20) < converged["metrics"]["fd_mnist@10000"]
    assert f"the converged samples {converged['metrics']['saturated@10000']:.0%},".replace("%", " %") in told
    for nfe, best in (("5", "UniPC-3"), ("6", "DPM-Solver++ 3M"), *((str(n), "EVODiff") for n in range(7, 26))):
        column = {solver: v for (solver, n, metric), v in cells.items() if (n, metric) == (nfe, "fd_mnist@10000")}
        assert min(column, key=column.get) == best
        for error in ("rmse@10000", "rmse_images@10000"):
            column = {solver: v for (solver, n, metric), v in cells.items() if (n, metric) == (nfe, error)}
            assert min(column, key=column.get) != "EVODiff"


def test_the_error_of_the_converged_solution():
    found = rows(ROOT / "results" / "tables" / "mnist_converged" / "table.csv")
    (finest,) = [
        float(r["value"]) for r in found if (r["solver"], r["nfe"], r["metric"]) == ("UniPC-3", "200", "rmse@1000")
    ]
    assert f"an error of its own ({finest:.1g} on `mnist_tiny`" in " ".join(README.split())


def test_the_cost_of_a_table_is_from_throughputs():
    table = Table.of_file("cifar10_edm")
    todo = sum(len(job.run.seed_range) * job.run.nfe for job in table.jobs.values())
    measured = json.loads((ROOT / "results" / "bench" / "throughput.json").read_text())
    benchmark = json.loads((ROOT / "results" / "bench" / "pipeline.json").read_text())
    assert throughput(benchmark).items() <= measured.items()
    rate = max(rates["cifar10_edm"] for rates in measured.values())
    told = " ".join(README.partition("## What has not been run")[2].split())
    assert f"takes {todo / 1e6:.3g} million evaluations" in told
    v100 = known_rates()["one V100 in fp32"]["cifar10_edm"].value
    assert f"some {round(todo / v100 / 3600, -1):.0f} hours on one V100" in told
    a100 = rate_on(known_rates()["one A100 in fp16"], "cifar10_edm").value
    assert f"some {todo / a100 / 3600:.0f} hours on one A100 in fp16" in told
    assert f"and {round(todo / rate / 3600, -2):,.0f} on the two CPU cores" in told
    assert f"makes {rate:.3g} a second" in told


def records(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
