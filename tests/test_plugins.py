"""Solvers of other packages: found by their entry point, chosen by name wherever ours are."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import evodiff
from evodiff import config, plugins
from evodiff.api import named_solver
from evodiff.config import choices, compose
from evodiff.errors import ConfigError
from evodiff.paths import ROOT
from evodiff.runs.run import Run
from evodiff.solvers.base import Solver
from evodiff.solvers.exponential import ddim

PACKAGE = """
from dataclasses import dataclass

from evodiff import register_solver
from evodiff.solvers.base import Solver
from evodiff.solvers.exponential import ddim


@register_solver("scaled_ddim")
@dataclass(frozen=True)
class ScaledDDIM(Solver):
    gain: float = 1.0
    rule: str | None = None

    @property
    def global_order(self):
        return 1

    def step(self, denoise, x, step, state):
        return ddim(x, self.gain * denoise(x, step.s), step.s, step.t), state
"""


def install(folder, module="their_solvers", source=PACKAGE):
    """What `pip install` leaves behind of a package with an entry point."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[evodiff.solvers]\n{module} = {module}\n")


@pytest.fixture
def clean(monkeypatch):
    """No solver registered by one test is seen by another."""
    monkeypatch.setattr(plugins, "_registered", {})
    caches = (plugins._load_entry_points, config._compose, config._singletons)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.fixture
def theirs(clean, tmp_path, monkeypatch):
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("their_solvers", None)


def test_an_installed_solver_is_a_choice_with_its_fields(theirs):
    assert "scaled_ddim" in choices("solver")
    solver = compose("run", ["solver=scaled_ddim", "solver.gain=0.5"]).solver
    assert (solver.name, solver.gain, solver.rule) == ("scaled_ddim", 0.5, None)
    with pytest.raises(ConfigError, match="Did you mean solver.gain"):
        compose("run", ["solver=scaled_ddim", "solver.gian=0.5"])
    with pytest.raises(ConfigError, match="Did you mean scaled_ddim"):
        compose("run", ["solver=scaled_dim"])
    assert named_solver("scaled_ddim", gain=2.0).gain == 2.0


def test_it_samples_what_it_says(theirs):
    theirs_out, ours = (
        evodiff.sample("mixture", solver=name, nfe=5, seeds=range(3)).x for name in ("scaled_ddim", "ddim")
    )
    assert torch.equal(theirs_out, ours)


def test_a_field_at_its_default_does_not_name_the_run(theirs):
    keys = {
        Run.from_config(compose("run", ["solver=scaled_ddim", *rest])).key()
        for rest in ([], ["solver.gain=1.0"], ["solver.gain=0.5"])
    }
    assert len(keys) == 2


def test_the_command_line_of_a_new_process_knows_it(tmp_path):
    install(tmp_path)
    command = [sys.executable, "-m", "evodiff.cli", "sample", "model=mixture", "solver=scaled_ddim", "nfe=3"]
    done = subprocess.run(
        [*command, "seeds=0-3", "protocol=none", "reference_run=null"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "EVODIFF_RESULTS": str(tmp_path / "results"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "scaled_ddim-nfe3-" in done.stdout


def test_a_broken_package_is_left_out_with_a_warning(clean, tmp_path, monkeypatch):
    install(tmp_path, "broken_solvers", "import nothing_of_that_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="solvers of broken_solvers are left out: ModuleNotFoundError"):
        assert "ddim" in choices("solver")


@dataclass(frozen=True)
class Own(Solver):
    scale: float

    @property
    def global_order(self):
        return 1

    def step(self, denoise, x, step, state):
        return ddim(x, self.scale * denoise(x, step.s), step.s, step.t), state


def test_a_decorated_class_is_a_choice_at_once_and_its_fields_without_default_must_be_given(clean):
    assert evodiff.register_solver("own")(Own) is Own
    assert evodiff.register_solver("own")(Own) is Own  # a module that is imported anew
    assert compose("run", ["solver=own", "solver.scale=2"]).solver.scale == 2
    with pytest.raises(ConfigError, match=r"solver\.scale must be given"):
        compose("run", ["solver=own"])


@dataclass(frozen=True)
class Odd(Own):
    anything: Any = None
    counted: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "counted", 3)
        super().__post_init__()


def test_fields_that_no_caller_sets_and_fields_of_any_type(clean):
    evodiff.register_solver("odd")(Odd)
    assert named_solver("odd", scale=2.0, anything=[1]).counted == 3
    with pytest.raises(ConfigError, match=r"solver=odd needs scale: give an object, or named_solver\('odd'"):
        named_solver("odd")


def test_what_cannot_be_registered(clean):
    evodiff.register_solver("own")(Own)

    @dataclass(frozen=True)
    class Inner(Own):
        pass

    for name, solver, message in [
        ("ddim", Own, "there is a solver of that name"),
        ("own", Inner, "must be at the top of its module"),
        ("own", named_solver, "is no dataclass derived"),
        ("plain", type("Plain", (), {}), "is no dataclass derived"),
    ]:
        with pytest.raises(ConfigError, match=message):
            evodiff.register_solver(name)(solver)
