"""The entropy trace: against covariances written out, a Gaussian's closed form, and its files."""

import csv
import json
import math

import pytest
import torch
from exact import SHORT_EDM, STD, VP, gaussian, grid, mixture, start

from evodiff.errors import ConfigError
from evodiff.grid import TimeUniform
from evodiff.noise import SeededNoise
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.heun import Heun
from evodiff.solvers.pndm import PNDM
from evodiff.solvers.time_shift import TimeShift
from evodiff.trace import exact, main, next_variance, probe_seed, trace, write


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
def test_the_exact_covariance_is_tweedies(schedule):
    """Cov(x_0 | x_s) = sigma^2 / alpha dD/dx, all of it, by automatic differentiation."""
    model, g = mixture(schedule), grid(6, schedule)
    s, t = g.nodes[3], g.nodes[4]
    x = s.alpha * start(SHORT_EDM, (2, 3, 3)) / 5
    rho = 1 - (t.kappa / s.kappa) ** 2
    variances, entropies = [], []
    for image in x:
        J = torch.autograd.functional.jacobian(lambda x: model(x[None], s)[0], image).reshape(18, 18)
        cov = s.sigma**2 / s.alpha * J
        step = t.alpha**2 * (t.kappa**2 * rho * torch.eye(18).double() + rho**2 * cov)
        variances.append(cov.trace().item() / 18)
        entropies.append(0.5 * torch.logdet(2 * math.pi * math.e * step).item() / 18)
    variance, entropy = exact(model, x, s, t)
    assert variance == pytest.approx(sum(variances) / 3, rel=1e-9)
    assert entropy == pytest.approx(sum(entropies) / 3, rel=1e-9)


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
def test_a_gaussian_in_closed_form(schedule):
    """Var(x_0 | x_s) = c^2 kappa^2 / (c^2 + kappa^2) wherever x_s is, estimated without error: J is diagonal."""
    rows = trace(gaussian(schedule), DDIM(), grid(6, schedule), start(schedule), SeededNoise([0, 1, 2]))
    for row in rows:
        variance = STD**2 * row.kappa**2 / (STD**2 + row.kappa**2)
        assert row.variance == pytest.approx(variance, rel=1e-9)
        assert row.exact_variance == pytest.approx(variance, rel=1e-9)
        assert row.entropy == pytest.approx(row.exact_entropy, rel=1e-9)
    changes = [b.entropy - a.entropy for a, b in zip(rows, rows[1:], strict=False)]
    assert [row.entropy_change for row in rows[1:]] == pytest.approx(changes)
    assert math.isnan(rows[0].entropy_change)


def test_the_next_states_variance_is_that_of_the_bridge():
    """x_t given x_s and x_0 is Gaussian: sampled from the joint of the forward process, regressed on x_s and x_0."""
    s, t = VP.node(0.6), VP.node(0.4)
    rho = 1 - (t.kappa / s.kappa) ** 2
    # y = x / alpha is Brownian in kappa^2: Var(y_t | y_s, x_0) = kappa_t^2 - kappa_t^4 / kappa_s^2, slope on x_0 is rho
    bridge = t.kappa**2 - t.kappa**4 / s.kappa**2
    v = torch.tensor(0.37, dtype=torch.float64)
    assert next_variance(v, s, t).item() == pytest.approx(t.alpha**2 * (bridge + rho**2 * 0.37))


def test_random_signs_estimate_the_exact_variance():
    random = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(64, 2, 3, 3, dtype=torch.float64, generator=random)
    rows = trace(mixture(), DPMSolverPP(), grid(5), x, SeededNoise(range(64)), probes=16)
    for row in rows:
        assert row.variance == pytest.approx(row.exact_variance, rel=0.1)


def test_tracing_changes_nothing_and_counts_every_evaluation():
    g, x = grid(5), start(shape=(2, 3, 3))
    noise = SeededNoise([0, 1, 2])
    rows = trace(mixture(), Heun(), g, x, noise)
    assert len(rows) == Heun().evaluations(5)
    assert all(row.kappa_next < row.kappa for row in rows[:-1])
    again = trace(mixture(), Heun(), g, x, SeededNoise([0, 1, 2]))
    assert [r.variance for r in rows] == [r.variance for r in again]


@pytest.mark.parametrize("solver", [Heun(), PNDM()])
def test_at_the_last_node_there_is_no_next_state(solver, tmp_path):
    """Both evaluate there; PNDM in its third and last step. JSON has no infinity."""
    rows = trace(mixture(), solver, grid(3), start(shape=(2, 3, 3)), SeededNoise([0, 1, 2]))
    last = [row for row in rows if row.kappa == rows[-1].kappa]
    assert all(math.isnan(row.entropy) and math.isnan(row.exact_entropy) for row in last)
    assert all(math.isfinite(row.entropy) and math.isfinite(row.exact_entropy) for row in rows if row not in last)
    write(tmp_path, {"it": rows})
    kept = json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)["it"]
    assert kept[-1]["entropy"] is None and kept[-1]["variance"] == rows[-1].variance


def test_a_solver_that_asks_at_several_times_at_once_is_traced_for_one_image_only():
    x = torch.linspace(1, 80, 3).double().view(3, 1, 1, 1) * start(VP, (2, 3, 3), batch=1)
    g, solver = grid(10, VP, TimeUniform()), TimeShift(window=0.2)
    with pytest.raises(ConfigError, match="TimeShift asks for each image at a time of its own.*one seed"):
        trace(mixture(VP), solver, g, x, SeededNoise([0, 1, 2]))
    assert len(trace(mixture(VP), solver, g, x[:1], SeededNoise([0]))) == 10


def test_without_an_exact_mixture_there_are_no_exact_columns():
    model = mixture()

    class Unknown:
        schedule = SHORT_EDM

        def __call__(self, x, node):
            return model(x, node)

    rows = trace(Unknown(), DDIM(), grid(3), start(shape=(2, 3, 3)), SeededNoise([0, 1, 2]))
    assert all(math.isnan(row.exact_variance) and math.isnan(row.exact_entropy) for row in rows)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "trace"
    arguments = ["model=mixture", "solver=ddim,evodiff", "nfe=5", "seeds=0-7", f"out={out}", "device=cpu"]
    assert main(arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == ["trace.csv", "trace.json", "trace.png"]
    rows = json.loads((out / "trace.json").read_text())
    assert list(rows) == ["ddim", "evodiff"] and len(rows["evodiff"]) == 5
    assert rows["ddim"][0]["entropy_change"] is None
    table = list(csv.DictReader((out / "trace.csv").open()))
    assert float(table[0]["variance"]) == rows["ddim"][0]["variance"]
    assert "exact_entropy" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["solver=nonsense", "seeds=5-1", "probes=0", "nfe=null", "nfee=3"])
def test_impossible_settings_are_one_line(setting, evodiff_command, tmp_path):
    code, _, err = evodiff_command("trace", "model=mixture", "nfe=5", f"out={tmp_path / 't'}", setting)
    assert code == 1
    assert err.startswith("evodiff: ") and err.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_a_solver_that_chooses_its_own_steps_is_traced(tmp_path, capsys):
    arguments = ["model=mixture", "solver=probability_flow", "seeds=0-1", f"out={tmp_path}", "device=cpu"]
    assert main([*arguments, "nfe=null"]) == 0
    assert len(json.loads((tmp_path / "trace.json").read_text())["probability_flow"]) > 5
    with pytest.raises(ConfigError, match="chooses its own steps, so nfe=5 cannot be set. Use nfe=null"):
        main([*arguments, "nfe=5"])


def test_signs_are_not_those_of_the_noise_that_a_solver_draws():
    """torch's generators keep 32 bits of a seed."""
    seeds = range(64)
    probes = [torch.Generator().manual_seed(probe_seed(seed)) for seed in seeds]
    first = {torch.randn(4, generator=random).sum().item() for random in probes}
    assert not first & {torch.randn(4, generator=torch.Generator().manual_seed(seed)).sum().item() for seed in seeds}
    assert len(first) == 64
