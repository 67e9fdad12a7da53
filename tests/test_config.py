"""Configurations: every file composes and builds, keys are stable, and misspelt words find their neighbour."""

import inspect
import pkgutil
import shutil
from importlib import import_module

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import evodiff.config
import evodiff.solvers
from evodiff.config import build, choices, compose, essential, parse_range
from evodiff.errors import ConfigError
from evodiff.runs.job import Job
from evodiff.runs.run import Run
from evodiff.solvers.base import Solver


@pytest.mark.parametrize("name", choices("solver"))
def test_every_solver_file_builds(name):
    assert isinstance(build(compose("run", [f"solver={name}"]).solver), Solver)


INNER = {"evodiff.solvers.bdia.Inversion"}
"""Made by another solver, not chosen by name."""


def test_every_solver_has_a_file():
    used = INNER | {compose("run", [f"solver={name}"]).solver._target_ for name in choices("solver")}
    for module in pkgutil.iter_modules(evodiff.solvers.__path__):
        members = vars(import_module(f"evodiff.solvers.{module.name}")).values()
        for cls in members:
            own = inspect.isclass(cls) and cls.__module__ == f"evodiff.solvers.{module.name}"
            if own and issubclass(cls, Solver) and not inspect.isabstract(cls):
                assert f"{cls.__module__}.{cls.__qualname__}" in used


@pytest.mark.parametrize("name", [n for n in choices("grid") if n != "file"])
def test_every_grid_builds(name):
    assert len(build(compose("run", [f"grid={name}"]).grid).times(4, build(EDM), 80.0, 0.002)) == 5


EDM = OmegaConf.create({"_target_": "evodiff.schedule.EDM"})


def run_of(*overrides):
    return Run.from_config(compose("run", ["solver=ddim", *overrides]))


def test_the_key_is_readable_and_depends_on_what_decides_the_images():
    base = run_of()
    assert base.key().startswith("ddim-nfe10-")
    assert run_of("device=cpu", "batch=7", "shard=3", "protocol=none").key() == base.key()
    changes = ["nfe=11", "seeds=0-998", "denoise_final=true", "grid.rho=6", "dtype=float32", "threshold=clip"]
    keys = {run_of(c, *(["grid=karras"] if "rho" in c else [])).key() for c in changes}
    assert len(keys | {base.key()}) == len(changes) + 1


def test_the_key_of_a_known_run_does_not_change():
    """Records are found by their key: this is one that is committed."""
    assert run_of("solver=evodiff", "nfe=10", "seeds=0-9999").key() == "evodiff-nfe10-ef85dc28"


def test_a_default_written_out_is_the_same_run():
    solver = {"_target_": "evodiff.solvers.evodiff.EVODiff", "name": "evodiff"}
    assert essential(solver | {"mu": 0.5, "final": "released"}) == solver
    assert essential(solver | {"mu": 0.25}) == solver | {"mu": 0.25}


@pytest.mark.parametrize("key", ["t_start", "t_end"])
def test_a_whole_time_with_a_point_is_the_same_run(key):
    keys = [run_of(f"{key}={value}").key() for value in ("6", "6.0", "6e0", "6.5")]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize(("text", "expected"), [("0-999", range(1000)), ("7", range(7, 8)), ("5-5", range(5, 6))])
def test_seed_ranges(text, expected):
    assert parse_range(text) == expected


@pytest.mark.parametrize("text", ["-3", "5-2", "a", "1-", "", "0:9"])
def test_bad_seed_ranges(text):
    with pytest.raises(ConfigError, match="like seeds=0-999"):
        parse_range(text)


def test_seeds_are_at_most_what_torchs_generator_tells_apart():
    assert parse_range("0-4294967295")[-1] == 4294967295
    small, large = (torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2**32))
    assert torch.equal(small, large)
    with pytest.raises(ConfigError, match="4294967296 is too large.* at most 4294967295"):
        parse_range("0-4294967296")
    with pytest.raises(ConfigError, match="99999999999999999999 is too large.* at most 4294967295"):
        parse_range("0-99999999999999999999")


def test_a_key_that_is_known_may_be_added_to():
    assert compose("run", ["+model.device=cpu", "++nfe=5"]).nfe == 5


def test_a_program_that_uses_hydra_itself_keeps_it():
    """Its configuration, its launchers, and no solvers that it has not stored."""
    with hydra.initialize(version_base="1.3", config_path=None):
        theirs, store = GlobalHydra.instance().hydra, ConfigStore.instance()
        before = {group: store.list(f"hydra/{group}") for group in ("launcher", "sweeper")}
        assert compose("run", ["nfe=7", "shard=77"]).nfe == 7
        assert GlobalHydra.instance().hydra is theirs and ConfigStore.instance() is store
        assert {group: store.list(f"hydra/{group}") for group in before} == before
        assert "solver" not in store.repo


@pytest.fixture
def own_solver(tmp_path, monkeypatch):
    """Writes configs/solver/own.yaml of a copy."""
    shutil.copytree(evodiff.config.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(evodiff.config, "CONFIGS", tmp_path / "configs")
    yield (tmp_path / "configs" / "solver" / "own.yaml").write_text
    evodiff.config._compose.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("_target_: [1\nb: {", 'cannot be read: .*/solver/own.yaml", line 2'),
        ("", "own has no _target_"),
        ("eta: 0.5\n", "own has no _target_"),
        ("[1, 2]", "solver/own.yaml is no mapping of fields"),
        ("_target_: evodiff.schedule.EDM\n", "solver=own builds a EDM, which is no evodiff solver"),
        ("_target_: evodiff.solvers.ddim\n", "_target_: evodiff.solvers.ddim is no class or function"),
        ("_target_: evodiff.solvers.ddim.DIM\n", "_target_: evodiff.solvers.ddim.DIM is no class or function"),
    ],
)
def test_a_solver_file_that_is_none_is_answered_in_a_sentence(own_solver, content, message):
    own_solver(content)
    with pytest.raises(ConfigError, match=message) as refused:
        run = Job.compose(["solver=own", "model=mixture", "protocol=none", "nfe=2"]).run
        run.key()
        run.plan(build(run.model))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nfee=5", "nfee is no key of the configuration. Did you mean nfe?"),
        ("solver=evodif", "solver=evodif does not exist. Did you mean evodiff?"),
        ("nfe=5,10", "nfe=5,10 are several values: add -m to sweep over them."),
        ("metrics=fid,is", "add -m to sweep over them, or for a list write 'metrics=[fid,is]'."),
        ("guidance.scale=2", "It is one of guidance=classifier or classifier_free: set that, too."),
        ("hydra/launcher=joblb", "hydra/launcher=joblb does not exist. Did you mean joblib? Possible: basic, joblib, "),
        ("model=minst_tiny", "Did you mean mnist_tiny?"),
        ("solver=DDIM", "Did you mean ddim?"),
        ("solver=UniPC-3", "Did you mean unipc_3?"),
        ("+model.name=../../elsewhere", "cannot be set. What is chosen of a group is group=choice"),
        ("+model._partial_=true", "cannot be set."),
        ("+solver@second=heun", "cannot be set."),
        ("solver.moo=1", "solver.moo is no key of the configuration. Did you mean solver.mu?"),
        ("solver.fianl=euler", "Did you mean solver.final?"),
        ("gird=karras", "Did you mean grid?"),
        ("nfe", "is no override. Expected key=value"),
        ("grid=file", "grid.path must be given"),
        ("solver=ddim.yaml", "solver=ddim.yaml does not exist. Did you mean ddim?"),
        ("solver=/ddim", "Did you mean ddim?"),
        ("solver=[ddim,heun]", "solver=[ddim,heun] does not exist."),
        ("solver=null", "solver=null does not exist."),
        ("model=5", "model=5 does not exist. Possible: afhqv2_edm, "),
        ("tracker=null", "Possible: none, wandb."),
        ("grid=[80,10,1,0.002]", "grid=[80,10,1,0.002] does not exist. Possible: ays_sd15, "),
        ("grid={rho:5}", "grid={rho:5} does not exist."),
        ("~grid", "~grid takes away what a run needs. Leave it out, or set grid=..."),
        ("~nfe", "~nfe takes away what a run needs"),
        ("+nef=5", "nef is no key of the configuration. Did you mean nfe?"),
        ("++nef=5", "nef is no key of the configuration. Did you mean nfe?"),
        ("+nef.a=5", "nef is no key of the configuration."),
        ("=3", "'=3' is no override. Expected key=value"),
        ("table=demo", "table is no key of a run: `evodiff table demo` takes its name."),
        ("hydra=5", "'hydra=5' is no override. Expected key=value"),
        ("nfe=${oc.env:NOPE}", "'NOPE' not found\". Give its value in place of the ${...}."),
        ("nfe=${nfe}", "Give its value in place of the ${...}."),
        ("hydra.launcher.n_jobs=1,2", "hydra.launcher.n_jobs=1,2 are several values: hydra.launcher.n_jobs takes one."),
    ],
)
def test_a_typo_names_the_nearest(override, message):
    with pytest.raises(ConfigError) as error:
        compose("run", ["solver=evodiff", override] if not override.startswith("solver=") else [override])
    assert message in str(error.value)


def test_a_run_s_key_is_none_of_a_table_s():
    with pytest.raises(
        ConfigError, match=r"solver is a key of runs, which a table has in its base and rows.*'table.base"
    ):
        compose("table", ["table=demo", "solver=ddim"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["reference_run=['solver=ddim','batch=16']"],
            "batch makes no other run.* it holds for both. Possible: model,",
        ),
        (["reference_run=['solver=ddim','metrics=[fid]']"], "metrics makes no other run"),
        (["threads=100000"], "threads=100000 is impossible"),
    ],
)
def test_what_would_have_no_effect_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        Job.compose(["metrics=[rmse]", "protocol=none", *overrides])


def test_an_override_that_is_no_text_is_none():
    with pytest.raises(ConfigError, match="'3' is no override. Expected key=value"):
        Job.compose(["reference_run=[3]", "metrics=[rmse]", "protocol=none"])


def test_a_value_a_solver_refuses_keeps_the_solvers_words():
    with pytest.raises(ConfigError, match="order=7 does not exist; possible: 1, 2, 3"):
        build(compose("run", ["solver=dpmpp_2m", "solver.order=7"]).solver)


def test_rounding_is_the_protocols():
    with pytest.raises(ConfigError, match="Set rounding=round"):
        Job.compose(["rounding=truncate"])
