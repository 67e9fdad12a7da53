"""scripts/bench_solvers.py: how many images a step moves, and the record that it writes. Times are not asserted."""

import importlib.util
import json

import pytest
import torch

from evodiff.config import choices
from evodiff.paths import ROOT

spec = importlib.util.spec_from_file_location("bench_solvers", ROOT / "scripts" / "bench_solvers.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

SHAPE = (4, *bench.IMAGE)


@pytest.fixture(scope="module")
def rows():
    return bench.measure(torch.float64, SHAPE, 2, "cpu", None)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("ddim", 5),  # read x, write; read it and D, write
        ("dpmpp_2m", 8),
        ("dpmpp_3m", 11),
        ("unipc_3", 25),
        ("deis_tab3", 17),
        ("evodiff", 26),  # half of what the official code moves, 54
    ],
)
def test_a_step_moves_no_more_images_than_its_formula_needs(rows, name, most):
    assert 0 < rows[name]["moved"] <= most


def test_moved_counts_what_is_read_and_written():
    a, b = torch.ones(2, *SHAPE)
    with bench.Moved(a.numel()) as moved:
        (a.view(-1) * 2).add_(b.view(-1), alpha=0.5)
        a.sum()
        a[:, :1] + 1  # a third of an image is none
    assert moved.images == 2 + 3 + 1


def test_every_solver_is_measured_and_the_record_is_whole(rows, tmp_path, monkeypatch):
    assert set(choices("solver")) <= set(rows)
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    monkeypatch.setattr(bench, "measure", lambda *_: rows)
    bench.main(None, "cpu", 4, 2)
    record = json.loads((tmp_path / "bench" / "solvers.json").read_text())
    assert record["cpu"]["float64"] == rows
    page = (tmp_path / "bench" / "solvers.md").read_text()
    assert all(f"\n| {name} |" in page for name in rows)


def test_a_folder_without_the_official_code_is_said_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no samplers/evodiff.py in it"):
        bench.official(tmp_path)
