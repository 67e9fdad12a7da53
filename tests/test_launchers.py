"""Launchers: every job has an outcome, whatever becomes of its process."""

import contextlib
import os
import select
import subprocess
import sys
from functools import partial
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_jobs import meet, obey, pid_or_nothing

from evodiff import launchers
from evodiff.config import compose_hydra
from evodiff.errors import ConfigError
from evodiff.launchers import Died, Processes, Ray, Submitit

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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are not bound to cores here")
def test_workers_share_the_cores_that_they_may_use(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert outcomes(Processes(1), ["OMP_NUM_THREADS"], os.getenv) == ["1"]
    finally:
        os.sched_setaffinity(0, mine)


def test_a_fresh_process_follows_a_failure():
    """A CUDA error stays with its process: only after success is it used again."""
    first, second, third = outcomes(Processes(1), ["fine", "", "fine"], pid_or_nothing)
    assert second is None
    assert third != first
    assert len({*outcomes(Processes(1), ["fine", "fine"], pid_or_nothing)}) == 1


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no way to wait for a process that is no child")
def test_a_worker_ends_with_a_launcher_that_is_killed(tmp_path):
    os.mkfifo(tmp_path / "pid")
    lines = ["from functools import partial", "from sweep_jobs import wait_for_ever"]
    lines += ["from evodiff.launchers import Processes", "if __name__ == '__main__':"]
    lines += [f"    list(Processes(1).launch(partial(wait_for_ever, {str(tmp_path)!r}), ['job']))"]
    (tmp_path / "sweep.py").write_text("\n".join(lines))
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    launcher = subprocess.Popen([sys.executable, tmp_path / "sweep.py"], env=here)
    worker = os.pidfd_open(int((tmp_path / "pid").read_text()))
    launcher.kill()
    launcher.wait()
    ended, _, _ = select.select([worker], [], [], 60)
    assert ended


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
    with pytest.raises(ConfigError, match="n_job is no field of hydra/launcher=joblib. Did you mean n_jobs?"):
        compose_hydra("run", ["hydra/launcher=joblib", "hydra.launcher.n_job=3"])
    slurm, gres = "hydra/launcher=submitit_slurm", "hydra.launcher.additional_parameters.gres=gpu"
    assert compose_hydra("run", [slurm, f"+{gres}"]).launcher.additional_parameters.gres == "gpu"
    with pytest.raises(ConfigError, match=r"add to it, like \+hydra.launcher.additional_parameters"):
        compose_hydra("run", [slurm, gres])


def test_a_field_of_another_type_is_said():
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match="hydra.launcher: a field is of another type .*timeout_min"):
        list(Submitit(cluster="local", timeout_min="an hour").launch(print, [1]))
