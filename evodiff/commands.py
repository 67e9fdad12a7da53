"""What the subcommands on runs and tables do. Hydra's syntax: key=value overrides, -m for a sweep."""

import importlib
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from evodiff.config import build, choices, compose, compose_hydra, keys, nearest
from evodiff.errors import ConfigError, EvodiffError
from evodiff.launchers import Died
from evodiff.paths import CONFIGS
from evodiff.pictures import png_path
from evodiff.plugins import publish_solvers
from evodiff.ranks import processes, rank, use_own_gpu
from evodiff.runs.distributed import finish
from evodiff.runs.job import Job, store_of
from evodiff.runs.record import Record
from evodiff.runs.sample import sample_run
from evodiff.runs.score import check_scorable, current_record, score_run
from evodiff.sweeps import Action, launch, sweep
from evodiff.tables.failures import Failures
from evodiff.tracking import Silent

if TYPE_CHECKING:
    from evodiff.tables.table import Table

SWEEP = ("-m", "--multirun")
HELP = ("-h", "--help")
SHOWS = {"-c", "--cfg", "-i", "--info"}
SHOWING = (*sorted(SHOWS), "-p", "--package", "--resolve")
"""Hydra's own flags that show the configuration; the others, like --config-dir, our checks of keys do not know."""
VERIFY_USAGE = """usage: evodiff verify solvers|networks|metrics [options]

Compare this installation with recorded reference results: one line for each, exit code 1 if one differs.
`evodiff verify solvers --help` tells the options of a comparison."""


def run_main(argv: list[str]) -> int:
    return over_runs("run", RUN, argv)


def sample_main(argv: list[str]) -> int:
    return over_runs("sample", Action(sample, sampled_line), argv)


def score_main(argv: list[str]) -> int:
    if any(arg.startswith("path=") for arg in argv) or argv in ([flag] for flag in HELP):
        from evodiff.metrics.cli import score_path_main

        return score_path_main(argv)
    return over_runs("score", Action(score, score_line), argv)


def sample_and_score(job: Job) -> str:
    """Make and measure a run. The ranks of torchrun share its images, and rank 0 measures them.

    Raises EvodiffError if a process that is no rank still makes some of them.
    """
    if rank() > 0:
        sample_run(job)
        if job.reference and current_record(job) is None:
            sample_run(job.reference)
        return ""
    check_scorable(job)
    if processes() > 1:
        finish(job)
    elif not sample_run(job):
        raise EvodiffError(
            f"{busy_line(job)}, so it is not scored here. If that one does not score it either, run the same command "
            f"again when it is done."
        )
    return score(job)


def sample(job: Job) -> str:
    return sampled_line(job) or "" if sample_run(job) else busy_line(job)


def score(job: Job) -> str:
    """Measure the images of a complete run. The ranks of torchrun share those of its reference, and rank 0 measures.

    Raises StoreError for a run that is not complete, before anything is made of its reference.
    """
    if job.reference and current_record(job) is None:
        next(store_of(job).batches("seeds"))  # refused unless every image is there
        finish(job.reference)
    if rank() > 0:
        return ""
    record = score_run(job)
    if job.protocol is None and job.scored:
        print(f"protocol=none: no {', '.join(job.scored)}, for there are no images to compare with", file=sys.stderr)
    return shown(job, record)


def busy_line(job: Job) -> str:
    return f"{job.run.key()}: another process still works on this run"


def run_line(job: Job) -> str | None:
    return score_line(job) if has_pictures(job) else None


def score_line(job: Job) -> str | None:
    record = current_record(job)
    return shown(job, record) if record else None


def sampled_line(job: Job) -> str | None:
    if store_of(job).missing() or not has_pictures(job):
        return None
    return f"{job.run.model['name']}/{job.run.key()}  {len(job.run.seed_range)} images"


def has_pictures(job: Job) -> bool:
    """Whether the file of each image is there, where save=png asks for them."""
    folder = job.run.folder / "png"
    return job.save != "png" or all(png_path(folder, seed).exists() for seed in job.run.seed_range)


def shown(job: Job, record: Record) -> str:
    """Publish a record, also one of long ago; returns its line."""
    job.tracker.publish(record.key, [record])
    return line(record)


def line(record: Record) -> str:
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
    return f"{record.run['model']['name']}/{record.key}  nfe {record.nfe}  {numbers}"


RUN = Action(sample_and_score, run_line)


def over_runs(name: str, action: Action, argv: list[str]) -> int:
    """Apply an action to the run that the overrides describe, or with -m to each of a sweep. Returns the exit code."""
    overrides = [arg for arg in argv if not arg.startswith("-")]
    flags = [arg for arg in argv if arg.startswith("-") and arg not in SWEEP]
    for flag in flags:
        word, _, value = flag.lstrip("-").partition("=")
        if (key := word.split(".")[0]) in keys("run"):
            raise ConfigError(
                f"{flag} is no option: {key} is a key of the configuration. Write {word}={value or '...'}"
            )
        if (name_of := flag.partition("=")[0]) not in (*HELP, *SHOWING):
            raise ConfigError(f"{name_of} does nothing here. Possible: -m, --help, and Hydra's {', '.join(SHOWING)}.")
    if flags and {*SHOWS, *HELP}.isdisjoint(flag.partition("=")[0] for flag in flags):
        raise ConfigError(f"{flags[0]} says how --cfg shows it: add --cfg job.")
    if not flags:
        refuse_hydra(overrides)
    if any(flag in HELP for flag in flags):
        print(usage(name))
        return 0
    if any(arg in SWEEP for arg in argv):
        if flags:
            raise ConfigError(f"{flags[0]} does nothing with -m, which takes key=value only. Leave one of them out.")
        if processes() > 1:
            raise ConfigError(
                "torchrun shares one run among its processes; for a sweep choose a hydra/launcher instead."
            )
        return sweep(action, overrides)
    if names_launcher(overrides):
        raise ConfigError("hydra/launcher says where the jobs of a sweep run; add -m to sweep.")

    def act(_: DictConfig | None = None) -> None:
        use_own_gpu()
        if text := action.do(Job.compose(overrides)):
            print(text)

    if flags:
        compose("run", [*filter(is_override, argv)])  # misspelt keys get our message, not Hydra's
        with_flags(act, f"evodiff {name}", argv)
    else:
        act()
    return 0


def usage(name: str) -> str:
    """What `--help` tells of a command on runs: the groups, and configs/run.yaml with its comments."""
    groups = {key: ", ".join(choices(key)) for key in sorted(keys("run")) if (CONFIGS / key).is_dir()}
    listed = "\n".join(textwrap.fill(f"{key}: {found}", 120, subsequent_indent="  ") for key, found in groups.items())
    own = (CONFIGS / "run.yaml").read_text().partition("\n\n")[2].partition("\nhydra:")[0].rstrip()
    return (
        f"usage: evodiff {name} [-m] [key=value ...]\n\n"
        f"like evodiff {name} solver=unipc_3 nfe=10 seeds=0-63, or with -m for every combination: solver=ddim,evodiff "
        f"nfe=5,10\n\nGroups, each a folder of configs/ (group=choice):\n\n{listed}\n\nKeys and their defaults "
        f"(key=value):\n\n{own}\n\nFields of a group are keys, too, like solver.order=2; `evodiff {name} "
        f"solver=unipc_3 --cfg job` shows all that a run has."
    )


def is_override(text: str) -> bool:
    return not text.startswith("-") and ("=" in text or text.startswith("~"))


def names_launcher(overrides: list[str]) -> bool:
    return any(text.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher")) for text in overrides)


def refuse_hydra(overrides: list[str]) -> None:
    """Raise ConfigError for settings of Hydra's own that do nothing here: all but its launchers."""
    for text in overrides:
        if text.lstrip("+~").startswith(("hydra.", "hydra/")) and not names_launcher([text]):
            raise ConfigError(
                f"{text} does nothing here: of Hydra's own settings a sweep or a table takes hydra/launcher and "
                f"hydra.launcher.FIELD; -m sweeps, and EVODIFF_RESULTS says where results are written."
            )


def with_flags(task: Callable[[DictConfig], None], program: str, argv: list[str]) -> None:
    """Hydra's own flags, like --cfg and --info: it reads sys.argv, and does the task unless it shows
    something."""
    overrides = [text for text in argv if is_override(text)]
    flags = [text for text in argv if not is_override(text)]  # after them, for some take what follows for their value
    saved, sys.argv = sys.argv, [program, *overrides, "hydra.run.dir=.", *flags]
    publish_solvers()
    raised = []

    def kept(cfg: DictConfig) -> None:  # Hydra would show a traceback of it
        try:
            task(cfg)
        except EvodiffError as e:
            raised.append(e)

    try:
        hydra.main(config_path=str(CONFIGS), config_name="run", version_base="1.3")(kept)()
    finally:
        sys.argv = saved
    if raised:
        raise raised[0]


def table_main(argv: list[str]) -> int:
    from evodiff.tables.status import plan
    from evodiff.tables.table import Table

    name, overrides = table_arguments("table", argv)
    refuse_hydra(overrides)
    table = Table.of_file(name, overrides)
    if processes() > 1 and names_launcher(overrides):
        raise ConfigError("torchrun shares a table's runs among its processes; leave out hydra/launcher, or torchrun")
    if rank() == 0:
        for text in plan(table):
            print(f"evodiff: {text}", file=sys.stderr)
    if processes() > 1:
        return share_table(table)
    if names_launcher(overrides):
        return launch_table(table, build(compose_hydra("table", [f"table={name}", *overrides]).launcher))
    return table.make()


def launch_table(table: "Table", launcher: Any) -> int:
    """Make a table's runs by a launcher, then its pages, also where runs failed. Returns the exit code.

    This machine may be one without a GPU: what cells read is computed by a job before them, and what is then left, like
    trajectories, by one after them.
    """
    if table.computable:
        launch_part(f"what {table.name} reads", table.make_inputs, launcher)
    failures = launch(RUN, overrides_of(table), launcher)
    if not failures and table.unfinished:
        failures = launch_part(f"what is left of {table.name}", table.make_runs, launcher)
    table.show()
    return failures


def launch_part(label: str, part: Callable[[Failures], None], launcher: Any) -> int:
    """Do a part of a table in one job; returns 1 if some of it fails, and tells why."""
    ((_, outcome),) = launcher.launch(failures_of, [part])
    lines = [f"{label}: {outcome.reason}"] if isinstance(outcome, Died) else outcome
    for line in lines:
        print(f"evodiff: {line}", file=sys.stderr)
    return int(bool(lines))


def failures_of(part: Callable[[Failures], None]) -> list[str]:
    """In a worker: do it; returns why some of it fails."""
    failures = Failures()
    part(failures)
    return failures.lines


def overrides_of(table: "Table") -> list[list[str]]:
    """What makes each run of a table by itself."""
    found = []
    for (row, nfe, _), job in table.todo.items():
        first, last = job.run.seeds
        own = [f"device={table.device}", f"nfe={nfe}", f"seeds={first}-{last}"]
        found.append([*table.base, *table.cells[row, nfe].overrides, *own])
    return found


def share_table(table: "Table") -> int:
    """Under torchrun: every rank takes shards of one run after the other; rank 0 scores them and writes the pages, also
    where runs failed. What they read is computed by the first rank that comes. Returns the exit code."""
    use_own_gpu()
    failures = Failures()
    table.make_inputs(failures)
    for job in table.todo.values():
        failures.attempt(job.run.key(), sample_and_score, job)
    failures.tell()
    if rank() > 0:
        return 0  # torchrun would stop rank 0, which takes over what is left
    if failures.reasons:
        table.show()
        return 1
    return table.make()


def wandb_main(argv: list[str]) -> int:
    """`evodiff wandb push TABLE [key=value ...]`: show a table's records, also those of runs that ended long ago."""
    from evodiff.tables.table import Table

    if argv[:1] != ["push"] or len(argv) < 2:
        raise ConfigError("usage: evodiff wandb push TABLE [tracker.mode=online tracker.project=... key=value ...]")
    own = [] if any(arg.startswith("tracker=") for arg in argv) else ["tracker=wandb"]
    table = Table.of_file(*table_arguments("wandb push", [argv[1], *own, *argv[2:]]))
    if not table.records:
        raise EvodiffError(f"table {table.name} has no records yet. `evodiff table {table.config}` makes them.")
    if isinstance(table.tracker, Silent) or getattr(table.tracker, "mode", None) == "disabled":
        raise ConfigError("this tracker shows nothing: leave tracker= out, or set tracker.mode=offline or online.")
    if not table.publish(table.tracker):
        return 1
    print(f"{table.name}: {len(table.records)} runs and their table are shown")
    return 0


def report_main(argv: list[str]) -> int:
    from evodiff.tables.status import refuse_others
    from evodiff.tables.table import Table

    name, overrides = table_arguments("report", argv)
    refuse_others("report", overrides)
    table = Table.of_file(name, overrides)
    table.write()
    print(table.text())
    return 0


def table_arguments(command: str, argv: list[str]) -> tuple[str, list[str]]:
    """The name, also given as table=NAME, and the overrides."""
    name = argv[0].removeprefix("table=") if argv else ""
    if not name or name.startswith("-") or "=" in name:
        raise ConfigError(f"usage: evodiff {command} NAME [key=value ...]. Tables: {', '.join(choices('table'))}.")
    return name, argv[1:]


def stats_main(argv: list[str]) -> int:
    if argv[:1] == ["ems"]:
        from evodiff.ems import main as ems_main

        return ems_main(argv[1:])
    from evodiff.metrics.cli import stats_main as reference_main

    return reference_main(argv)


def verify_main(argv: list[str]) -> int:
    if argv and argv[0] in HELP:
        print(VERIFY_USAGE)
        return 0
    known = ("solvers", "networks", "metrics")
    if not argv or argv[0] not in known:
        if not argv:
            raise ConfigError(f"say what to verify: {', '.join(known)}.")
        raise ConfigError(f"{argv[0]} cannot be verified.{nearest(argv[0], known)} Possible: {', '.join(known)}.")
    return importlib.import_module(f"evodiff.verify.{argv[0]}").main(argv[1:])
