"""Sweeps: no job ends another, failures are counted and logged, and the same command runs only what is missing."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from evodiff import commands
from evodiff.commands import RUN, sample, sampled_line, score, score_line
from evodiff.launchers import Died, Processes, Requeued, Submitit
from evodiff.paths import ROOT
from evodiff.runs.job import Job
from evodiff.sweeps import MOST, Action, combinations, first_of_each, launch, work

MIXTURE = ["model=mixture", "protocol=none", "reference_run=null", "seeds=0-7", "shard=4", "batch=4"]


HOWTO = ROOT / "docs/howto"


def test_combinations_are_hydras():
    assert combinations(["a=1,2", "b=x", "c=3,4"]) == [
        [f"a={a}", "b=x", f"c={c}"] for a in (1, 2) for c in (3, 4)
    ]  # fmt: skip
    assert combinations(["nfe=range(5,8)"]) == [["nfe=5"], ["nfe=6"], ["nfe=7"]]
    assert combinations(["solver=glob(dpmpp_*,exclude=*s)"]) == [
        ["solver=dpmpp_1"],
        ["solver=dpmpp_2m"],
        ["solver=dpmpp_3m"],
    ]
    assert combinations(["metrics=[fid,is],[kid]"]) == [["metrics=[fid,is]"], ["metrics=[kid]"]]
    assert combinations(["+a=1,2"]) == [["+a=1"], ["+a=2"]]
    assert first_of_each(["a=1,2,3", "b=4,5"]) == [["a=1", "b=4"], ["a=2", "b=5"], ["a=3", "b=5"]]


def test_a_sweep_runs_every_combination(evodiff_command, results):
    code, out, _ = evodiff_command("run", "-m", *MIXTURE, "solver=ddim,evodiff", "nfe=5,6")
    assert code == 0
    assert [line.split()[0].rpartition("-")[0] for line in out.splitlines()] == [
        "mixture/ddim-nfe5", "mixture/ddim-nfe6", "mixture/evodiff-nfe5", "mixture/evodiff-nfe6",
    ]  # fmt: skip


def test_a_failing_run_does_not_end_the_sweep(evodiff_command, results):
    code, out, err = evodiff_command("run", "-m", *MIXTURE, "solver=heun,ddim", "nfe=5")
    assert code == 1
    assert "Heun cannot spend exactly nfe=5" in err
    assert "1 run of the sweep failed" in err
    assert out.startswith("mixture/ddim-nfe5")


@pytest.mark.parametrize("flags", [["-m", "--help"], ["-m", "-h"], ["--help"]])
def test_help_of_a_sweep_is_shown_and_nothing_is_run(evodiff_command, results, flags):
    code, out, _ = evodiff_command("sample", *flags, *MIXTURE, "solver=ddim", "nfe=5,6")
    assert code == 0 and out.startswith("usage: evodiff sample [-m] [key=value ...]")
    assert "rounding: round        # round | truncate\n" in out and "\nguidance: classifier, " in out
    assert not any(path.is_file() for path in results.rglob("*"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--cfg=job", "--cfg=job does nothing with -m, which takes key=value only"),
        ("--dryrun", "--dryrun does nothing here. Possible: -m, --help"),
        ("--nfe=6", "Write nfe=6"),
    ],
)
def test_a_flag_beside_a_sweep_is_refused(evodiff_command, results, flag, message):
    code, _, err = evodiff_command("sample", "-m", flag, *MIXTURE, "solver=ddim", "nfe=5")
    assert code == 1 and message in err and err.count("\n") == 1
    assert not any(path.is_file() for path in results.rglob("*"))


def test_an_interval_has_no_values_to_sweep(evodiff_command):
    code, _, err = evodiff_command("run", "-m", *MIXTURE, "nfe=interval(2,3)")
    assert code == 1 and "nfe=interval(2,3) cannot be swept" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ("solver=glob(nosuch*)", "solver=glob(nosuch*) is none of the choices. Possible: bdia, ddim"),
        ("nfe=glob(*)", "nfe=glob(*) is none of the choices. Only groups have choices"),
        ("nfe=range(5,5)", "nfe=range(5,5) has no values"),
    ],
)
def test_a_sweep_over_nothing_is_refused(evodiff_command, swept, message):
    code, _, err = evodiff_command("run", "-m", *MIXTURE, swept)
    assert code == 1 and message in err and err.count("\n") == 1


def test_a_typo_in_a_sweep_is_found_before_the_first_run(evodiff_command, results):
    code, _, err = evodiff_command("run", "-m", *MIXTURE, "solver=ddim,evodif", "nfe=5")
    assert code == 1
    assert "Did you mean evodiff?" in err
    assert not any(path.is_file() for path in results.rglob("*"))


def test_a_launcher_without_a_sweep_is_refused(evodiff_command):
    code, _, err = evodiff_command("run", *MIXTURE, "hydra/launcher=joblib")
    assert code == 1
    assert "add -m to sweep" in err


def misbehave(job):
    """What an action may do to a sweep: NFE 5 works, 6 raises, 7 exits, 8 is killed."""
    print("at work")
    if job.run.nfe == 6:
        raise RuntimeError("a CUDA error")
    if job.run.nfe == 7:
        sys.exit("enough")
    if job.run.nfe == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    (job.run.folder / "done").touch()
    return f"nfe {job.run.nfe} done"


def behave(job):
    (job.run.folder / "done").touch()
    return f"nfe {job.run.nfe} done"


def whether_done(job):
    return f"nfe {job.run.nfe} was done" if (job.run.folder / "done").exists() else None


def test_failures_are_logged_where_they_happened_counted_and_repeated(results, capsys):
    jobs = [[*MIXTURE, "solver=ddim", f"nfe={nfe}"] for nfe in (5, 6, 7, 8, 0)]
    assert launch(Action(misbehave, whether_done), jobs, Processes(1)) == 4
    out, err = capsys.readouterr()
    assert out == "nfe 5 done\n"
    assert "RuntimeError: a CUDA error (traceback in" in err
    assert "SystemExit: enough" in err
    assert "ended by SIGKILL (out of memory, or by hand); the same command runs it again" in err
    assert "nfe=0 is impossible" in err
    assert "4 runs of the sweep failed" in err
    logs = {path.parent.name.split("-")[1]: path.read_text() for path in results.rglob("log.txt")}
    assert all("at work" in log for log in logs.values())
    assert "Traceback (most recent call last)" in logs["nfe6"]
    assert "in misbehave" in logs["nfe6"]
    assert "SystemExit: enough" in logs["nfe7"]
    assert "ended by SIGKILL" in logs["nfe8"]

    assert launch(Action(behave, whether_done), jobs[:4], Processes(2)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "nfe 5 was done"
    assert sorted(out[1:]) == ["nfe 6 done", "nfe 7 done", "nfe 8 done"]


def preempted(job):
    """The first time it is told to make room in the midst of its work."""
    print("at work")
    if not (job.run.folder / "begun").exists():
        (job.run.folder / "begun").touch()
        os.kill(os.getpid(), signal.SIGUSR2)
    return behave(job)


def test_a_job_that_makes_room_is_left_by_its_exit(results, monkeypatch):
    """For submitit what returns is finished, also when it returns a failure."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(Requeued, "leaving", False)
    overrides = [*MIXTURE, "solver=ddim", "nfe=7"]
    requeued = Requeued(partial(work, misbehave))
    assert "SystemExit: enough" in requeued(overrides).text  # its own exit is a failure
    assert requeued.checkpoint(overrides).function is requeued
    with pytest.raises(SystemExit):
        requeued(overrides)


@pytest.mark.slow
def test_a_preempted_job_starts_again_and_ends_well(results, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    jobs = [[*MIXTURE, "solver=ddim", "nfe=5"]]
    assert launch(Action(preempted, whether_done), jobs, Submitit(cluster="local", timeout_min=60)) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("nfe 5 done\n", "")
    assert next(results.rglob("log.txt")).read_text().count("at work") == 2


def test_the_exit_code_stays_a_count(results, capsys):
    assert launch(Action(misbehave, whether_done), [["nfe=0"]] * (MOST + 30), Processes(1)) == MOST


def test_the_same_sweep_again_runs_only_what_is_missing(evodiff_command, results):
    sweep = ["run", "-m", *MIXTURE, "solver=ddim,evodiff", "nfe=5", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code, first, _ = evodiff_command(*sweep)
    assert code == 0
    folder = next((results / "runs" / "mixture").glob("evodiff-*"))
    (folder / "score.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file() and path.parent != folder}
    code, second, _ = evodiff_command(*sweep)
    assert code == 0
    assert sorted(second.splitlines()) == sorted(first.splitlines())
    assert (folder / "log.txt").read_text().count("# model=mixture") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


@dataclass
class Notes:
    """A launcher that notes its jobs, and a tracker that notes what it is shown."""

    jobs: list = field(default_factory=list)
    published: list = field(default_factory=list)

    def launch(self, function, jobs):
        self.jobs.extend(jobs)
        return ((i, function(job)) for i, job in enumerate(jobs))

    def publish(self, name, records):
        self.published.append((name, [record.key for record in records]))
        return True


@pytest.mark.parametrize(("action", "name"), [(RUN, "run"), (Action(sample, sampled_line), "sample")])
def test_pngs_asked_for_later_are_made_by_a_job_and_not_again(evodiff_command, results, action, name):
    ddim = [*MIXTURE, "solver=ddim", "nfe=5"]
    assert evodiff_command(name, *ddim)[0] == 0
    made, again, lacking = Notes(), Notes(), Notes()
    assert launch(action, [[*ddim, "save=png"]], made) == launch(action, [[*ddim, "save=png"]], again) == 0
    assert (len(made.jobs), again.jobs) == (1, [])
    pngs = sorted(results.rglob("png/*.png"))
    assert len(pngs) == 8
    pngs[3].unlink()
    assert launch(action, [[*ddim, "save=png"]], lacking) == 0
    assert pngs[3].exists()


@pytest.mark.parametrize("action", [RUN, Action(score, score_line)])
def test_what_is_done_is_shown_by_the_tracker_asked_for_now(evodiff_command, results, monkeypatch, action):
    ddim = [*MIXTURE, "solver=ddim", "nfe=5"]
    assert evodiff_command("run", *ddim)[0] == 0
    key, notes = Job.compose(ddim).run.key(), Notes()
    compose_job = Job.compose
    monkeypatch.setattr(Job, "compose", lambda overrides: replace(compose_job(overrides), tracker=notes))
    assert launch(action, [ddim], notes) == 0
    assert (notes.jobs, notes.published) == ([], [(key, [key])])


def test_jobs_that_make_the_same_are_one(results, capsys):
    """Two at once would be in each other's way, and the second a failure."""
    swept = ["solver=ddim,euler_maruyama", "nfe=5", "batch=2,4", "metrics=[contrast],[saturated]"]
    notes = Notes()
    assert launch(Action(behave, whether_done), combinations([*MIXTURE[:5], *swept]), notes) == 0
    assert [(job[5], *job[7:]) for job in notes.jobs] == [
        (f"solver={solver}", "batch=2", f"metrics=[{metric}]")
        for metric in ("contrast", "saturated")
        for solver in ("ddim", "euler_maruyama")
    ]
    assert capsys.readouterr().err.count("evodiff: a job before makes the same [model=mixture ") == 4


def test_jobs_of_one_run_follow_each_other(results):
    """Side by side one would find the other at work on its images, and fail."""
    at_once = []

    def launcher(function, jobs):
        at_once.append([(job[5], job[7]) for job in jobs])
        return enumerate(function(job) for job in jobs)

    swept = ["solver=ddim,euler_maruyama", "nfe=5", "metrics=[contrast],[saturated]"]
    jobs = [*combinations([*MIXTURE[:5], *swept]), [*MIXTURE[:5], "solver=ddpm", "nfe=5", "metrics=[contrast]"]]
    assert launch(Action(behave, lambda job: None), jobs, SimpleNamespace(launch=launcher)) == 0
    first, second = at_once
    assert first == [(f"solver={s}", "metrics=[contrast]") for s in ("ddim", "euler_maruyama", "ddpm")]
    assert second == [(f"solver={s}", "metrics=[saturated]") for s in ("ddim", "euler_maruyama")]


@pytest.mark.parametrize("launcher", [Processes(1), Notes()])
def test_a_folder_that_cannot_be_made_is_a_failure_of_its_job(results, capsys, launcher):
    (results / "runs").mkdir()
    (results / "runs/mixture").write_text("a file")
    jobs = [[*MIXTURE, "solver=ddim", f"nfe={nfe}"] for nfe in (5, 6)]
    assert launch(Action(behave, whether_done), jobs, launcher) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("log.txt: Not a directory. Make room, or set EVODIFF_RESULTS to another folder") == 2


def test_a_death_that_cannot_be_noted_does_not_end_the_others(results, capsys):
    (results / "runs").mkdir()
    (results / "runs/mixture").write_text("a file")
    dying = SimpleNamespace(launch=lambda _, jobs: ((i, Died("killed")) for i in range(len(jobs))))
    assert launch(Action(behave, whether_done), [[*MIXTURE, f"nfe={nfe}"] for nfe in (5, 6)], dying) == 2
    assert "2 runs of the sweep failed" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "++hydra.launcher.n_jobs=2"])
def test_a_table_is_launched_as_a_sweep_is(results, monkeypatch, chosen):
    launched = []
    monkeypatch.setattr(commands, "launch_table", lambda table, launcher: launched.append(launcher) or 0)
    assert commands.table_main(["smoke", chosen]) == 0
    (launcher,) = launched
    assert launcher.n_jobs == (None if "joblib" in chosen else 2)


@pytest.mark.parametrize("command", [["run", "-m"], ["run"], ["table", "smoke"]])
@pytest.mark.parametrize("override", ["hydra.sweep.dir=elsewhere", "+hydra.sweeper.params.x=1", "hydra/sweeper=other"])
def test_what_would_do_nothing_of_hydras_is_refused(evodiff_command, results, command, override):
    code, _, err = evodiff_command(*command, override)
    assert code == 1
    assert err.startswith(f"evodiff: {override} does nothing here: of Hydra's own settings a sweep or a table takes")
    assert not any(results.iterdir())


def console_blocks():
    """The commands of the how-to pages that need nothing but this project."""
    for name in ("cluster", "wandb"):
        for needs, block in re.findall(
            r"(<!-- needs: \w+ -->\n)?```console\n(.*?)```", (HOWTO / f"{name}.md").read_text(), re.S
        ):
            if not needs:
                yield from (pytest.param(line, id=line[:40]) for line in block.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("line", [*console_blocks()])
def test_what_the_pages_show_runs(tmp_path, line):
    if "wandb" in line:
        pytest.importorskip("wandb")
    here = os.environ | {"EVODIFF_RESULTS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    here["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{here['PATH']}"
    if line.startswith("evodiff wandb push"):
        subprocess.run("evodiff table smoke", shell=True, env=here, cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(line, shell=True, env=here, cwd=ROOT, capture_output=True, text=True)
    failures = 1 if "heun" in line else 0  # at nfe=5, as the page says
    assert done.returncode == failures, done.stderr
    assert list(tmp_path.rglob("score.json"))
    assert not failures or "Heun cannot spend exactly nfe=5" in done.stderr
