"""Solvers and grids asked for what does not exist, through the command line: refused with the field and what is
possible, before the first network call and the first file."""

import json

import numpy as np
import pytest

from evodiff.models.analytic import GaussianMixture

RUN = ["model=mixture", "protocol=none", "reference_run=null", "seeds=0-3", "shard=4", "batch=4", "nfe=10"]
TIMES = [80 * (0.002 / 80) ** (i / 10) for i in range(11)]
SWAPPED = [*TIMES[:3], TIMES[4], TIMES[3], *TIMES[5:]]
PAST_ZERO = [*TIMES[:-1], -1.0]
VP_TIMES = [1 - i / 10 for i in range(10)] + [0.001]


@pytest.fixture
def refused(evodiff_command, results, monkeypatch):
    """Run with these overrides; the one line on standard error, after checking that nothing else happened."""

    def call(self, x, node):
        raise AssertionError("the network was called")

    monkeypatch.setattr(GaussianMixture, "__call__", call)

    def run(*overrides):
        given = {o.partition("=")[0] for o in overrides}
        base = [o for o in RUN if o.partition("=")[0] not in given]
        code, out, err = evodiff_command("run", *base, *overrides)
        assert code == 1
        assert out == ""
        assert err.startswith("evodiff: ") and err.count("\n") == 1, err
        assert not [path for path in (results / "runs").rglob("*") if path.is_file()]
        return err

    return run


def statistics(folder, shape=(3, 8, 8), lambdas=(-4.4, 6.3), nodes=5, bad=None, named=True):
    """A folder of statistics as `evodiff stats ems` writes it, and the override that asks for it."""
    folder.mkdir()
    zero = np.zeros((nodes, *shape), np.float32)
    where = {"lambdas": np.linspace(*lambdas, nodes)} if named else {}
    b = np.full_like(zero, np.nan) if bad == "nan" else zero
    s = zero[1:] if bad == "rows" else zero
    np.savez(folder / "l.npz", l=zero, **where)
    np.savez(folder / "sb.npz", s=s, b=b)
    return f"solver.statistics={{_target_: evodiff.ems.load, folder: {folder}}}"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"shape": (1, 32, 32)}, "statistics are of images (1, 32, 32), but the model's are (3, 8, 8)"),
        ({"lambdas": (-5, 5)}, "cover half-log-SNRs -5 to 5, but the grid runs from -4.382 to 6.215"),
        ({"bad": "nan"}, "b holds NaN"),
        ({"bad": "rows"}, "s has shape (4, 3, 8, 8), expected (5, 3, 8, 8)"),
        ({"named": False}, "set statistics.lambdas to the first and the last"),
        ({"lambdas": (6.3, -4.4)}, "lambdas must be at least two rising"),
    ],
)
def test_statistics_that_do_not_fit(refused, tmp_path, file, message):
    assert message in refused("solver=dpm_v3", statistics(tmp_path / "ems", **file))


def test_statistics_that_are_none(refused):
    assert "Expected l.npz with l, and sb.npz" in refused(
        "solver=dpm_v3", "solver.statistics={_target_: evodiff.ems.load, folder: nowhere}"
    )
    assert "statistics='l.npz' is impossible; possible: a Statistics, or null" in refused(
        "solver=dpm_v3", "solver.statistics=l.npz"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SWAPPED, f"times must fall strictly and end above 0; {TIMES[4]} is before {TIMES[3]}"),
        (PAST_ZERO, "-1.0 is before 0"),
        ([*TIMES[:-1], 0.0], "0.0 is before 0. For a last step to 0 set denoise_final=true and leave the 0 out"),
        (VP_TIMES, "runs from 1 to 0.001, but the run from t_start=80 to t_end=0.002"),
        ([90.0, *TIMES[1:]], "starts at 90, above the schedule's 80"),
        (TIMES[:-1], "holds 9 steps, but 10 are asked for"),
        ({"5": TIMES[::2], "8": TIMES[:9]}, "has no grid of 10 steps; it has 5, 8"),
        ({}, "it has none"),
        (["a"] * 11, "expected a list of numbers"),
        ([float("nan")] * 11, "nan is before nan"),
        (None, "Expected JSON: a list of falling times"),
    ],
)
def test_grid_files_that_do_not_fit(refused, tmp_path, content, message):
    path = tmp_path / "grid.json"
    path.write_text("80 40" if content is None else json.dumps(content))
    error = refused("grid=file", f"grid.path={path}")
    assert message in error and str(path) in error


@pytest.mark.parametrize(
    ("solver", "order", "possible"),
    [
        ("dpmpp_2m", "4", "1, 2, 3"),
        ("dpmpp_2m", "true", "1, 2, 3"),
        ("dpmpp_3s", "null", "1, 2, 3"),
        ("dpm_v3", "4", "1, 2, 3"),
        ("deis_tab2", "5", "1, 2, 3, 4"),
        ("fpndm", "3", "2 (S-PNDM), 4 (F-PNDM)"),
        ("ghvb", "2.0", "1, 2, 3, 4"),
        ("scire_2s", "1", "2, 3"),
        ("sde_dpmpp_2", "3", "1, 2"),
        ("unipc_3", "10", "1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("evodiff_paper", "3", "2"),
    ],
)
def test_orders_that_do_not_exist(refused, solver, order, possible):
    error = refused(f"solver={solver}", f"solver.order={order}")
    assert "order=" in error and f"does not exist; possible: {possible}\n" in error


@pytest.mark.parametrize(
    ("solver", "field", "value", "possible"),
    [
        ("ddim", "eta", "1.5", "0 (deterministic) to 1 (DDPM)"),
        ("ddim", "eta", "-0.1", "0 (deterministic) to 1 (DDPM)"),
        ("ddim", "eta", "half", "0 (deterministic) to 1 (DDPM)"),
        ("ddim", "eta", "nan", "0 (deterministic) to 1 (DDPM)"),
        ("evodiff", "eta", "2", "0 to 1, or null"),
        ("evodiff", "final", "heun", "released, euler"),
        ("evodiff", "fine_grid", "many", "a whole number"),
        ("evodiff", "mu", "null", "a number"),
        ("evodiff", "lower_order_final", "3", "true, false"),
        ("bdia", "gamma", "2", "0 (DDIM) to 1"),
        ("bdia", "pair", "true", "false, for a run starts from one state of noise"),
        ("ghvb", "beta", "0", "above 0, up to 1 (no momentum)"),
        ("heun_churn", "S_max", "0", "at least S_min=0.01, or null"),
        ("pc", "corrector_steps", "1.5", "whole numbers, at least 1"),
        ("teleport", "gaussian", "digits", "a Gaussian, or null"),
        ("dpmpp_2s", "inner", "karras", "a Spacing, or null"),
        ("scire_2s", "orders", "[4]", "each from 1 to order=2"),
        ("scire_3m", "m", "0", "whole numbers, 1 (finite difference) or more"),
        ("dpm_v3", "p_pseudo", "1", "true, false"),
        ("deis_tab2", "quadrature", "1", "null, or with variant=tab at least 2"),
    ],
)
def test_values_that_do_not_exist(refused, solver, field, value, possible):
    error = refused(f"solver={solver}", f"solver.{field}={value}")
    assert f"{field}=" in error and f"; possible: {possible}" in error


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (
            "{_target_: evodiff.solvers.ddpm.DDPM}",
            "of=DDPM is stochastic: its noise cannot be inverted; possible: bdia",
        ),
        ("{_target_: evodiff.solvers.ddim.DDIM, eta: 0.5}", "of=DDIM is stochastic"),
        ("{_target_: evodiff.solvers.sde_dpmpp.SDEDPMSolverPP}", "of=SDEDPMSolverPP is stochastic"),
        ("{_target_: evodiff.solvers.dpmpp.DPMSolverPP}", "no exact inverse; possible: bdia with gamma above 0"),
        ("{_target_: evodiff.solvers.bdia.BDIA, gamma: 0}", "no exact inverse; possible: bdia with gamma above 0"),
        ("{_target_: evodiff.solvers.bdia.BDIA}", "a run starts from noise"),
    ],
)
def test_inversion_of_what_cannot_be_inverted(refused, of, message):
    inversion = ["solver=bdia", "solver._target_=evodiff.solvers.bdia.Inversion", f"+solver.of={of}"]
    assert message in refused(*inversion, *(f"~solver.{field}" for field in ("gamma", "pair", "scaled")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid=file", "grid.path=null"], "path=None is impossible"),
        (["grid=file", "grid.path=[80,1]"], "path=[80, 1] is impossible"),
        (["grid=karras", "grid.rho=-1"], "rho=-1 is impossible; possible: numbers from 0.1 to 1e+06"),
        (["grid=time_uniform", "grid.power=0"], "power=0 is impossible; possible: numbers from 0.1 to 1e+06"),
        (["grid=nsr", "grid.k=-1"], "k=-1 is impossible; possible: numbers from 0 to 1e+06"),
        (["grid=ays_sd15", "grid.kappas=[1,2]"], "kappas must be at least two falling numbers above 0"),
        (["grid=file"], "grid.path must be given"),
    ],
)
def test_spacings_that_do_not_exist(refused, overrides, message):
    assert message in refused(*overrides)
