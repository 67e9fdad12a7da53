"""One run on several processes: the same images, each made once, whoever dies on the way."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from evodiff import commands, ranks
from evodiff.paths import ROOT
from evodiff.runs import distributed
from evodiff.runs.job import Job, store_of
from evodiff.runs.sample import sample_run
from evodiff.store import SampleStore

MIXTURE = [
    "model=mixture",
    "protocol=none",
    "solver=evodiff",
    "nfe=5",
    "seeds=0-31",
    "shard=4",
    "batch=4",
    "device=cpu",
]
ALONE = [*MIXTURE, "reference_run=null"]


def images_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("shard-*.npz"))}


def scores_of(folder):
    records = [json.loads(path.read_text()) for path in sorted(folder.rglob("score.json"))]
    return [(record["key"], record["metrics"], record["shards"]) for record in records]


def seeds_of(folder):
    content = json.loads(next(folder.rglob("manifest.json")).read_text())
    return sorted(seed for s in content["shards"] for seed in range(s["first"], s["last"] + 1))


def torchrun(n, folder, script, *arguments):
    """On the CPU, with its rendezvous on any free port."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--rdzv-backend=c10d",
         "--rdzv-endpoint=localhost:0", str(script), *arguments],
        capture_output=True, text=True, env=os.environ | {"EVODIFF_RESULTS": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_make_the_run_of_one_process(evodiff_command, results, tmp_path_factory, n):
    elsewhere = tmp_path_factory.mktemp("ranks")
    done = torchrun(n, elsewhere, ROOT / "scripts/run.py", *MIXTURE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rmse@32") == 1, "rank 0 scores"
    code, out, _ = evodiff_command("run", *MIXTURE)
    assert code == 0
    assert done.stdout == out
    assert images_of(elsewhere) == images_of(results)
    assert scores_of(elsewhere) == scores_of(results)


DYING = """
import os, sys
from evodiff.cli import main
from evodiff.store import SampleStore

write = SampleStore.write
def write_then_die(self, *args, **kwargs):
    write(self, *args, **kwargs)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
SampleStore.write = write_then_die
sys.exit(main(["run", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_killed_rank_costs_a_rerun_of_what_it_had_not_finished(evodiff_command, results, tmp_path_factory, tmp_path):
    elsewhere = tmp_path_factory.mktemp("ranks")
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    assert torchrun(2, elsewhere, script, *ALONE).returncode != 0
    before = images_of(elsewhere)
    assert before
    assert torchrun(3, elsewhere, ROOT / "scripts/run.py", *ALONE).returncode == 0
    assert seeds_of(elsewhere) == list(range(32))
    evodiff_command("run", *ALONE)
    assert images_of(elsewhere) == images_of(results)
    assert scores_of(elsewhere) == scores_of(results)
    assert before.items() <= images_of(elsewhere).items()


def test_rank_0_takes_over_what_a_dead_process_had(results, monkeypatch, capsys):
    """It waits while another process holds a shard, and for no longer."""
    job = Job.compose(ALONE)
    store = store_of(job)
    claimed = store.claim(range(4, 8))
    polls = []

    def other_process():
        with claimed as mine:
            assert mine
            held.set()
            dead.wait()

    def sleep(seconds):
        polls.append(store.missing())
        if len(polls) == 3:
            dead.set()
            thread.join()

    held, dead = threading.Event(), threading.Event()
    thread = threading.Thread(target=other_process)
    thread.start()
    held.wait()
    monkeypatch.setattr(distributed.time, "sleep", sleep)
    distributed.finish(job)
    assert polls == [[range(4, 8)]] * 3
    assert store.missing() == []
    assert capsys.readouterr().err.count("waiting for 4 images that other processes make") == 1


def test_a_second_process_by_accident_harms_nothing(evodiff_command, results):
    store = store_of(Job.compose(ALONE))
    with store.claim(range(4, 8)):
        code, out, err = in_a_thread(lambda: evodiff_command("run", *ALONE))
        assert (code, out) == (1, "")
        assert "another process still works on this run, so it is not scored here. If that one does not" in err
        code, out, err = in_a_thread(lambda: evodiff_command("sample", *ALONE))
        assert code == 0
        assert out.endswith("another process still works on this run\n")
    assert not list(results.rglob("score.json"))
    assert evodiff_command("run", *ALONE)[0] == 0
    assert seeds_of(results) == list(range(32))


def test_what_another_process_cut_elsewhere_is_finished(results, monkeypatch):
    """One that ended after a part of a range that this process had yet to come to."""
    job = Job.compose(["model=mixture", "protocol=none", "reference_run=null", "solver=ddim", "nfe=5", "seeds=0-15",
                       "shard=8", "batch=8", "device=cpu"])  # fmt: skip
    claim, part = SampleStore.claim, iter([range(8, 12)])

    def claim_late(self, seeds):
        for theirs in part:
            images = np.zeros((len(theirs), 3, 8, 8), np.uint8)
            store_of(job).write(theirs, {"images": images}, nfe=5, seconds=1.0, weights={})
        return claim(self, seeds)

    monkeypatch.setattr(SampleStore, "claim", claim_late)
    assert sample_run(job)
    assert [(s.first, s.last) for s in store_of(job).shards] == [(0, 7), (8, 11), (12, 15)]


def in_a_thread(function):
    """Locks are per open file: another thread is as good as another process."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_other_ranks_sample_the_reference_too_and_are_silent(results, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = Job.compose(MIXTURE)
    assert commands.sample_and_score(job) == ""
    assert store_of(job).missing() == store_of(job.reference).missing() == []
    assert not list(results.rglob("score.json"))
    assert capsys.readouterr() == ("", "")


def test_one_rank_scores(evodiff_command, results, monkeypatch):
    assert evodiff_command("sample", *MIXTURE)[0] == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = Job.compose(MIXTURE)
    assert evodiff_command("score", *MIXTURE) == (0, "", "")
    assert store_of(job.reference).missing() == [], "the reference is everybody's"
    assert not list(results.rglob("score.json"))
    monkeypatch.setenv("RANK", "0")
    assert "rmse@32" in evodiff_command("score", *MIXTURE)[1]


def test_other_ranks_leave_the_reference_of_a_scored_run(evodiff_command, results, monkeypatch):
    assert evodiff_command("run", *MIXTURE)[0] == 0
    job = Job.compose(MIXTURE)
    shutil.rmtree(job.reference_run.folder)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evodiff_command("run", *MIXTURE) == (0, "", "")
    assert not job.reference_run.folder.exists()


@pytest.mark.slow
def test_ranks_share_a_table_with_what_its_cells_read(tmp_path_factory, tmp_path):
    """A searched grid is made by one rank, the other waits; a failing cell ends neither the others nor the pages."""
    elsewhere, grid = tmp_path_factory.mktemp("ranks"), tmp_path / "gits_mixture.json"
    base = "'model=mixture','protocol=none','seeds=0-15','shard=4','batch=4','metrics=[contrast]','device=cpu'"
    rows = ["~table.rows.DDIM", "~table.rows.EVODiff", "+table.rows.Heun=['solver=heun']"]
    rows += [f"+table.rows.Searched=['solver=ddim','grid=file','grid.path={grid}']"]
    table = ["smoke", f"table.base=[{base}]", "table.nfe=[5]", "device=cpu", *rows]
    done = torchrun(2, elsewhere, ROOT / "scripts/table.py", *table)
    assert done.returncode != 0
    assert "Heun cannot spend exactly nfe=5" in done.stderr
    assert str(grid) not in done.stderr
    assert done.stdout.count(f"{grid}: grids of") == 1
    assert "3 of 4 cells done" in done.stdout
    assert [*(elsewhere / "tables").glob("smoke-*/report.html")]  # of another table than the file's


def test_a_sweep_under_torchrun_is_refused(evodiff_command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = evodiff_command("run", "-m", *ALONE)
    assert code == 1
    assert "torchrun shares one run among its processes" in err
    code, _, err = evodiff_command("table", "smoke", "hydra/launcher=joblib")
    assert code == 1
    assert "torchrun shares a table's runs among its processes; leave out hydra/launcher" in err


def test_a_rank_uses_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ranks.use_own_gpu()
    monkeypatch.setenv("WORLD_SIZE", "8")
    for local in ("0", "3", "5"):
        monkeypatch.setenv("LOCAL_RANK", local)
        ranks.use_own_gpu()
    assert chosen == [0, 3, 1]


def test_a_rank_alone_is_the_first(evodiff_command, results, monkeypatch):
    """Other schedulers leave such variables, too."""
    monkeypatch.setenv("RANK", "1")
    code, out, _ = evodiff_command("run", *ALONE)
    assert code == 0 and "contrast@" in out
    monkeypatch.setenv("WORLD_SIZE", "")
    assert evodiff_command("run", *ALONE)[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "two")
    code, _, err = evodiff_command("run", *ALONE)
    assert code == 1 and "the environment has WORLD_SIZE=two, where torchrun puts a number" in err
