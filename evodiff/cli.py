"""The `evodiff` command: one line per subcommand, imported only when it is called."""

import importlib
import os
import sys
from io import TextIOWrapper
from pathlib import Path

from evodiff.errors import EvodiffError

COMMANDS = {
    "run": (
        "evodiff.commands:run_main",
        "sample and score one run, or a sweep with -m: model=... solver=... nfe=10 ...",
    ),
    "sample": ("evodiff.commands:sample_main", "only make the images of a run"),
    "score": (
        "evodiff.commands:score_main",
        "only score a run's images, or any images: path=DIR|ZIP|NPZ protocol=...",
    ),
    "table": ("evodiff.commands:table_main", "make the runs of a table that are missing, and the table"),
    "report": ("evodiff.commands:report_main", "make a table's pages from the records there are"),
    "status": ("evodiff.tables.status:main", "how much of each table is done, what it needs, how long that takes"),
    "show": ("evodiff.tables.status:show_main", "the exact commands of a table's cell: table=... row=... nfe=..."),
    "wandb": ("evodiff.commands:wandb_main", "show a table in Weights & Biases: push TABLE"),
    "gits": ("evodiff.gits:main", "a time grid for a model by dynamic programming, for grid=file"),
    "trace": ("evodiff.trace:main", "the conditional variance and entropy along a trajectory"),
    "models": (
        "evodiff.checkpoints.cli:models_main",
        "which pretrained models are here, and which are missing",
    ),
    "fetch": ("evodiff.checkpoints.cli:fetch_main", "download a model or reference file, verified"),
    "convert": (
        "evodiff.checkpoints.cli:convert_main",
        "turn a published checkpoint into safetensors; nothing in it is run",
    ),
    "doctor": (
        "evodiff.checkpoints.cli:doctor_main",
        "check this installation and what each table still needs",
    ),
    "stats": (
        "evodiff.commands:stats_main",
        "reference statistics: build, inspect, convert, diff; ems: of a model",
    ),
    "verify": (
        "evodiff.commands:verify_main",
        "compare with recorded reference results: solvers, networks, metrics",
    ),
    "docs": ("evodiff.docs_solvers:main", "write docs/solvers.md from the solvers, or --check it"),
}


USAGES = {
    "table": """usage: evodiff table NAME [key=value ...]

Make the runs of a table that are missing, score them, and write its pages, results/tables/NAME/report.html and others.
NAME is a file of configs/table; `evodiff status` lists them. Called again it goes on.

rows=[NAME,...]       make only these methods now, like rows=[EVODiff,UniPC*]; the pages show all there are
nfe=[N,...]           make only these budgets now
limit=N               only N images of each run, for a trial, with pages of their own
repeats=N             only the first N of the table's ranges of seeds
device=NAME           auto, cpu, cuda, cuda:1
tracker=wandb         show the table in Weights & Biases as well
hydra/launcher=NAME   make its runs as jobs: joblib, submitit_slurm, ray; hydra.launcher.FIELD=VALUE as in a sweep
table.FIELD=VALUE     another table, like table.nfe=[5,10]; its pages have a folder of their own""",
    "report": """usage: evodiff report NAME [key=value ...]

Write the pages of a table from the records there are; nothing is sampled or scored.
Keys: limit, repeats and table.FIELD as in `evodiff table --help`.""",
    "show": """usage: evodiff show table=NAME [row=ROW] [nfe=N,...] [key=value ...]

Print the exact commands of a row's cells, and what papers they are from; without a row, the rows of the table.
Keys: limit, repeats and table.FIELD as in `evodiff table --help`.""",
    "wandb": """usage: evodiff wandb push TABLE [key=value ...]

Show a table's records in Weights & Biases, also those of runs that ended long ago.

tracker.mode=MODE      offline (the default: nothing is sent), online or disabled
tracker.project=NAME   evodiff if not given; tracker.entity=TEAM, tracker.timeout=SECONDS""",
}
"""What --help tells of commands that have no options of their own."""


def usage() -> str:
    lines = [f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: evodiff COMMAND ...", "", *lines, "", "`evodiff COMMAND --help` tells more."])


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; an EvodiffError is one line on standard error and exit code 1.

    When the reader of standard output has gone, as `head` does, it ends quietly with the exit code of a broken pipe.
    """
    # where a stream is closed, as by cron, its number would be that of the next file
    sys.stdout, sys.stderr = (s or Path(os.devnull).open("w") for s in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± shows ?
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python flushes once more at the end
        return 141


def run(argv: list[str] | None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(version("evodiff"))
        return 0
    try:
        if name not in COMMANDS:
            from evodiff.config import nearest

            raise EvodiffError(f"{name} is no command.{nearest(name, COMMANDS)} Possible: {', '.join(COMMANDS)}.")
        if name in USAGES and not {"-h", "--help"}.isdisjoint(rest):
            print(USAGES[name])
            return 0
        module, function = COMMANDS[name][0].split(":")
        return getattr(importlib.import_module(module), function)(rest)
    except EvodiffError as e:
        print(f"evodiff: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "evodiff: stopped. What is finished is kept; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
