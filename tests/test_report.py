"""A table from nothing to its pages, twice, and interrupted."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from evodiff.config import compose
from evodiff.errors import ConfigError
from evodiff.plots import mosaic, save_grid
from evodiff.report import Table, show

SMALL = ["table=smoke", "table.nfe=[5,6]"]
PAGES = {"table.md", "table.tex", "table.csv", "report.html", "samples.png", "fid_vs_nfe.png", "fid_vs_nfe.svg"}


@pytest.fixture
def small(results):
    def make(rows=None, *overrides, **changes):
        cfg = compose("table", [*SMALL, *overrides])
        cfg.table.base = ["model=mixture", "protocol=none", "seeds=0-15", "shard=8", "batch=8"]
        cfg.table.rows = rows or {"DDIM": ["solver=ddim"], "EVODiff": ["solver=evodiff"]}
        cfg.table.update(changes)
        return Table.from_config(cfg)

    return make


def bytes_of(folder, pattern):
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob(pattern)}


def test_a_table_is_made_once(small, results, capsys):
    assert small().make() == 0
    first = capsys.readouterr().out
    assert PAGES <= {path.name for path in (results / "tables" / "smoke").iterdir()}
    shards, scores = bytes_of(results, "shard-*.npz"), bytes_of(results / "runs", "score.json")
    assert len(scores) == 5  # four cells and the converged run
    assert small().make() == 0
    assert capsys.readouterr().out == first
    assert bytes_of(results, "shard-*.npz") == shards
    assert bytes_of(results / "runs", "score.json") == scores


def test_the_numbers_on_every_page_are_the_records(small, results):
    table = small()
    table.make()
    folder = results / "tables" / "smoke"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    for (row, nfe, _), record in table.records.items():
        value = record.metrics["rmse@16"]
        found = [r for r in rows if (r["solver"], r["nfe"], r["metric"]) == (row, str(nfe), "rmse@16")]
        assert [float(r["value"]) for r in found] == [value]
        for page in ("table.md", "table.tex", "report.html"):
            assert show(value) in (folder / page).read_text()


def test_rmse_is_to_the_converged_run_of_the_same_seeds(small):
    """The converged run's own images are at distance 0, and another solver's at what its states say."""
    table = small()
    table.make()
    ((job, reference),) = table.references.values()
    from evodiff.experiment import store_of
    from evodiff.record import rmse

    assert rmse(store_of(job, reference), store_of(job, reference)) == 0
    a, b = (np.concatenate([x for (x,) in store_of(job, run).batches("x")]) for run in (None, reference))
    assert table.records["DDIM", 5, 0].metrics["rmse@16"] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), rel=1e-6)


def test_a_failing_cell_does_not_end_the_table(small, results, capsys):
    assert small({"DDIM": ["solver=ddim"], "Heun": ["solver=heun"]}).make() == 1
    out, err = capsys.readouterr()
    assert "Heun, NFE 5: Heun cannot spend exactly nfe=5" in err
    assert re.search(r"\| Heun \| missing \| \*?\*?[\d.]+", out)
    assert "3 of 4 cells done" in out


def test_one_run_in_two_cells_is_refused(small):
    with pytest.raises(ConfigError, match="are the same run"):
        small({"a": ["solver=ddim"], "b": ["solver=ddim"]}).jobs  # noqa: B018


def test_two_protocols_in_one_table_are_refused(small):
    with pytest.raises(ConfigError, match="mixes 2 scoring protocols"):
        small({"a": ["solver=ddim"], "b": ["solver=evodiff", "protocol=mnist"]}).jobs  # noqa: B018


def test_the_page_needs_nothing_else(small, results):
    small().make()
    page = (results / "tables" / "smoke" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("<svg") == 2
    assert "data:image/png;base64," in page
    assert "evodiff run model=mixture" in page


def test_a_grid_shows_every_image_in_its_place(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * 40 * np.ones((1, 1, 4, 4), np.uint8)
    save_grid(tmp_path / "grid.png", images, columns=3, scale=1)
    shown = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert shown.shape == (11, 16)
    assert [shown[1 + 5 * (i // 3), 1 + 5 * (i % 3)] for i in range(6)] == [0, 40, 80, 120, 160, 200]


def test_a_mosaic_keeps_rows_together():
    images = np.arange(4)[:, None, None, None] * np.ones((1, 1, 2, 2), int)
    assert mosaic(images, 2)[:, :, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
