"""Grids by dynamic programming, and published ones."""

import itertools
import json

import numpy as np
import pytest
import torch
from exact import SHORT_EDM, VP, grid, mixture, start

from evodiff import gits
from evodiff.errors import ConfigError, EvodiffError, SamplingError
from evodiff.gits import costs, deviation, search, shortest
from evodiff.grid import FromFile, Karras, LogSNR, Optimised, TimeGrid
from evodiff.models.pretrained import Pretrained
from evodiff.sampling import integrate
from evodiff.schedule import EDM, DiscreteVP
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.dpmpp import DPMSolverPP


@pytest.mark.parametrize("gamma", [0.9, 1.0, 1.15])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_path_is_the_best_of_all(steps, gamma):
    """Against every path through 8 nodes; later steps weigh gamma times more each."""
    random = np.random.default_rng(steps)
    cost = np.where(np.triu(np.ones((8, 8)), 1) > 0, random.uniform(-0.2, 1, (8, 8)), np.inf)

    def total(path):
        return sum(gamma**k * cost[a, b] for k, (a, b) in enumerate(itertools.pairwise(path)))

    best = min(((0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)), key=total)
    assert shortest(cost, steps, gamma) == list(best)


def test_deviation_is_the_distance_from_a_line():
    first, last = torch.zeros(1, 1, 1, 2).double(), torch.tensor([2.0, 0.0]).double().view(1, 1, 1, 2)
    y = torch.tensor([[0.5, 0.3], [1.0, -0.7], [2.0, 0.0]]).double().view(3, 1, 1, 1, 2)
    assert deviation(y, first, last).flatten().tolist() == pytest.approx([0.3, 0.7, 0.0])


@pytest.mark.parametrize("schedule", [SHORT_EDM, VP])
def test_costs_are_errors_of_ddim_steps(schedule):
    model, fine, x = mixture(schedule), grid(12, schedule), start(schedule, (2, 3, 3))
    cost = costs(model, x, fine, "l2")
    seen = {}

    class Keeping:
        def __call__(self, x, node):
            seen[node] = x
            return model(x, node)

    Keeping.schedule = schedule
    integrate(DPMSolverPP(order=2, lower_order_final=False), Keeping(), x, fine, denoise_final=True)
    for i, j in ((0, 1), (2, 9), (5, 12)):
        s, t = fine.nodes[i], fine.nodes[j]
        step = integrate(DDIM(), model, seen[s], TimeGrid((s, t), schedule))
        error = ((step - seen[t]) / t.alpha).flatten(1).norm(dim=1).mean().item()
        assert cost[i, j] == pytest.approx(error, rel=1e-9)
    assert np.isinf(cost[np.tril_indices(13)]).all()


def test_grids_found_are_better_for_the_solver_they_were_found_with():
    """DDIM in 6 steps: nearer to the converged images than on the grids that know nothing of the model."""
    schedule = EDM()
    model = mixture(schedule)
    pretrained = Pretrained(lambda labels: model, shape=(2, 3, 3))
    fine = TimeGrid.at(Karras().times(60, schedule, 80.0, 0.002), schedule)
    x = 80 * torch.randn(64, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    converged = integrate(DPMSolverPP(), model, x, TimeGrid.at(LogSNR().times(400, schedule, 80.0, 0.002), schedule))

    def error(times):
        return (integrate(DDIM(), model, x, TimeGrid.at(times, schedule)) - converged).norm().item()

    plain = min(error(spacing.times(6, schedule, 80.0, 0.002)) for spacing in (LogSNR(), Karras()))
    for metric in ("dev", "l2"):
        times = search(pretrained, fine, [6], metric=metric, samples=32, batch=32)[6]
        assert error(times) < plain


def test_no_numbers_of_steps_are_refused():
    with pytest.raises(ConfigError, match="steps is empty: give numbers of steps in 1 to fine=20"):
        search(Pretrained(lambda labels: mixture(), shape=(2, 3, 3)), grid(20), [])


def test_batches_do_not_change_the_grid():
    model = Pretrained(lambda labels: mixture(), shape=(2, 3, 3))
    fine = grid(20)
    assert search(model, fine, [4, 6], samples=12, batch=5) == search(model, fine, [4, 6], samples=12, batch=12)


def test_a_network_that_returns_nan_gives_no_grid():
    class Broken:
        schedule = mixture().schedule

        def __call__(self, x, node):
            D = mixture()(x, node)
            return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 2, torch.nan, D) if node.kappa < 0.1 else D

    with pytest.raises(SamplingError, match="the network returned NaN or inf"):
        search(Pretrained(lambda labels: Broken(), shape=(2, 3, 3)), grid(20), [3], samples=4)


def test_the_command_writes_a_grid_file_for_any_solver(tmp_path, evodiff_command):
    out = tmp_path / "grids.json"
    code, text, err = evodiff_command(
        "gits", "model=mixture", "samples=8", "fine=20", "steps=3-5", f"out={out}", "device=cpu"
    )
    assert code == 0 and f"grid.path={out}" in text, err
    assert list(json.loads(out.read_text())) == ["3", "4", "5"]
    times = FromFile(str(out)).times(4, EDM(), 80.0, 0.002)
    assert times[0] == 80 and times[-1] == pytest.approx(0.002) and len(times) == 5
    code, _, err = evodiff_command(
        *("run", "model=mixture", "solver=ddim", "grid=file", f"grid.path={out}", "nfe=4", "seeds=0-1"),
        *("protocol=none", "reference_run=null", "device=cpu"),
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=9-3", "steps=9-3 is no range"),
        ("steps=5-21", "steps 5 to 21 must lie in 1 to fine=20"),
        ("gamma=0", "gamma=0.0 is impossible"),
        ("gamma=inf", "gamma=inf is impossible"),
        ("metric=l7", "metric=l7 does not exist; possible: dev, l2"),
        ("samples=-1", "samples must be at least 1"),
        ("fine=many", "fine must be a number"),
    ],
)
def test_impossible_settings_are_refused(setting, message, tmp_path):
    from evodiff.gits import main

    with pytest.raises(ConfigError, match=message):
        main(["model=mixture", "fine=20", "steps=4", f"out={tmp_path / 'g.json'}", "device=cpu", setting])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"), [(".", "is a folder: name the file in it"), ("file/g.json", "cannot write")]
)
def test_a_place_that_cannot_be_written_is_found_out_before_the_search(out, message, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delattr(gits, "search")
    with pytest.raises(EvodiffError, match=message):
        gits.main(["model=mixture", "fine=20", "steps=4", f"out={tmp_path / out}", "device=cpu"])


SD = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
STABLE_DIFFUSION = DiscreteVP.from_betas(
    [(0.00085**0.5 + i * (0.012**0.5 - 0.00085**0.5) / 999) ** 2 for i in range(1000)]
)


def test_a_published_grid_is_itself_at_its_own_number_of_steps():
    times = Optimised(SD).times(10, STABLE_DIFFUSION, 1.0, 1e-3)
    kappas = [STABLE_DIFFUSION.node(t).kappa for t in times]
    assert kappas == pytest.approx(SD, rel=1e-2)


def test_a_published_grid_is_log_linear_in_between():
    times = Optimised((8.0, 2.0, 0.5)).times(4, SHORT_EDM, 10.0, 0.05)
    assert times == pytest.approx([8, 4, 2, 1, 0.5])


@pytest.mark.parametrize(
    ("kappas", "message"),
    [((1.0, 2.0), "falling"), ((1.0,), "at least two"), ((1.0, 0.0), "above 0")],
)
def test_impossible_grids_are_refused(kappas, message):
    with pytest.raises(ConfigError, match=message):
        Optimised(kappas)


def test_a_grid_of_another_schedule_is_refused():
    with pytest.raises(ConfigError, match="do not fit this model's schedule, which has 10 to 0.05"):
        Optimised(SD).times(10, SHORT_EDM, 10.0, 0.05)
