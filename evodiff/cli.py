"""The `evodiff` command: one line per subcommand, imported only when it is called."""

import importlib
import os
import sys

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


def usage() -> str:
    lines = [f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: evodiff COMMAND ...", "", *lines, "", "`evodiff COMMAND --help` tells more."])


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; an EvodiffError is one line on standard error and exit code 1.

    When the reader of standard output has gone, as `head` does, it ends quietly with the exit code of a broken pipe.
    """
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
