"""W&B: what lies in its offline files is what the records say; a wandb that fails costs one line."""

import json
import shutil
import struct
import subprocess

import numpy as np
import pytest

from evodiff import tracking
from evodiff.dashboard import report
from evodiff.errors import ConfigError
from evodiff.paths import ROOT
from evodiff.pictures import save_grid
from evodiff.runs.record import Record
from evodiff.tracking import WandB, as_table


def record(solver="ddim", nfe=5, seed=0, **metrics):
    run = {
        "model": {"name": "mixture"},
        "solver": {"name": solver, "order": None},
        "nfe": nfe,
        "seeds": [seed, seed + 7],
    }
    return Record(
        key=f"{solver}-nfe{nfe}-{seed:08d}",
        run=run,
        protocol=None,
        metrics=metrics or {"fid@8": 10.0 / nfe + seed, "contrast@8": 70.0},
        nfe=nfe,
        network_passes=nfe,
        images=8,
        seconds=2.0,
        weights={},
        shards={},
        reference_run=None,
        device="cpu",
    )


RECORDS = [record("ddim", 5), record("ddim", 5, seed=1), record("ddim", 10), record("unipc_3", 5)]
LABELS = ["DDIM", "DDIM", "DDIM", "UniPC"]
PUBLISHED = {"fid@8": {"UniPC": {5: 1.5, 10: 1.0}}, "contrast@8": {}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_MODE", "offline")  # no test may reach the network, whatever the code does
    return tmp_path


def log_records(path):
    """The payloads of a file in LevelDB's log format: 32 KiB blocks of (crc, length, type, data)."""
    data, at, parts = path.read_bytes(), 7, []  # after W&B's own header
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield b"".join(parts)
            parts = []


def read_back(results):
    """id -> what wandb wrote: its run record, summary, history and files."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = {}
    for path in sorted((results / "wandb").glob("offline-run-*/run-*.wandb")):
        shown = {"summary": {}, "history": [], "folder": path.parent}
        for payload in log_records(path):
            entry = pb.Record()
            entry.ParseFromString(payload)
            kind = entry.WhichOneof("record_type")
            if kind == "run":
                shown["run"] = entry.run
                shown["config"] = {item.key: json.loads(item.value_json) for item in entry.run.config.update}
            elif kind == "summary":
                shown["summary"] |= {
                    i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in entry.summary.update
                }
            elif kind == "history":
                shown["history"].append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in entry.history.item}
                )
        assert shown["run"].run_id not in found, "one offline copy of each run"
        found[shown["run"].run_id] = shown
    return found


def table_in(shown, key):
    (path,) = (shown["folder"] / "files/media/table").glob(f"{key}_*.table.json")
    return json.loads(path.read_text())


def test_offline_files_hold_the_records_and_the_curves(results, capsys):
    pytest.importorskip("wandb")
    grid = results / "runs/mixture" / RECORDS[0].key / "grid.png"
    grid.parent.mkdir(parents=True)
    save_grid(grid, np.zeros((4, 1, 8, 8), np.uint8), columns=2)
    assert WandB().publish("demo", RECORDS, LABELS, PUBLISHED)
    assert capsys.readouterr() == ("", "")
    shown = read_back(results)
    assert shown.keys() == {*(r.key for r in RECORDS), "table-demo"}
    for r in RECORDS:
        one = shown[r.key]
        assert (one["run"].display_name, one["run"].run_group, one["run"].job_type) == (
            r.key,
            "demo",
            r.run["solver"]["name"],
        )
        assert one["config"]["nfe"] == r.nfe
        assert {**r.metrics, "nfe": r.nfe, "images": 8, "images_per_second": 4.0}.items() <= one["summary"].items()
    (logged,) = shown[RECORDS[0].key]["history"]
    assert logged["grid._type"] == "image-file"
    assert list((shown[RECORDS[0].key]["folder"] / "files/media/images").glob("grid_*.png"))
    table = shown["table-demo"]
    assert table["run"].job_type == "table"
    cells = table_in(table, "cells")
    columns = ["row", "nfe", "fid@8", "contrast@8", "fid@8 (published)", "images", "images_per_second", "key"]
    assert cells["columns"] == columns
    assert cells["data"][3] == ["UniPC", 5, 2.0, 70.0, 1.5, 8, 4.0, RECORDS[3].key]
    points = {(label, nfe): value for nfe, label, value in table_in(table, "fid_8_against_nfe_table")["data"]}
    assert points == {
        ("DDIM", 5): 2.5,
        ("DDIM", 10): 1.0,
        ("UniPC", 5): 2.0,
        ("UniPC (published)", 5): 1.5,
        ("UniPC (published)", 10): 1.0,
    }


def test_publishing_again_leaves_one_copy_of_each_run(results):
    pytest.importorskip("wandb")
    for _ in range(2):
        assert WandB().publish(RECORDS[0].key, RECORDS[:1])
    (one,) = read_back(results).values()
    assert one["run"].run_group == "mixture"


def test_a_run_of_two_tables_has_both_as_tags(results):
    pytest.importorskip("wandb")
    for table in ("demo", "other"):
        assert WandB().publish(table, RECORDS[:1], LABELS[:1])
    one = read_back(results)[RECORDS[0].key]
    assert one["run"].run_group == "other"
    assert list(one["run"].tags) == ["demo", "other"]


def test_a_copy_for_another_project_stays(results):
    pytest.importorskip("wandb")
    for project in ("first", "second", "second"):
        assert WandB(project=project).publish(RECORDS[0].key, RECORDS[:1])
    assert len(list((results / "wandb").glob(f"offline-run-*-{RECORDS[0].key}"))) == 2


def test_curves_are_means_over_seeds_and_without_what_is_missing():
    table = as_table("demo", [*RECORDS, record("ddim", 20, **{"is@8": 3.0})], [*LABELS, "DDIM"], {})
    assert table["curves"]["fid@8"] == {"DDIM": [[5, 10], [2.5, 1.0]], "UniPC": [[5], [2.0]]}
    assert table["curves"]["is@8"] == {"DDIM": [[20], [3.0]]}
    assert table["lines"][-1][2:5] == [None, None, 3.0]


def test_papers_stand_beside_the_metric_they_report():
    both = record("ddim", 5, **{"is@8": 3.0, "fid@8": 2.0})
    table = as_table("demo", [both], ["DDIM"], {"is@8": {"DDIM": {}}, "fid@8": {"DDIM": {5: 1.5}}})
    assert table["curves"]["is@8"] == {"DDIM": [[5], [3.0]]}
    assert table["curves"]["fid@8"] == {"DDIM": [[5], [2.0]], "DDIM (published)": [[5], [1.5]]}
    assert table["columns"][2:5] == ["is@8", "fid@8", "fid@8 (published)"]
    assert table["lines"][0][2:5] == [3.0, 2.0, 1.5]


FAKES = {
    "raises": "def init(**k): raise RuntimeError('no API key configured\\n(try wandb login)')",
    "hangs": "import threading\ndef init(**k): threading.Event().wait()",
    "aborts": "import os\ndef init(**k): os.abort()",
    "is missing": "raise ModuleNotFoundError('No module named wandb')",
}


@pytest.mark.parametrize("how", FAKES)
def test_a_wandb_that_fails_costs_a_line(results, tmp_path_factory, monkeypatch, capsys, how):
    folder = tmp_path_factory.mktemp("fake")
    settings = "class Settings:\n    def __init__(self, **k): pass\n"
    (folder / "wandb.py").write_text(settings + FAKES[how])
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(tracking, "PER_RUN", 0.0)
    assert not WandB(timeout=2.0).publish(RECORDS[0].key, RECORDS[:1])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("evodiff: W&B: ")
    assert err.count("\n") == 1
    said = {
        "raises": "RuntimeError: no API key configured (try wandb login)",
        "hangs": "no answer within 2 s",
        "aborts": "exit code -6",
        "is missing": "wandb is not installed",
    }
    assert said[how] in err


def test_what_cannot_be_sent_is_written_offline(results, monkeypatch, capsys):
    """Real wandb, online, without a key."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(results))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not WandB(mode="online").publish(RECORDS[0].key, RECORDS[:1])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "writing offline" in err
    assert read_back(results).keys() == {RECORDS[0].key}


def test_without_a_network_nothing_is_sent(results, monkeypatch, capsys):
    pushed = []

    def run(command, input, env, **kwargs):
        pushed.append((json.loads(input)["mode"], env.get("WANDB_ERROR_REPORTING")))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tracking.subprocess, "run", run)
    monkeypatch.setenv("EVODIFF_OFFLINE", "1")
    assert not WandB(mode="online").publish(RECORDS[0].key, RECORDS[:1])
    assert capsys.readouterr().err == "evodiff: W&B: EVODIFF_OFFLINE is set; writing offline\n"
    assert pushed == [("offline", "false")]
    assert WandB().publish(RECORDS[0].key, RECORDS[:1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_report_is_defined_where_wandb_workspaces_is_installed():
    pytest.importorskip("wandb_workspaces")
    table = as_table("demo", RECORDS, LABELS, PUBLISHED)
    made = report({"project": "evodiff", "entity": "someone"}, table)
    assert made.title == "evodiff: demo"
    assert len(made.blocks) == 3
    assert made.blocks[2].runsets[0].filters == "Tags() in ['demo'] and JobType != 'table'"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="tracker.mode=ofline does not exist; possible: offline, online, disabled"):
        WandB(mode="ofline")


@pytest.mark.parametrize("timeout", ["abc", 0, -1, True, None, float("nan"), float("inf")])
def test_an_impossible_timeout_is_refused_before_anything_is_made(timeout):
    with pytest.raises(ConfigError, match=f"tracker.timeout={timeout} is impossible: expected a number of seconds"):
        WandB(timeout=timeout)


def test_push_without_a_table_says_how(evodiff_command):
    for argv in (["wandb"], ["wandb", "push"], ["wandb", "pull", "smoke"]):
        code, out, err = evodiff_command(*argv)
        assert (code, out) == (1, "")
        assert "usage: evodiff wandb push TABLE" in err


@pytest.mark.parametrize("silent", ["tracker=none", "tracker.mode=disabled"])
def test_push_with_a_tracker_that_shows_nothing_is_refused(evodiff_command, results, silent):
    shutil.copytree(ROOT / "results/tables/mnist_parts", results / "tables/mnist_parts")
    code, out, err = evodiff_command("wandb", "push", "mnist_parts", silent)
    assert (code, out) == (1, "")
    assert "this tracker shows nothing" in err


def test_a_process_that_cannot_start_costs_a_line(results, monkeypatch, capsys):
    def run(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(tracking.subprocess, "run", run)
    assert not WandB().publish(RECORDS[0].key, RECORDS[:1])
    assert "W&B: its process cannot be started (Cannot allocate memory); " in capsys.readouterr().err


def test_what_wandb_is_missing_for_is_not_said_to_be_written(results, monkeypatch, capsys):
    monkeypatch.setattr(WandB, "_push", lambda self, content: "wandb is not installed")
    assert not WandB(mode="online").publish(RECORDS[0].key, RECORDS[:1])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "`evodiff wandb push TABLE` can send the records later" in err


def test_push_without_records_says_what_makes_them(evodiff_command, tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    code, _, err = evodiff_command("wandb", "push", "smoke")
    assert code == 1
    assert "table smoke has no records yet. `evodiff table smoke` makes them." in err
