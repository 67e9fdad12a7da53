"""The pages of a table: its numbers beside the papers', pictures, trajectories, on every page the same."""

import csv
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_tables import BASE, bytes_of, out_of_memory

from evodiff.config import build
from evodiff.pictures import mosaic, save_grid
from evodiff.plots import save_sample_sheet
from evodiff.tables import published, samples, text, trajectory
from evodiff.tables.published import Published, Verdict
from evodiff.tables.table import Table
from evodiff.tables.text import latex, markdown, show


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
    (reference,) = table.references.values()
    from evodiff.metrics.distances import rmse
    from evodiff.runs.job import store_of

    assert rmse(store_of(reference), store_of(reference)) == 0
    a, b = (np.concatenate([x for (x,) in store_of(job).batches("x")]) for job in (table.jobs["DDIM", 5, 0], reference))
    assert table.records["DDIM", 5, 0].metrics["rmse@16"] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), rel=1e-6)


def test_the_converged_level_is_the_mean_over_the_ranges_of_seeds(small):
    of_two = small(base=["model=mixture", "protocol=none", "shard=8"], seeds=["0-7", "8-15"], nfe=[5])
    of_two.make()
    ends = [of_two.record_of(job).metrics["contrast@8"] for job in of_two.references.values()]
    assert len(set(ends)) == 2
    assert of_two.levels("contrast@8") == {"heun at NFE 79": pytest.approx(sum(ends) / 2)}


def test_names_of_rows_are_text_on_every_page(small):
    table = small({r"A|b <c> 100%": ["solver=ddim"]})
    assert table.make() == 0
    row = next(line for line in markdown(table).splitlines() if "A" in line and "100%" in line)
    assert row.startswith(r"| A\|b <c> 100% | ")
    assert r"A$|$b $<$c$>$ 100\% & " in latex(table)


def test_signs_of_latex_are_text_in_it():
    assert text.tex(r"a\b^c~{d}_e") == r"a\textbackslash{}b\textasciicircum{}c\textasciitilde{}\{d\}\_e"


def test_three_digits_without_an_exponent():
    assert [show(value) for value in (2.934, 99.96, 999.4, 999.6, 1234)] == ["2.93", "100", "999", "1000", "1234"]


def test_bold_is_the_best_number_that_is_shown():
    """One paper takes the least of three runs, and so do we in its cell."""
    paper = Published("m", "A", "min of 3", 10, "FID", "2.00", "50000", "", "S", "Table 1", "quoted")
    least, mean = (Verdict(values, 50_000, False, p) for values, p in (((2.0, 3.0, 4.0), paper), ((2.5,), None)))
    table = SimpleNamespace(nfe=[10], verdicts=lambda metric: {("A", 10): least, ("B", 10): mean})
    assert text.best(table, "fid@50000") == {("A", 10)}


def test_a_mean_of_fewer_sets_of_seeds_is_marked_and_not_compared(small, results):
    """Sets differ: at one NFE the mean of three and one alone are no match."""
    sets = {"seeds": ["0-15", "16-31"], "nfe": [5, 6]}
    table = small(None, **sets)
    table.make()
    assert "‡" not in table.text() and all(len(curve.values) == 2 for curve in table.curves("contrast@16").values())
    records = table.folder / "records"
    removed = table.jobs["EVODiff", 6, 1].run
    shutil.rmtree(removed.folder)
    (records / f"{removed.key()}.json").unlink()
    table = small(None, **sets)
    lines = [line for line in table.text().splitlines() if line.startswith("| EVODiff")]
    assert all(line.count("‡") == 1 and line.rstrip(" |").endswith("‡") for line in lines)
    assert "‡ of fewer sets of seeds than other cells" in table.text()
    assert list(table.curves("contrast@16")["EVODiff"].values) == [5]
    assert not {("EVODiff", 6)} & text.best(table, table.main_metric)


def test_of_equal_numbers_each_is_bold():
    same = dict.fromkeys([("A", 10), ("B", 10)], Verdict((2.5,), 50_000, False, None))
    verdicts = {**same, ("C", 10): Verdict((2.6,), 50_000, False, None)}
    table = SimpleNamespace(nfe=[10], verdicts=lambda metric: verdicts)
    assert text.best(table, "fid@50000") == {*same}


def test_a_title_of_any_words_is_a_title(small, results):
    table = replace(small(), title="ANTIBODY & TITLE")
    assert table.make() == 0
    page = (results / "tables" / "smoke" / "report.html").read_text(encoding="utf-8")
    assert "<title>ANTIBODY &amp; TITLE</title>" in page and page.count("<h1>ANTIBODY &amp; TITLE</h1>") == 1


def test_a_changed_table_has_pages_of_its_own(small, results):
    small().make()
    before = bytes_of(results / "tables" / "smoke", "*")
    base = "table.base=['model=mixture','protocol=none','seeds=0-15','shard=8','batch=8']"
    changed = [Table.of_file("smoke", [base, f"table.nfe=[{nfe}]"]) for nfe in (5, 6)]
    assert changed[0].make() == 0 and changed[0].name != changed[1].name != "smoke"
    assert "table smoke " in changed[0].text() and "'table.nfe=[5]'`" in changed[0].text()
    assert bytes_of(results / "tables" / "smoke", "*") == before


def test_a_trial_without_papers_explains_its_mark(small):
    trial = small(None, "limit=4")
    assert trial.make() == 0
    assert "†" in trial.text() and "† on fewer images than the whole table's" in trial.text()


def test_pages_are_utf_8_whatever_the_locale_is(small, results, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda encoding, level=2: encoding or "latin-1")
    table = replace(small(), title="one ± of it")
    assert table.make() == 0
    for page in ("report.html", "table.md"):
        assert "one ± of it" in (results / "tables" / "smoke" / page).read_bytes().decode()


def test_the_page_needs_nothing_else(small, results):
    small().make()
    page = (results / "tables" / "smoke" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count('<div class="chart">') == 2
    assert page.count("data:image/png;base64,") == 2  # samples and trajectories
    assert "evodiff run model=mixture" in page


PAPERS = """model,method,variant,nfe,metric,value,images,guidance,source,table,confidence
m,DDIM,,5,latent MSE,{ddim},16,,Paper arXiv:1,Table 1,quoted
m,DDIM,,6,latent MSE,9.99,16,,Paper arXiv:1,Table 1,read-from-figure
m,Trained,,5,latent MSE,0.001,16,,Paper arXiv:1,Table 1,quoted
"""


@pytest.fixture
def with_papers(small, tmp_path_factory, monkeypatch):
    """A table of two ranges of seeds beside a made-up paper that is right at NFE 5 and wrong at NFE 6."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "smoke.csv").write_text(PAPERS.format(ddim=1))
    monkeypatch.setattr(published, "FOLDER", folder)
    rows = {
        "DDIM": {"run": ["solver=ddim"], "published": [{"source": "Paper", "method": "DDIM"}]},
        "EVODiff": {"run": ["solver=evodiff"], "nfe": [6]},
    }
    changes = {"published": "smoke", "metric": "latent MSE", "seeds": ["0-249", "250-499"]}
    changes["base"] = ["model=mixture", "protocol=none", "metrics=[rmse]", "shard=250", "batch=250"]
    published.read.cache_clear()
    small(rows, **changes).make()
    measured = small(rows, **changes).verdicts("mse@250")["DDIM", 5].mean
    (folder / "smoke.csv").write_text(PAPERS.format(ddim=f"{measured:.3f}"))
    published.read.cache_clear()
    yield lambda *overrides: small(rows, *overrides, **changes)
    published.read.cache_clear()


def test_a_cell_is_the_mean_of_its_runs_beside_the_paper(with_papers, results):
    table = with_papers()
    table.write()
    verdict = table.verdicts("mse@250")["DDIM", 5]
    rmse = [table.records["DDIM", 5, k].metrics["rmse@250"] for k in (0, 1)]
    assert verdict.values == pytest.approx([r**2 for r in rmse])
    assert (verdict.state, table.verdicts("mse@250")["DDIM", 6].state) == ("ok", "off")
    assert table.verdicts("mse@250")["EVODiff", 6].state == "done"
    assert ("EVODiff", 5) not in table.cells
    lines = {
        (line["solver"], line["nfe"], line["metric"]): line
        for line in csv.DictReader((results / "tables" / "smoke" / "table.csv").open())
    }
    line = lines["DDIM", "6", "mse@250"]
    assert (line["state"], line["paper"], line["confidence"], line["runs"]) == ("off", "9.990", "read-from-figure", "2")
    assert float(line["difference"]) == pytest.approx(float(line["value"]) - 9.99)
    assert lines["EVODiff", "6", "rmse@250"]["paper"] == ""
    marks = {
        "table.md": r"\* (9.990)",
        "table.tex": "* (9.990)",
        "report.html": "<small>9.990 read-from-figure</small>",
    }
    for page, mark in marks.items():
        assert mark in (results / "tables" / "smoke" / page).read_text()
    assert "Trained" in (results / "tables" / "smoke" / "report.html").read_text()  # published only


def test_the_page_shows_beside_each_number_what_is_told_of_it(with_papers, results):
    """Without pointing at anything: a page is printed, and read on telephones."""
    table = with_papers()
    table.write()
    page = re.sub('title="[^"]*"', "", (results / "tables" / "smoke" / "report.html").read_text(encoding="utf-8"))
    cells = re.findall(
        r"<td class=\"(\w+)[^>]*>([^<]+)<small>([^<]*)</small><small>Δ ([^ ]+) / ±([^ ]+) (\w+)</small>", page
    )
    for nfe, (kind, ours, paper, difference, tolerance, state) in zip((5, 6), cells, strict=True):
        verdict = table.verdicts("mse@250")["DDIM", nfe]
        assert paper == f"{verdict.paper.value} {verdict.paper.confidence}" and kind == state == verdict.state
        assert float(difference) == pytest.approx(verdict.difference, rel=0.05)
        assert float(tolerance) == pytest.approx(verdict.tolerance, rel=0.05)
        assert ("*" in ours) == (state == "off")
    assert page.count("<th scope=row>DDIM</th>") > 1
    for told in (
        "below ours the paper&#x27;s",
        "± the standard deviation of one run",
        "* beyond the tolerance of the paper&#x27;s number",
        "two standard deviations of the difference",
    ):
        assert told in page
    assert "* beyond the tolerance of the paper's number" in table.text() and "† " not in table.text()


def test_a_page_explains_every_mark(with_papers):
    trial = with_papers("limit=4")
    trial.make()
    page = (trial.folder / "report.html").read_text(encoding="utf-8")
    assert "† on fewer images than the whole table&#x27;s" in page
    assert {*text.MARKS.values(), text.FEWER} <= text.SIGNS.keys()


def test_a_tracker_is_told_which_metric_a_paper_reports(with_papers):
    table, told = with_papers(), []
    tracker = SimpleNamespace(publish=lambda name, records, labels, published: told.append((records, published)))
    table.publish(tracker)
    ((records, published),) = told
    verdicts = table.verdicts("mse@250")
    assert published["mse@250"]["DDIM"] == {n: verdicts["DDIM", n].paper.number for n in (5, 6)}
    assert not any(published["rmse@250"].values())
    assert records[0].metrics["mse@250"] == pytest.approx(records[0].metrics["rmse@250"] ** 2)


def test_a_part_of_the_seeds_has_pages_of_its_own(with_papers, results):
    before = bytes_of(results / "tables" / "smoke", "*")
    shutil.rmtree(results / "runs")
    part = with_papers("repeats=1")
    part.write()
    page = (results / "tables" / "smoke-repeats1" / "table.md").read_text()
    assert "3 of 3 cells done" in page and "made by `evodiff table smoke repeats=1`" in page
    assert bytes_of(results / "tables" / "smoke", "*") == before
    assert with_papers("repeats=2").name == "smoke", "all there are"


def test_a_trial_is_a_proxy_with_pages_of_its_own(with_papers, results):
    before = bytes_of(results / "tables" / "smoke", "*")
    trial = with_papers("limit=4", "repeats=1")
    assert trial.make() == 0
    assert {v.state for v in trial.verdicts("mse@4").values()} == {"proxy"}
    assert (results / "tables" / "smoke-4-repeats1" / "report.html").exists()
    assert bytes_of(results / "tables" / "smoke", "*") == before


def test_a_table_without_runs_shows_the_papers(with_papers, results):
    table = with_papers("limit=5")
    table.write()
    text = (results / "tables" / "smoke-5" / "table.md").read_text()
    assert re.search(r"\| DDIM \| – \([\d.]+\) \| – \(9.990\) \|", text)
    assert "0 of 6 runs done" in text


def test_the_sheet_of_more_cells_stays(small, results):
    """The records of all are here, the images of one run."""
    table = small()
    table.make()
    sheet, page = table.folder / "samples.png", table.folder / "report.html"
    whole = sheet.read_bytes()
    for (row, nfe, _), job in table.jobs.items():
        if (row, nfe) != ("DDIM", 5):
            shutil.rmtree(job.run.folder)
    small().write()
    assert sheet.read_bytes() == whole
    assert "by every method at every NFE.<" in page.read_text()
    Image.open(sheet).save(sheet, pnginfo=PngInfo())  # as of a version that did not say how many cells there are
    older = sheet.read_bytes()
    small().write()
    assert sheet.read_bytes() == older
    sheet.unlink()
    small().write()
    assert "by every method at every NFE: 1 of 4 cells, whose images were here.<" in page.read_text()
    small().make()
    assert sheet.read_bytes() == whole


def test_a_run_that_cannot_be_read_is_left_out_of_the_sheet(small):
    table = small()
    table.make()
    (table.jobs["DDIM", 5, 0].run.folder / "manifest.json").write_text("{")
    (table.folder / "report.html").unlink()
    small().write()
    assert (table.folder / "report.html").exists()
    assert {row: [*cells] for row, cells in samples.sample_sheets(table).items()} == {"DDIM": [6], "EVODiff": [5, 6]}


def test_grey_stays_grey_on_the_sheet(tmp_path):
    """No cell is stretched to black and white."""
    grey = np.full((9, 1, 4, 4), 100, np.uint8)
    grey[0] = 140
    save_sample_sheet(tmp_path / "sheet.png", {"DDIM": {5: grey}})
    counts = np.bincount(np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).ravel(), minlength=256)
    assert min(counts[100], counts[140]) > 500


def test_a_run_without_metrics_is_a_table_too(small, capsys):
    table = small(base=[*BASE, "protocol=none", "reference_run=null", "metrics=[fid]"])
    assert table.make() == 0
    assert "4 of 4 cells done; no features" in capsys.readouterr().out


def test_a_trajectory_ends_with_the_sample(small):
    table = small()
    table.make()
    cell = table.cells["EVODiff", 6]
    job = cell.jobs[0]
    images, kappas = trajectory.trajectory(job, build(job.run.model))
    with np.load(job.run.folder / "shard-000000.npz") as shard:
        assert np.array_equal(images[-1], shard["images"][0])
    assert len(images) == 7 and kappas[0] == pytest.approx(80) and (np.diff(kappas) < 0).all()


def test_pages_of_runs_without_trajectories_need_no_network(small, results, monkeypatch):
    table = small()
    table.make()
    picture = table.folder / "trajectories.png"
    before = picture.read_bytes()
    for path in (*results.rglob("trajectory.npz"), table.folder / "report.html"):
        path.unlink()
    monkeypatch.setattr(trajectory, "trajectory", out_of_memory)
    small().write()
    assert picture.read_bytes() == before and (table.folder / "report.html").exists()
    picture.unlink()
    small().write()
    assert not picture.exists() and "Trajectories" not in (table.folder / "report.html").read_text()


def test_a_trajectory_that_fails_does_not_end_the_table(small, results, capsys, monkeypatch):
    monkeypatch.setattr(trajectory, "trajectory", out_of_memory)
    table = small()
    assert table.make() == 0
    out, err = capsys.readouterr()
    assert "4 of 4 cells done" in out and (table.folder / "report.html").exists()
    assert "evodiff: trajectory of DDIM and 1 more: OutOfMemoryError: CUDA out of memory. Tried" in err


def test_a_damaged_trajectory_is_left_out_until_it_is_made_again(small, results):
    small().make()
    picture = results / "tables" / "smoke" / "trajectories.png"
    (damaged, _) = results.rglob("trajectory.npz")
    whole, before = damaged.read_bytes(), picture.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    small().write()
    assert picture.read_bytes() != before
    assert small().make() == 0 and picture.read_bytes() == before


def test_a_grid_shows_every_image_in_its_place(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * 40 * np.ones((1, 1, 4, 4), np.uint8)
    save_grid(tmp_path / "grid.png", images, columns=3, scale=1)
    shown = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert shown.shape == (11, 16)
    assert [shown[1 + 5 * (i // 3), 1 + 5 * (i % 3)] for i in range(6)] == [0, 40, 80, 120, 160, 200]


def test_a_mosaic_keeps_rows_together():
    images = np.arange(4)[:, None, None, None] * np.ones((1, 1, 2, 2), int)
    assert mosaic(images, 2)[:, :, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
