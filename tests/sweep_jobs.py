"""What jobs of a sweep may do. Here, and not in the tests, so that the processes that do it start without torch."""

import os
import signal
from pathlib import Path


def obey(job):
    """A job that ends as its name says."""
    if job == "abort":
        os.abort()
    elif job == "exit":
        os._exit(7)
    elif job == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{job} done"


def wait_for_ever(folder, job):
    """Tell which process this is, and stay."""
    Path(folder, "pid").write_text(str(os.getpid()))
    signal.pause()


def meet(folder, name):
    """Wait until two processes are here; returns the GPUs this one may see."""
    mine, other = ("a", "b") if name == "first" else ("b", "a")
    for pipe in sorted((mine, other)):  # opening a pipe waits for its other end
        with open(folder / pipe, "w" if pipe == mine else "r"):  # noqa: PTH123
            pass
    return os.environ["CUDA_VISIBLE_DEVICES"]


def pid_or_nothing(job):
    return os.getpid() if job else None
