"""Making a table: once, twice, in parts, interrupted, with cells that fail."""

import json
import re
import shlex

import pytest
import torch
from small_tables import BASE, bytes_of, out_of_memory

from evodiff.commands import overrides_of
from evodiff.errors import ConfigError
from evodiff.tables import table as table_module
from evodiff.tables import text, trajectory
from evodiff.tables.failures import Failures
from evodiff.tables.inputs import missing_inputs

PAGES = {"table.md", "table.tex", "table.csv", "report.html", "samples.png", "fid_vs_nfe.png", "fid_vs_nfe.svg"}


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


def test_only_a_part_is_made_where_one_is_asked_for(small, results):
    part = small(None, "rows=[EVO*]", "nfe=5")
    assert part.make() == 0
    assert set(part.records) == {("EVODiff", 5, 0)}
    assert "1 of 4 cells done" in (results / "tables" / "smoke" / "table.md").read_text()
    assert [overrides[-2] for overrides in overrides_of(part)] == ["nfe=5"]
    searched = {"DDIM": ["solver=ddim", "grid=file", "grid.path=gits_mixture.json"], "EVODiff": ["solver=evodiff"]}
    assert missing_inputs(small(searched)) and not missing_inputs(small(searched, "rows=EVODiff"))
    assert small().make() == 0
    assert len(small().records) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rows=DDIN"], "rows=DDIN is not in table smoke. Did you mean DDIM?"),
        (["rows=[DDIM,3]"], r"rows=\['DDIM', 3\] is impossible: expected a list like rows=\[EVODiff,UniPC\*\]"),
        (["rows=[]"], r"rows=\[\] is impossible"),
        (["nfe=[5,7]"], r"nfe=\[5, 7\]: not all are budgets of these rows of table smoke; they have 5, 6"),
        (["nfe=5,6"], r"nfe=5,6 are several values: write 'nfe=\[5,6\]'"),
        (["limit=5,6"], r"limit=5,6 are several values: limit takes one\."),
    ],
)
def test_a_part_that_there_is_not_is_refused(small, overrides, message):
    with pytest.raises(ConfigError, match=message):
        small(None, *overrides)


def test_a_record_with_more_serves_a_table_that_asks_for_less(small, results):
    small().make()
    scores = bytes_of(results / "runs", "score.json")
    without = small(base=["model=mixture", "protocol=none", "seeds=0-15", "shard=8", "batch=8", "metrics=[contrast]"])
    assert without.make() == 0
    assert bytes_of(results / "runs", "score.json") == scores
    assert (small().metrics, without.metrics) == (["rmse@16", "contrast@16"], ["contrast@16"])
    assert small(base=["model=mixture", "protocol=none", "seeds=0-15", "metrics=[rmse]"]).metrics == ["rmse@16"]


def test_a_failing_cell_does_not_end_the_table(small, results, capsys):
    assert small({"DDIM": ["solver=ddim"], "Heun": ["solver=heun"]}).make() == 1
    out, err = capsys.readouterr()
    assert "Heun, NFE 5: Heun cannot spend exactly nfe=5" in err
    assert re.search(r"\| Heun \| missing \| \*?\*?[\d.]+", out)
    assert "3 of 4 cells done" in out


@pytest.mark.parametrize("stage", ["sample_run", "score_run"])
def test_an_unexpected_error_does_not_end_the_table_either(small, results, capsys, monkeypatch, stage):
    table = small()
    does, failing = getattr(table_module, stage), table.cells["DDIM", 5].jobs[0]
    monkeypatch.setattr(table_module, stage, lambda job: (out_of_memory if job == failing else does)(job))
    assert table.make() == 1
    out, err = capsys.readouterr()
    assert "Traceback (most recent call last)" in err and "in out_of_memory" in err
    assert "evodiff: DDIM, NFE 5: OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB." in err
    assert "3 of 4 cells done" in out
    assert (results / "tables" / "smoke" / "report.html").exists()


def test_a_folder_that_cannot_be_read_ends_its_own_cell_only(small, capsys):
    table = small()
    broken = table.jobs["DDIM", 5, 0].run.folder
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("")
    assert table.make() == 1
    assert "DDIM, NFE 5: " in capsys.readouterr().err
    assert {place[:2] for place in table.records} == {("DDIM", 6), ("EVODiff", 5), ("EVODiff", 6)}


def test_what_cannot_be_scored_is_not_sampled(small, results, capsys):
    with_reference = [*BASE, "protocol=mnist", "protocol.reference=nope.npz", "protocol.reference_sha256=null"]
    assert small(base=with_reference).make() == 1
    assert "nope.npz" in capsys.readouterr().err
    assert not list(results.rglob("shard-*"))


def test_failures_are_grouped_and_leave_no_memory_held(capsys, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("once"))
    failures = Failures()
    assert failures.attempt("fine", print, "done")
    assert not emptied
    assert [failures.attempt(label, out_of_memory) for label in "abc"] == [False] * 3
    assert len(emptied) == 3
    failures.tell()
    out, err = capsys.readouterr()
    assert out == "done\n"
    assert err.count("Traceback") == 1
    assert "evodiff: a and 2 more: OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB.\n" in err

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failures.attempt("d", interrupt)


def test_one_run_in_two_cells_is_refused(small):
    with pytest.raises(ConfigError, match="are the same run"):
        small({"a": ["solver=ddim"], "b": ["solver=ddim"]}).jobs  # noqa: B018


def test_two_protocols_in_one_table_are_refused(small):
    with pytest.raises(ConfigError, match="mixes 2 scoring protocols"):
        small({"a": ["solver=ddim"], "b": ["solver=evodiff", "protocol=mnist"]}).jobs  # noqa: B018


def test_a_reference_is_sampled_only_for_a_cell_that_needs_it(small):
    table = small()
    table.make()
    (reference,) = table.references.values()
    shards = list(reference.run.folder.glob("shard-*"))
    for shard in shards:
        shard.unlink()
    assert small().make() == 0
    assert not any(shard.exists() for shard in shards)
    (table.jobs["DDIM", 5, 0].run.folder / "score.json").unlink()
    assert small().make() == 0
    assert all(shard.exists() for shard in shards)


def test_what_was_made_before_an_interruption_is_scored(small, monkeypatch):
    table = small()
    does, last = table_module.sample_run, table.jobs["EVODiff", 6, 0]

    def interrupted(job):
        if job == last:
            raise KeyboardInterrupt
        return does(job)

    monkeypatch.setattr(table_module, "sample_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table.make()
    assert len(table.records) == 3


def test_a_record_of_another_protocol_is_not_taken(small, results):
    table = small()
    table.make()
    path = table.cells["DDIM", 5].jobs[0].run.folder / "score.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "protocol": {"name": "other", "hash": "00000000"}}))
    (table.folder / "records" / f"{content['key']}.json").unlink()
    assert ("DDIM", 5, 0) not in small().records
    assert small().make() == 0  # it is scored again
    assert small().records["DDIM", 5, 0].protocol is None


def test_errors_from_another_reference_run_are_not_taken(small, results, evodiff_command):
    """Scored again by hand with a finer one, a run has another number; the table keeps its own, where there is one."""
    table = small()
    table.make()
    job, (own,) = table.jobs["DDIM", 5, 0], table.references
    copy = table.folder / "records" / f"{job.run.key()}.json"
    before = copy.read_text()
    rescored = [*BASE, "protocol=none", "solver=ddim", "nfe=5", "reference_run=['solver=unipc_3','nfe=30']"]
    assert evodiff_command("run", *rescored)[0] == 0
    assert json.loads((job.run.folder / "score.json").read_text())["reference_run"] != own
    small().write()
    assert copy.read_text() == before
    copy.unlink()
    assert ("DDIM", 5, 0) not in small().records


def test_a_copy_of_another_version_is_replaced(small, results):
    table = small()
    table.make()
    copy = next((table.folder / "records").glob("*.json"))
    before = copy.read_text()
    copy.write_text(json.dumps(json.loads(before) | {"of_later_versions": 1}))
    small().write()
    assert copy.read_text() == before


def test_a_command_makes_its_cell(small, evodiff_command):
    table = small({"DDIM": {"run": ["solver=ddim"], "at": [{"nfe": [5], "run": ["t_end=0.01"]}]}})
    cell = table.cells["DDIM", 5]
    (command,) = text.commands(table, cell)
    words = shlex.split(command)
    assert words[:2] == ["evodiff", "run"] and "t_end=0.01" in words
    assert evodiff_command(*words[1:])[0] == 0
    assert ("DDIM", 5, 0) in table.records and ("DDIM", 6, 0) not in table.records


def test_what_cells_read_is_computed_first(small, results, tmp_path):
    """A searched grid and the statistics of the model; a trial does not compute them."""
    grid, folder = tmp_path / "gits_mixture.json", tmp_path / "ems-4-8"
    rows = {
        "DDIM": {"run": ["solver=ddim", "grid=file", f"grid.path={grid}"]},
        "v3": {"run": ["solver=dpm_v3", f"solver.statistics={{_target_:evodiff.ems.load,folder:{folder}}}"]},
    }
    assert [m.what for m in missing_inputs(small(rows))] == [f"grid {grid}", f"statistics {folder}"]
    assert small(rows, "limit=8").make() == 1
    assert not grid.exists() and not folder.exists()
    assert small(rows).make() == 0
    assert len(small(rows).records) == 4 and missing_inputs(small(rows)) == []
    assert json.loads((folder / "ems.json").read_text())["samples"] == 8
    grid.unlink()
    assert missing_inputs(small(rows)) == []  # nothing is left to sample with it


def test_it_is_of_the_cells_model_and_on_the_tables_device(small, monkeypatch):
    searched = ["solver=ddim", "grid=file"]
    rows = {
        "A": [*searched, "grid.path=gits_mixture.json"],
        "B": [*searched, "model=mixture_digits", "grid.path=gits_mixture_digits.json"],
        "C": ["solver=dpm_v3", "solver.statistics=checkpoints/nowhere"],
    }
    table = small(rows, "device=cpu")
    assert [m.argv[:2] for m in missing_inputs(table)] == [("gits", "model=mixture"), ("gits", "model=mixture_digits")]
    asked = []
    monkeypatch.setattr("evodiff.gits.main", asked.append)
    table.make_inputs(Failures())
    assert [argv[-1] for argv in asked] == ["device=cpu"] * 2


def test_a_launcher_computes_what_is_left_too(evodiff_command, results, monkeypatch):
    """Scores of reference runs and trajectories, for this machine may be one without a GPU."""
    monkeypatch.setattr(trajectory, "trajectory", out_of_memory)
    monkeypatch.setattr(table_module, "score_run", out_of_memory)
    smoke = ["table", "smoke", "table.nfe=[5]", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    code, out, err = evodiff_command(*smoke)
    assert code == 0, err
    assert re.match(r"evodiff: smoke-\w{6}: 5 runs to sample\nevodiff: \S+ million evaluations to do\n", err)
    assert "4 of 4 cells done" in out and "heun at NFE 79" in out
    assert len([*results.rglob("trajectory.npz")]) == 4


def test_a_grid_of_ones_own_that_is_not_there_is_not_invented(small, tmp_path, capsys):
    grid = tmp_path / "mine.json"
    table = small({"DDIM": ["solver=ddim", "grid=file", f"grid.path={grid}"]})
    assert table.computable == [] and missing_inputs(table)[0].what == f"grid {grid}"
    assert table.make() == 1
    assert f"grid file {grid}: " in capsys.readouterr().err
    assert not grid.exists()


def test_a_launcher_computes_it_first_too_and_the_pages_are_written_also_when_a_cell_fails(
    evodiff_command, results, tmp_path
):
    grid = tmp_path / "gits_mixture.json"
    base = "'model=mixture','protocol=none','seeds=0-15','shard=8','batch=8','metrics=[contrast]'"
    rows = ["~table.rows.DDIM", "~table.rows.EVODiff", "+table.rows.Heun=['solver=heun']"]
    rows += [f"+table.rows.Searched=['solver=ddim','grid=file','grid.path={grid}']"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code, out, err = evodiff_command("table", "smoke", f"table.base=[{base}]", "table.nfe=[5]", *rows, *launcher)
    assert code == 1
    assert "Heun cannot spend exactly nfe=5" in err
    assert grid.exists()
    assert "3 of 4 cells done" in out
    (page,) = (results / "tables").glob("smoke-*/table.md")  # of another table than the file's
    assert "3 of 4 cells done" in page.read_text() and "`evodiff table smoke '+table.rows.Heun" in page.read_text()
