"""What the subcommands on runs and tables do. Hydra's syntax: key=value overrides, -m for a sweep."""

import importlib
import sys
import traceback
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from evodiff.config import compose, nearest
from evodiff.errors import ConfigError, EvodiffError
from evodiff.experiment import Job, Record, sample_run, score_run
from evodiff.paths import CONFIGS, RESULTS

SWEEP = ("-m", "--multirun")


def run_main(argv: list[str]) -> int:
    return over_runs("run", sample_and_score, argv)


def sample_main(argv: list[str]) -> int:
    return over_runs("sample", sample, argv)


def score_main(argv: list[str]) -> int:
    if any(arg.startswith("path=") for arg in argv):
        from evodiff.metrics.cli import score_path_main

        return score_path_main(argv)
    return over_runs("score", lambda job: show(score(job)), argv)


def sample_and_score(job: Job) -> None:
    if sample(job):
        record = score(job)
        show(record)
        job.tracker.publish(record.key, [record])


def sample(job: Job) -> bool:
    if sample_run(job):
        return True
    print(
        f"{job.run.key()}: another process still works on this run; it scores what it finishes",
        file=sys.stderr,
    )
    return False


def score(job: Job) -> Record:
    if job.reference_run and not sample_run(job, job.reference_run):
        raise EvodiffError(
            f"another process still samples the reference run {job.reference_run.key()}; try again later"
        )
    return score_run(job)


def show(record: Record) -> None:
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
    print(f"{record.run['model']['name']}/{record.key}  nfe {record.nfe}  {numbers}")


def over_runs(name: str, action: Callable[[Job], object], argv: list[str]) -> int:
    """Apply `action` to the run that the overrides describe, or with -m to each of a sweep.

    A failing run of a sweep does not end the others; the exit code is 1 if any failed.
    """
    overrides = [arg for arg in argv if not arg.startswith("-")]
    sweep = any(arg in SWEEP for arg in argv)
    for one in [overrides] if not sweep else first_of_each(overrides):
        compose("run", one)  # misspelt keys get our message, not Hydra's
    failures: list[str] = []

    def task(_: DictConfig) -> None:
        given = list(HydraConfig.get().overrides.task)
        try:
            job = Job.compose(given)
            action(job)
        except EvodiffError as e:
            failures.append(" ".join(given))
            print(f"evodiff: {e}" + (f" [{' '.join(given)}]" if sweep else ""), file=sys.stderr)
        except Exception:
            failures.append(" ".join(given))
            traceback.print_exc()

    folders = [f"hydra.{key}={RESULTS / 'runs'}" for key in ("run.dir", "sweep.dir")] + ["hydra.sweep.subdir=."]
    saved, sys.argv = sys.argv, [f"evodiff {name}", *argv, *folders]
    try:
        hydra.main(config_path=str(CONFIGS), config_name="run", version_base="1.3")(task)()
    finally:
        sys.argv = saved
    if sweep and failures:
        print(f"evodiff: {len(failures)} runs of the sweep failed: {'; '.join(failures)}", file=sys.stderr)
    return int(bool(failures))


def first_of_each(overrides: list[str]) -> list[list[str]]:
    """For every value of every swept override, one list of overrides without a sweep that has it."""
    try:
        parsed = [list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.get_value_element_as_str()]
                  for o in OverridesParser.create().parse_overrides(overrides)]  # fmt: skip
    except HydraException:
        return [overrides]
    keys = [text.partition("=")[0] for text in overrides]
    longest = max(map(len, parsed), default=1)
    return [
        [f"{key}={values[min(i, len(values) - 1)]}" for key, values in zip(keys, parsed, strict=True)]
        for i in range(longest)
    ]


def table_main(argv: list[str]) -> int:
    from evodiff.report import Table

    table = Table.from_config(table_config("table", argv))
    return table.make()


def report_main(argv: list[str]) -> int:
    from evodiff.report import Table

    table = Table.from_config(table_config("report", argv))
    table.write()
    print(table.text())
    return 0


def table_config(command: str, argv: list[str]) -> DictConfig:
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        from evodiff.config import choices

        raise ConfigError(f"usage: evodiff {command} NAME [key=value ...]. Tables: {', '.join(choices('table'))}.")
    return compose("table", [f"table={argv[0]}", *argv[1:]])


def stats_main(argv: list[str]) -> int:
    if argv[:1] == ["ems"]:
        from evodiff.ems import main as ems_main

        return ems_main(argv[1:])
    from evodiff.metrics.cli import stats_main as reference_main

    return reference_main(argv)


def verify_main(argv: list[str]) -> int:
    known = ("solvers", "networks", "metrics")
    if not argv or argv[0] not in known:
        what = argv[0] if argv else "nothing"
        raise ConfigError(f"{what} cannot be verified.{nearest(what, known)} Possible: {', '.join(known)}.")
    return importlib.import_module(f"evodiff.verify.{argv[0]}").main(argv[1:])
