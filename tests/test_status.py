"""What is done, what is needed, what it costs; and commands that a shell can run."""

import json
import re
import shlex
import shutil
import subprocess

import pytest

import evodiff.config
from evodiff.config import compose
from evodiff.errors import ConfigError
from evodiff.paths import ROOT, results_folder
from evodiff.runs.job import Job
from evodiff.tables import throughput
from evodiff.tables.status import cost, lines_of, missing_files, plan, unfinished
from evodiff.tables.table import Table
from evodiff.tables.throughput import passes

UNKNOWN = "hours unknown: no throughput of mixture is recorded, nor of a network like it"


@pytest.fixture(autouse=True)
def measured(tmp_path, results, monkeypatch):
    """Nothing is fetched or measured but what it is called with."""
    monkeypatch.setenv("EVODIFF_CACHE", str(tmp_path / "cache"))
    throughput.measured_file().parent.mkdir()
    return lambda rates: throughput.measured_file().write_text(json.dumps(rates))


def table(name="smoke", *overrides, **changes):
    cfg = compose("table", [f"table={name}", *overrides])
    cfg.table.update(changes)
    return Table.from_config(cfg)


def small(**rows):
    base = ["model=mixture", "protocol=none", "seeds=0-15"]
    return table(base=base, rows={name: {"run": run, "nfe": [5, 6]} for name, run in rows.items()})


def left(t):
    return cost(t, unfinished(t))


def test_status_counts_what_is_done_and_what_is_left(capsys):
    t = small(DDIM=["solver=ddim"], Heun=["solver=heun"])
    assert next(lines_of(t)) == "smoke: 4 cells (4 missing), 0 of 4 runs done"
    # 16 images x (5 + 6 + 5 + 6) evaluations, and 79 for the reference
    assert list(left(t)) == ["0.00162 million evaluations to do", UNKNOWN]
    assert t.make() == 1  # Heun cannot spend 5
    assert next(lines_of(t)) == "smoke: 4 cells (1 missing, 3 done), 3 of 4 runs done"
    evaluations, hours = left(t)
    assert evaluations == "8e-05 million evaluations to do"
    assert re.fullmatch(r"\S+ minutes on cpu .* \(mixture: [\d.]+/s, its own runs\)", hours)


def test_records_without_images_are_told_as_such(results):
    t = small(DDIM=["solver=ddim"])
    t.make()
    told = "  of {} only the records are here: `evodiff table smoke` samples their images again, {} million evaluations"
    assert list(lines_of(t)) == ["smoke: 2 cells (2 done), 2 of 2 runs done"]
    next(t.jobs["DDIM", 6, 0].run.folder.glob("shard-*")).unlink()
    assert list(lines_of(t))[1:] == [told.format(1, 9.6e-05)]
    shutil.rmtree(results / "runs")
    assert list(lines_of(t))[1:] == [told.format(2, 0.000176)]


def test_what_a_table_samples_is_told_before(results):
    t = small(DDIM=["solver=ddim"])
    # 16 images x (5 + 6) evaluations, and 79 for the reference
    assert list(plan(t)) == ["smoke: 3 runs to sample", "0.00144 million evaluations to do", UNKNOWN]
    t.make()
    assert list(plan(t)) == []
    shutil.rmtree(t.jobs["DDIM", 6, 0].run.folder)
    told, evaluations, _ = plan(t)
    assert told == (
        "smoke: 1 run to sample; of 1 the records are here: `evodiff report smoke` shows them without sampling"
    )
    assert evaluations == "9.6e-05 million evaluations to do"
    (t.jobs["DDIM", 5, 0].run.folder / "manifest.json").write_text("{")  # told by its own cell, which does not end t
    assert next(iter(plan(t))).startswith("smoke: 2 runs to sample; of 2 the records are here")


def test_a_record_beside_one_of_another_protocol_is_found():
    t = small(DDIM=["solver=ddim"])
    t.make()
    path = t.jobs["DDIM", 5, 0].run.folder / "score.json"
    other = json.dumps(json.loads(path.read_text()) | {"protocol": {"hash": "another"}})
    path.rename(path.with_name("score-none.json"))
    path.write_text(other)
    shutil.rmtree(t.folder / "records")
    assert ("DDIM", 5, 0) in t.records


def test_a_cell_that_lacks_a_metric_is_not_done():
    base = ["model=mixture", "protocol=none", "seeds=0-3"]
    rows = {"DDIM": {"run": ["solver=ddim"], "nfe": [5]}}
    fewer, more = table(base=[*base, "metrics=[contrast]"], rows=rows), table(base=base, rows=rows)
    assert fewer.make() == 0
    assert next(lines_of(fewer)) == "smoke: 1 cells (1 done), 1 of 1 runs done"
    assert next(lines_of(more)) == "smoke: 1 cells (1 missing), 0 of 1 runs done"
    assert more.make() == 0
    assert next(lines_of(more)) == "smoke: 1 cells (1 done), 1 of 1 runs done"


def test_hours_come_from_a_recorded_throughput(measured):
    measured({"a CPU": {"mixture": 1.0}, "a GPU": {"mixture": 2.0}})
    assert list(left(small(DDIM=["solver=ddim"]))) == [
        "0.00144 million evaluations to do",
        f"{16 * 90 / 2 / 60:#.3g} minutes on a GPU (mixture: 2.00/s, measured)",
        f"{16 * 90 / 60:#.3g} minutes on a CPU (mixture: 1.00/s, measured)",
    ]


def test_a_guided_evaluation_takes_longer(measured):
    measured({"a GPU": {"imagenet256_adm": 7.0}})
    t = table("imagenet256_adm", "repeats=1")
    (run,) = {job.run.guidance["name"]: job.run for job in t.jobs.values()}.values()
    evaluations = sum(len(job.run.seed_range) * job.run.nfe for job in t.jobs.values())
    hours = evaluations * passes(run) / 7 / 3600
    assert passes(run) > 1
    assert f"{hours:.0f} hours on a GPU (imagenet256_adm: 7.00/s, measured)" in left(t)


def test_what_a_table_needs_comes_with_the_way_to_get_it(tmp_path):
    needed = "\n".join(missing_files(table("cifar10_edm")))
    assert "model cifar10_edm_uncond_vp: `evodiff fetch cifar10_edm_uncond_vp` (223 MB)" in needed
    assert "reference cifar10_score_sde_reference" in needed
    assert f"evodiff stats ems model=cifar10_edm nodes=1200 samples=1024 out={ROOT}/checkpoints/cache/ems/" in needed
    file = tmp_path / "cache" / "cifar10_edm_uncond_vp" / "edm-cifar10-32x32-uncond-vp.pkl"
    file.parent.mkdir(parents=True)
    file.touch()
    assert "model cifar10_edm_uncond_vp" not in "\n".join(missing_files(table("cifar10_edm")))


def test_statistics_whose_computation_was_broken_off_are_needed_still(tmp_path):
    statistics = f"solver.statistics={{_target_: evodiff.ems.load, folder: {tmp_path}}}"
    rows = {"v3": {"run": ["solver=dpm_v3", statistics], "nfe": [5]}}
    t = table(base=["model=mixture", "protocol=none", "seeds=0-3"], rows=rows)
    (tmp_path / "partial.npz").touch()
    assert f"statistics {tmp_path}" in "\n".join(missing_files(t))
    (tmp_path / "l.npz").touch()
    assert list(missing_files(t)) == []


def test_other_networks_of_a_row_are_needed_too():
    needed = "\n".join(missing_files(table("cifar10_edm_nvlabs")))
    assert "cifar10_edm_uncond_ve" in needed and "cifar10_edm_cond_vp" in needed
    grids = results_folder() / "grids"
    assert f"`evodiff gits model=cifar10_edm steps=4-25 out={grids}/gits_cifar10_edm.json`" in needed


def test_several_tables_come_in_the_order_asked_for(evodiff_command):
    code, out, _ = evodiff_command("status", "smoke", "demo")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")] == ["smoke", "demo"]


def test_an_unfinished_table_that_lacks_nothing_says_so():
    assert list(lines_of(small(DDIM=["solver=ddim"])))[-1].endswith("nothing else is needed: `make table-smoke`")


def test_every_shown_command_is_the_run_of_its_cell(evodiff_command):
    """Read by a shell and composed, it has the key that the table looks for."""
    for name, row, nfe in (("cifar10_score_sde", "DPM-Solver-v3", 5), ("cifar10_edm_nvlabs", "DEIS-tAB3", 8)):
        code, out, _ = evodiff_command("show", f"table={name}", f"row={row}", f"nfe={nfe}", "repeats=2")
        lines = [line for line in out.splitlines() if not line.startswith("#")]
        keys = []
        for line in lines:
            shell = f"evodiff() {{ printf '%s\\n' \"$@\"; }}; {line}"
            words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout.splitlines()
            assert words[0] == "run"
            keys.append(Job.compose(words[1:]).run.key())
        assert code == 0
        assert keys == [job.run.key() for job in table(name, "repeats=2").cells[row, nfe].jobs]
    assert "# 14.39: GITS arXiv" not in out and "# 5.55: GITS arXiv" in out


def test_rows_are_listed_as_commands(evodiff_command):
    _, out, _ = evodiff_command("show", "table=demo")
    assert evodiff_command("show", "demo")[1] == out
    words = shlex.split(out.splitlines()[1])
    assert words == ["evodiff", "show", "table=demo", "row=DPM-Solver++ 2M", "nfe=5,8,10,15"]
    assert len(evodiff_command(*words[1:])[1].splitlines()) == 4


def test_a_table_can_be_named_as_in_show(evodiff_command):
    assert evodiff_command("status", "table=demo") == evodiff_command("status", "demo")
    code, _, err = evodiff_command("report", "table=demos")
    assert code == 1 and "Did you mean demo?" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show"], "usage: evodiff show"),
        (["show", "table=demos"], "demos is no table. Did you mean demo?"),
        (["show", "demos", "row=DDIM"], "demos is no table. Did you mean demo?"),
        (["show", "table=demo", "row=DIM"], "Did you mean DDIM?"),
        (["show", "table=demo", "row=DDIM", "nfe=6"], "no cell at nfe=6; it has 5, 8, 10, 15"),
        (["show", "table=demo", "row=DDIM", "nfe=5,99"], "no cell at nfe=99; it has 5, 8, 10, 15"),
        (["status", "dmo"], "Did you mean demo?"),
        (["show", "demo", "nfe=5"], "nfe=5 needs a row. `evodiff show demo` lists them."),
        (["show", "demo", "tracker=wandb"], "tracker=wandb has no effect on `evodiff show`"),
        (["report", "demo", "rows=[DDIM]"], "rows=[DDIM] has no effect on `evodiff report`, which makes no runs."),
        (["report", "demo", "hydra.run.dir=x"], "hydra.run.dir=x has no effect on `evodiff report`"),
        (["report", "demo", "hydra/launcher=joblib"], "Possible: limit, repeats, table.FIELD."),
    ],
)
def test_what_is_not_there_is_named(evodiff_command, argv, message):
    code, _, err = evodiff_command(*argv)
    assert code == 1 and message in err


def test_a_throughput_of_another_model_does_not_count(measured):
    measured({"a GPU": {"mnist_tiny": 2.0}})
    assert list(left(small(DDIM=["solver=ddim"])))[1] == UNKNOWN


def test_a_table_that_cannot_be_read_is_an_error_and_does_not_end_the_others(evodiff_command, tmp_path, monkeypatch):
    with pytest.raises(ConfigError):
        table("smoke", rows={"a": {"run": ["solver=ddim"], "nfes": []}})
    shutil.copytree(evodiff.config.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(evodiff.config, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs/table/mine.yaml").write_text(
        "name: mine\ntitle: x\nbase: [model=mixture]\nnfe: [5]\nrows: {A: [solver=ddmi]}\n"
    )
    code, out, _ = evodiff_command("status", "mine", "smoke")
    assert code == 1
    assert "mine: solver=ddmi does not exist." in out and "smoke: 8 cells" in out


def test_budgets_are_shown_as_the_table_takes_them(evodiff_command):
    shown = [evodiff_command("show", "table=demo", "row=DDIM", f"nfe={nfe}") for nfe in ("5,8", "[5,8]")]
    assert shown[0] == shown[1] and shown[0][0] == 0
