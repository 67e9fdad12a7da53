"""What the README shows is run as it stands there."""

import re
import sys
import types

import pytest
from test_solvers_common import BUDGETS, RANGES, errors, slope

from evodiff.cli import COMMANDS
from evodiff.config import build, choices, compose
from evodiff.paths import ROOT

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
