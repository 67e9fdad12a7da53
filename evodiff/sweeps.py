"""Sweeps: one run for every combination of values, each in a process of its own, with its log in its folder."""

import itertools
import os
import shlex
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from evodiff.config import build, choices, compose, compose_hydra
from evodiff.errors import ConfigError, EvodiffError
from evodiff.launchers import Died, Requeued
from evodiff.runs.job import Job
from evodiff.runs.run import Run

HOW = ("device", "batch", "shard", "threads")
"""Keys of a job that change nothing in what it makes."""
MOST = 100
"""The highest exit code that counts failures; a shell has its own use for those from 126 on."""


@dataclass(frozen=True)
class Action:
    """What a command does with a run, and how it knows that nothing is left to do.

    Both return the line that tells the result; `done` returns None while there is something left.
    """

    do: Callable[[Job], str]
    done: Callable[[Job], str | None]


@dataclass(frozen=True)
class Outcome:
    """What became of one job: the line to show, and whether it failed. False if its process cannot be trusted since."""

    text: str
    failed: bool = False
    unexpected: bool = False

    def __bool__(self) -> bool:
        return not self.unexpected


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the values of the swept overrides, the last one fastest, as Hydra's own sweeper has them."""
    return [list(one) for one in itertools.product(*_values(overrides))]


def first_of_each(overrides: Sequence[str]) -> list[list[str]]:
    """For every value of every swept override, one list of overrides that has it: enough to find a misspelt one."""
    values = _values(overrides)
    longest = max(map(len, values), default=1)
    return [[some[min(i, len(some) - 1)] for some in values] for i in range(longest)]


def _values(overrides: Sequence[str]) -> list[list[str]]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return [[text] for text in overrides]  # composing it says what is wrong
    return [
        [f"{text.partition('=')[0]}={value}" for value in _swept(o, text)] if o.is_sweep_override() else [text]
        for o, text in zip(parsed, overrides, strict=True)
    ]


def _swept(override: Override, text: str) -> list[str]:
    if isinstance(pattern := override.value(), Glob):
        known = choices(override.key_or_group)
        if not (found := list(pattern.filter(known))):
            possible = f"Possible: {', '.join(known)}." if known else "Only groups have choices, like solver=glob(*)."
            raise ConfigError(f"{text} is none of the choices. {possible}")
        return found
    try:
        values = list(override.sweep_string_iterator())
    except HydraException as e:  # an interval has no list of values
        raise ConfigError(f"{text} cannot be swept ({e}). Give values, like nfe=5,10 or nfe=range(5,11).") from e
    if not values:
        raise ConfigError(f"{text} has no values. Give some, like nfe=5,10 or nfe=range(5,11).")
    return values


def sweep(action: Action, overrides: Sequence[str]) -> int:
    """Do `action` for every combination of the overrides; returns the number of failures, at most MOST."""
    for_hydra = [text for text in overrides if text.lstrip("+~").startswith("hydra")]
    launcher = build(compose_hydra("run", for_hydra).launcher)
    swept = [text for text in overrides if text not in for_hydra]
    for one in first_of_each(swept):
        compose("run", one)
    return launch(action, combinations(swept), launcher)


def launch(action: Action, jobs: Sequence[list[str]], launcher: Any) -> int:
    """Do `action` for each list of overrides; returns the number of failures, at most MOST.

    What is done starts nothing, and jobs that make the same, as batch=100,200 does, are one. Those that make something
    else of one run, as metrics=[fid],[contrast] does, follow each other. A job that fails, aborts or is killed does not
    end the others.
    """
    rounds = defaultdict[int, list[list[str]]](list)
    failures = []
    seen: set[tuple[str, ...]] = set()
    of_run: Counter[str] = Counter()

    def tell(overrides: list[str], outcome: Outcome) -> None:
        if outcome.failed:
            failures.append(" ".join(overrides))
            print(f"evodiff: {outcome.text} [{' '.join(overrides)}]", file=sys.stderr, flush=True)
        else:
            print(outcome.text, flush=True)

    for overrides in jobs:
        try:
            made = _made(overrides)
        except EvodiffError as e:
            tell(overrides, Outcome(str(e), failed=True))
            continue
        if made in seen:
            print(f"evodiff: a job before makes the same [{' '.join(overrides)}]", file=sys.stderr, flush=True)
            continue
        seen.add(made)
        outcome = _already(action, overrides, Path(made[0]))
        if outcome is not None:
            tell(overrides, outcome)
            continue
        rounds[of_run[made[0]]].append(overrides)
        of_run[made[0]] += 1
    for todo in rounds.values():
        for i, outcome in launcher.launch(partial(work, action.do), todo):
            if isinstance(outcome, Died):
                outcome = Outcome(f"{outcome.reason}; the same command runs it again", failed=True)
                _note(todo[i], outcome.text)
            tell(todo[i], outcome)
    if failures:
        runs = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
        print(f"evodiff: {runs} of the sweep failed: {'; '.join(failures)}", file=sys.stderr)
    return min(len(failures), MOST)


def _made(overrides: list[str]) -> tuple[str, ...]:
    """What a job makes: its run's folder, and all else but HOW. Raises EvodiffError if it cannot be composed."""
    cfg = compose("run", overrides)
    rest = (f"{key!s}={value}" for key, value in cfg.items() if key not in (*Run.__dataclass_fields__, *HOW))
    return str(Run.from_config(cfg).folder), *rest


def _already(action: Action, overrides: list[str], folder: Path) -> Outcome | None:
    """The outcome of a job whose run's folder has it all already. None: start it."""
    if not folder.exists():
        return None
    try:
        text = action.done(Job.compose(overrides))
    except EvodiffError:  # a device that only the workers have, or a folder whose trouble the job itself tells
        return None
    return None if text is None else Outcome(text)


def work(do: Callable[[Job], str], overrides: list[str]) -> Outcome:
    """In a worker: do it, with all output, and the traceback of what goes wrong, in log.txt in the run's folder.

    Nothing is raised but the SystemExit of a job that is queued again.
    """
    try:
        job = Job.compose(overrides)
    except EvodiffError as e:
        return Outcome(str(e), failed=True)
    log = job.run.folder / "log.txt"
    try:
        with _output_to(log):
            return _outcome(do, job, overrides, log)
    except OSError as e:  # of the log itself
        said = f"cannot write {log}: {e.strerror or e}. Make room, or set EVODIFF_RESULTS to another folder"
        return Outcome(f"{said}; the same command runs it again", failed=True, unexpected=True)


def _outcome(do: Callable[[Job], str], job: Job, overrides: list[str], log: Path) -> Outcome:
    print(f"# {shlex.join(overrides)}", flush=True)
    try:
        text = do(job)
        print(text, flush=True)
        return Outcome(text)
    except EvodiffError as e:
        print(f"evodiff: {e}", flush=True)
        return Outcome(str(e), failed=True)
    except BaseException as e:  # sys.exit as well: it ends one run, not the sweep
        if isinstance(e, SystemExit) and Requeued.leaving:
            raise
        traceback.print_exc()
        said = " ".join(f"{type(e).__name__}: {e}".split())
        return Outcome(f"{said} (traceback in {log})", failed=True, unexpected=True)


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Everything this process prints goes to the end of a file: also what C code and dying interpreters write."""
    import faulthandler

    log.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(1), os.dup(2)]
    was_on = faulthandler.is_enabled()
    try:
        with log.open("ab") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        faulthandler.enable(2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in enumerate(saved, start=1):
            os.dup2(old, fd)
            os.close(old)
        if not was_on:
            faulthandler.disable()


def _note(overrides: list[str], text: str) -> None:
    """Add a line to a job's log that it could not write itself, if it can be written at all."""
    log = Run.from_config(compose("run", overrides)).folder / "log.txt"
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as f:
            f.write(f"evodiff: {text}\n")
