"""Sweeps: no job ends another, failures are counted and logged, and the same command runs only what is missing."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_jobs import meet, obey, pid_or_nothing

from evodiff import commands, launchers
from evodiff.commands import RUN, sample, sampled_line, score, score_line
from evodiff.config import compose_hydra
from evodiff.errors import ConfigError
from evodiff.launchers import Died, Processes, Ray, Requeued, Submitit
from evodiff.paths import ROOT
from evodiff.runs.job import Job
from evodiff.sweeps import MOST, Action, combinations, first_of_each, launch, work

MIXTURE = ["model=mixture", "protocol=none", "reference_run=null", "seeds=0-7", "shard=4", "batch=4"]
HOWTO = ROOT / "docs/howto"
ABRUPT = ["abort", "exit", "kill"]


def outcomes(launcher, jobs, function=obey):
    found = dict(launcher.launch(function, jobs))
    return [found[i] for i in range(len(jobs))]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_dying_process_costs_its_own_job_only(n_jobs):
    *died, last = outcomes(Processes(n_jobs), [*ABRUPT, "last"])
    assert last == "last done"
    assert died == [
        Died("its process was ended by SIGABRT"),
        Died("its process ended with exit code 7"),
        Died("its process was ended by SIGKILL (out of memory, or by hand)"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "launcher"), [("submitit", Submitit(cluster="local", timeout_min=5)), ("ray", Ray(num_cpus=0.5))]
)
def test_a_dying_process_costs_its_own_job_only_elsewhere(library, launcher, tmp_path, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # their workers must find this file
    *died, last = outcomes(launcher, [*ABRUPT, "last"])
    assert last == "last done"
    assert all(isinstance(outcome, Died) and "ended early" in outcome.reason for outcome in died)


SBATCH = """#!{python}
import os, re, subprocess, sys

script = open(sys.argv[-1]).read()
last = int(re.search(r"--array=0-(\\d+)", script)[1])
for i in range(last + 1):
    env = os.environ | {{"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": str(i), "SLURM_JOB_ID": str(100 + i)}}
    env |= {{f"SLURM_{{k}}": v for k, v in zip(("NTASKS", "NNODES", "PROCID", "LOCALID", "NODEID"), "11000")}}
    env |= {{"SLURM_JOB_NODELIST": "here"}}
    command = ["sh", "-c", f'bash -c "$1"; echo $? > {folder}/{{i}}.code', "sh", script]
    subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 42")
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
for i in 0 1 2 3; do
    state=RUNNING
    [ -s {folder}/$i.code ] && { read code < {folder}/$i.code; [ $code = 0 ] && state=COMPLETED || state=FAILED; }
    echo "42_$i|$state|here"
done
"""


@pytest.mark.slow
def test_slurm_has_one_array_and_a_dying_job_costs_itself_only(tmp_path, monkeypatch):
    """With the three commands that submitit calls, and no Slurm behind them."""
    pytest.importorskip("submitit")
    from submitit.slurm.slurm import SlurmJob

    for name, script in (("sbatch", SBATCH.format(python=sys.executable, folder=tmp_path)), ("srun", SRUN),
                         ("sacct", SACCT.replace("{folder}", str(tmp_path)))):  # fmt: skip
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    monkeypatch.setattr(SlurmJob.watcher, "_delay_s", 1)
    launcher = Submitit(partition="gpu", gpus_per_node=1, array_parallelism=2, additional_parameters={"nice": 5})
    *died, last = outcomes(launcher, [*ABRUPT, "last"])
    assert last == "last done"
    assert [outcome.reason.split(" (")[0] for outcome in died] == [
        f"its Slurm job 42_{i} ended early" for i in range(3)
    ]
    (script,) = (tmp_path / "submitit").glob("*_submission.sh")
    for line in ("partition=gpu", "array=0-3%2", "gpus-per-node=1", "nice=5", "time=240", "job-name=evodiff"):
        assert f"#SBATCH --{line}\n" in script.read_text()


@pytest.mark.parametrize(
    ("asked", "noted"),
    [({}, True), ({"additional_parameters": {"nice": 5}}, True), ({"gpus_per_node": 0}, False),
     ({"gpus_per_node": 1}, False), ({"additional_parameters": {"gres": "gpu:1"}}, False)],
)  # fmt: skip
def test_slurm_jobs_without_a_gpu_are_noted(asked, noted, monkeypatch, capsys):
    submitit = pytest.importorskip("submitit")
    executor = SimpleNamespace(update_parameters=lambda **_: None, batch=contextlib.nullcontext)
    monkeypatch.setattr(submitit, "AutoExecutor", lambda **_: executor)
    assert list(Submitit(**asked).launch(obey, [])) == []
    assert ("ask for no GPU" in capsys.readouterr().err) is noted


def test_every_gpu_has_one_job(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "visible_gpus", lambda: ["3", "5"])
    for pipe in ("a", "b"):
        os.mkfifo(tmp_path / pipe)
    assert {*outcomes(Processes(), ["first", "second"], partial(meet, tmp_path))} == {"3", "5"}


def test_a_fresh_process_follows_a_failure():
    """A CUDA error stays with its process: only after success is it used again."""
    first, second, third = outcomes(Processes(1), ["fine", "", "fine"], pid_or_nothing)
    assert second is None
    assert third != first
    assert len({*outcomes(Processes(1), ["fine", "fine"], pid_or_nothing)}) == 1


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_job_that_reaches_no_process_is_a_failure(n_jobs):
    unpicklable = lambda job: job  # noqa: E731
    for outcome in outcomes(Processes(n_jobs), ["first", "second"], unpicklable):
        assert isinstance(outcome, Died) and "no process could be given the job (" in outcome.reason


def test_a_process_that_does_not_start_is_a_failure_of_its_job(monkeypatch):
    def start(self):
        raise OSError("no more processes")

    monkeypatch.setattr(SpawnProcess, "start", start)
    assert outcomes(Processes(1), ["a", "b"]) == 2 * [Died("no process could be given the job (no more processes)")]


def test_a_worker_whose_process_has_not_started_can_be_killed(monkeypatch):
    """As Ctrl-C does from another thread."""
    worker = launchers._Worker(None, sharing=1)

    def start(self):
        worker.kill()
        BaseProcess.start(self)

    monkeypatch.setattr(SpawnProcess, "start", start)
    assert worker.call(obey, "fine") == "fine done"
    worker.stop()


def test_impossible_numbers_and_missing_libraries_are_said(monkeypatch):
    for n_jobs in (-1, 0, 1.5, "two", True):
        with pytest.raises(ConfigError, match=f"n_jobs={n_jobs} is impossible"):
            list(Processes(n_jobs).launch(obey, ["fine"]))
    assert list(Processes().launch(obey, [])) == []
    for library, launcher in (("submitit", Submitit()), ("ray", Ray())):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ConfigError, match=rf"needs the package {library}, which is not installed"):
            list(launcher.launch(obey, ["fine"]))


@pytest.mark.parametrize("cluster", ["slurm", "slrum"])
def test_without_slurm_another_launcher_is_named(cluster, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # without srun
    with pytest.raises(ConfigError, match=f"cluster={cluster} is not available here .*hydra/launcher=joblib"):
        list(Submitit(cluster=cluster).launch(obey, ["fine"]))


@pytest.mark.parametrize("jobs", [["one"], ["one", "two"]])
def test_what_slurm_refuses_is_said(jobs, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    said = "sbatch: error: invalid partition specified: gpuu"
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"sbatch refuses the jobs \({said}\). Change what hydra.launcher"):
        list(Submitit(partition="gpuu", gpus_per_node=1).launch(obey, jobs))


def test_hydra_knows_the_launchers_by_their_usual_names():
    chosen = compose_hydra("run", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]).launcher
    assert dict(chosen) == {"_target_": "evodiff.launchers.Processes", "n_jobs": 3}
    assert compose_hydra("run", ["hydra/launcher=submitit_slurm"]).launcher.cluster == "slurm"
    assert compose_hydra("run", ["hydra/launcher=ray"]).launcher.max_retries == 0
    assert compose_hydra("run").launcher.n_jobs == 1
    with pytest.raises(ConfigError, match="n_job"):
        compose_hydra("run", ["hydra.launcher.n_job=3"])


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
        for solver in ("ddim", "euler_maruyama")
        for metric in ("contrast", "saturated")
    ]
    assert capsys.readouterr().err.count("evodiff: a job before makes the same [model=mixture ") == 4


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
