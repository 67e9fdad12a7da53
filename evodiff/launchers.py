"""Where the jobs of a sweep run: processes of this machine, Slurm, Ray. Chosen by `hydra/launcher=...`.

Each launcher maps a function over jobs and yields what it returned, or Died, as the jobs finish: a job that fails,
aborts or is killed costs nothing but itself. Hydra's launcher plugins promise less (one killed worker of the joblib
plugin ends its sweep), so only their names and fields are taken over; submitit and ray are called directly.
"""

import importlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any, ClassVar

from evodiff.errors import ConfigError
from evodiff.paths import results_folder


@dataclass(frozen=True)
class Died:
    """A job whose process ended before the job did. False, as every failure."""

    reason: str

    def __bool__(self) -> bool:
        return False


Function = Callable[[Any], Any]


@dataclass
class Processes:
    """`n_jobs` processes on this machine, each with a GPU of its own where there are any.

    A process takes one job after the other; after one whose result is false a fresh process takes its place, for an
    error of CUDA outlives the job that caused it.
    """

    n_jobs: int | None = None
    """None: as many as there are GPUs, or one."""

    def launch(self, function: Function, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index of the job, what `function` returned or Died), in the order in which jobs finish."""
        gpus = visible_gpus()
        at_once = self.n_jobs if self.n_jobs is not None else len(gpus) or 1
        if type(at_once) is not int or at_once < 1:
            raise ConfigError(
                f"hydra.launcher.n_jobs={at_once} is impossible: expected a number of processes, at least 1."
            )
        n = min(at_once, len(jobs))
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for i in range(len(jobs)):
            todo.put(i)
        workers = [_Worker(gpus[k % len(gpus)] if gpus else None, sharing=n) for k in range(n)]

        def serve(worker: "_Worker") -> None:
            while True:
                try:
                    i = todo.get_nowait()
                except queue.Empty:
                    return worker.stop()
                try:
                    result = worker.call(function, jobs[i])
                except Exception as e:  # or this thread would end, and its job be waited for
                    worker.stop()
                    result = Died(f"no process could be given the job ({_first_line(e)})")
                done.put((i, result))

        try:
            for worker in workers:
                threading.Thread(target=serve, args=(worker,), daemon=True).start()
            for _ in jobs:
                yield done.get()
        finally:  # at Ctrl-C: nothing new begins, and each thread finds its process dead
            while not todo.empty():
                todo.get_nowait()
            for worker in workers:
                worker.kill()


class _Worker:
    """One process that calls functions, with a successor whenever it dies or returns something false."""

    def __init__(self, gpu: str | None, sharing: int):
        self.gpu, self.sharing = gpu, sharing
        self.process: Any = None

    def call(self, function: Function, job: Any) -> Any:
        if self.process is None:
            context = get_context("spawn")  # a forked child cannot use CUDA
            self.pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.gpu, self.sharing), daemon=True)
            with theirs:
                process.start()
            self.process = process  # from here on it can be killed
        try:
            self.pipe.send((function, job))
            result = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            result = Died(_how_it_ended(self.process.exitcode))
        if not result:
            self.stop()
        return result

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def kill(self) -> None:
        if (process := self.process) is not None:
            process.kill()


def _serve(pipe: Any, gpu: str | None, sharing: int) -> None:
    """What a worker does: call what comes through the pipe until its other end is closed. Imports torch only then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // sharing)))
    try:
        while True:
            function, job = pipe.recv()
            pipe.send(function(job))
    except (EOFError, BrokenPipeError):
        pass


def _end_with_parent() -> None:
    """A launcher that is killed cannot end its workers, and a job left alone would hold its GPU and its run's locks."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (" (out of memory, or by hand)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}"


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, without touching one."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() not in ("", "-1")][: torch.cuda.device_count()]
    return [str(i) for i in range(torch.cuda.device_count())]


@dataclass
class Submitit:
    """One Slurm job per run, in one array; cluster=local runs the same without Slurm. Needs submitit."""

    cluster: str = "slurm"
    timeout_min: int = 240
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    array_parallelism: int | None = None
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)

    def launch(self, function: Function, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Submit all jobs, then wait for them. See Processes.launch."""
        submitit = _library("submitit")
        try:
            executor = submitit.AutoExecutor(folder=str(results_folder() / "submitit"), cluster=self.cluster)
        except (RuntimeError, ValueError) as e:  # no sbatch on this machine, or a cluster of no such kind
            raise ConfigError(
                f"hydra.launcher.cluster={self.cluster} is not available here ({_first_line(e)}). On a machine without "
                f"Slurm use hydra/launcher=joblib, ray or submitit_local."
            ) from e
        generic = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb")
        given = {key: value for key, value in asdict(self).items() if key != "cluster" and value}
        try:
            executor.update_parameters(
                name="evodiff",
                **{key: given[key] for key in generic if key in given},
                **{f"slurm_{key}": value for key, value in given.items() if key not in generic},
            )
        except (AssertionError, TypeError, ValueError, NameError) as e:
            raise ConfigError(
                f"hydra.launcher: a field is of another type than submitit takes ({_first_line(e)})."
            ) from e
        if self.cluster == "slurm" and self.gpus_per_node is None and "gpu" not in str(self.additional_parameters):
            print(
                "the Slurm jobs ask for no GPU; hydra.launcher.gpus_per_node=1 does (0: none is wanted)",
                file=sys.stderr,
            )
        try:
            with executor.batch():
                submitted = [executor.submit(Requeued(function), job) for job in jobs]
        except submitit.core.utils.FailedJobError as e:
            raise ConfigError(
                f"sbatch refuses the jobs ({_first_line(e)}). Change what hydra.launcher.<field>= asks of Slurm, like "
                f"partition or timeout_min; then run the same command again."
            ) from e
        numbers = {id(job): i for i, job in enumerate(submitted)}
        for job in submitit.helpers.as_completed(submitted, poll_frequency=2):
            try:
                result = job.result()
            except Exception as e:  # submitit's own errors, and whatever the job raised
                result = Died(f"its Slurm job {job.job_id} ended early ({_first_line(e)}; {job.paths.stderr})")
            yield numbers[id(job)], result


@dataclass(frozen=True)
class Requeued:
    """A function that, when Slurm preempts it or its time is up, is queued again: a run goes on where it stopped.

    submitit ends the job by a SystemExit raised inside it. The function has to let that through while `leaving` is set,
    for a job that returns is finished, and is not started again.
    """

    function: Function
    leaving: ClassVar[bool] = False
    """Whether this process was told to make room."""

    def __call__(self, job: Any) -> Any:
        return self.function(job)

    def checkpoint(self, job: Any) -> Any:
        """What submitit is to start later, asked for by the signal: the same again."""
        Requeued.leaving = True
        return _library("submitit").helpers.DelayedSubmission(self, job)


@dataclass
class Ray:
    """One Ray task per run, on the cluster that `address` or RAY_ADDRESS names, or on this machine. Needs ray."""

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    """Per job. None: one where the cluster has any."""
    max_retries: int = 0
    """How often a task whose worker dies is started again."""

    def launch(self, function: Function, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See Processes.launch."""
        ray = _library("ray")
        here = not ray.is_initialized()
        if here:
            ours = {name: value for name, value in os.environ.items() if name.startswith("EVODIFF_")}
            quiet = {"log_to_driver": False, "logging_level": "ERROR"}
            ray.init(address=self.address, runtime_env={"env_vars": ours}, **quiet)
        try:
            gpus = self.num_gpus if self.num_gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
            options = {"num_cpus": self.num_cpus, "num_gpus": gpus, "max_retries": self.max_retries}
            call = ray.remote(**options)(_call)
            numbers = {call.remote(function, job): i for i, job in enumerate(jobs)}
            waiting = list(numbers)
            while waiting:
                (ready,), waiting = ray.wait(waiting, num_returns=1)
                try:
                    result = ray.get(ready)
                except Exception as e:  # a dead worker, or whatever the job raised
                    result = Died(f"its Ray worker ended early ({_first_line(e)})")
                yield numbers[ready], result
        finally:
            if here:
                ray.shutdown()


def _call(function: Function, job: Any) -> Any:
    return function(job)


LAUNCHERS: dict[str, Processes | Submitit | Ray] = {
    "basic": Processes(n_jobs=1),
    "joblib": Processes(),
    "submitit_slurm": Submitit(),
    "submitit_local": Submitit(cluster="local"),
    "ray": Ray(),
}
"""By the names they have as Hydra plugins."""


def register_launchers() -> None:
    """Make them the choices of `hydra/launcher`, with `hydra.launcher.<field>=` for their fields."""
    from hydra.core.config_store import ConfigStore

    for name, launcher in LAUNCHERS.items():
        node = {"_target_": f"evodiff.launchers.{type(launcher).__name__}", **asdict(launcher)}
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="evodiff")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(
            f"hydra/launcher={name} needs the package {name}, which is not installed: pip install -e '.[cluster]'."
        ) from e


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
