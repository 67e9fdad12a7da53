"""`evodiff status`: how much of each table is done, what it still needs, how long that takes. `evodiff show`: the
commands of a cell."""

import argparse
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from evodiff.checkpoints import needs
from evodiff.checkpoints.registry import find
from evodiff.config import choices, nearest
from evodiff.errors import ConfigError, EvodiffError
from evodiff.paths import ROOT
from evodiff.runs.job import has_images
from evodiff.runs.run import Run
from evodiff.tables.inputs import missing_inputs
from evodiff.tables.published import STATES
from evodiff.tables.table import Table
from evodiff.tables.text import commands, show
from evodiff.tables.throughput import Rate, known_rates, passes, rate_on

OF_CONTENT = ("limit", "repeats")
"""Keys that make it another table, beside table.FIELD."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evodiff status", description=__doc__)
    parser.add_argument("table", nargs="*", help=f"of {', '.join(choices('table'))}; all if none is named")
    parser.add_argument("--needs", action="store_true", help="one line for each thing that is missing")
    given = parser.parse_args(argv)
    named = [name.removeprefix("table=") for name in given.table]
    for name in named:
        if name not in choices("table"):
            raise ConfigError(f"{name} is no table.{nearest(name, choices('table'))} Possible: {names()}.")
    tables = named or choices("table")
    with ProcessPoolExecutor(min(len(tables), os.cpu_count() or 1)) as pool:  # Hydra composes some ten cells a second
        failed = 0
        for lines, error in (map if len(tables) == 1 else pool.map)(partial(of_config, details=given.needs), tables):
            print(*lines, sep="\n", flush=True)
            failed |= error
    return failed


def of_config(name: str, details: bool = False) -> tuple[list[str], int]:
    """What `evodiff status` says of the table of a configuration, and 1 if that cannot be read."""
    try:
        return list(lines_of(Table.of_file(name), details)), 0
    except EvodiffError as e:
        return [f"{name}: {e}"], 1


def lines_of(table: Table, details: bool = False) -> Iterator[str]:
    """What `evodiff status` says of one table."""
    done = len(table.records)
    states: Counter[str] = Counter()
    if table.metrics:
        states.update(verdict.state for verdict in table.verdicts(table.metrics[0]).values())
    else:
        states["missing"] = len(table.cells)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    yield f"{table.config}: {len(table.cells)} cells ({counts}), {done} of {len(table.jobs)} runs done"
    if imageless := [table.jobs[place].run for place in table.records if not has_images(table.jobs[place])]:
        again = sum(len(run.seed_range) * (run.nfe or 0) for run in imageless) / 1e6
        yield (
            f"  of {len(imageless)} only the records are here: `evodiff table {table.config}` samples their images "
            f"again, {again:,.3g} million evaluations"
        )
    lacking = list(missing_files(table))
    if done < len(table.jobs):
        if details or len(lacking) < 2:
            yield from (f"  needs {text}" for text in lacking)
        else:
            yield f"  needs {len(lacking)} files or folders: `evodiff status --needs {table.config}` lists them"
        yield from (f"  {line}" for line in cost(table, unfinished(table)))
        if not lacking:
            yield f"  nothing else is needed: `make table-{table.config}`"


def missing_files(table: Table) -> Iterator[str]:
    """What is not here of the weights, the reference, and what runs read besides; with how to get each."""
    entries, made = needs.of_table(table.config)
    for entry in map(find, entries):
        if not entry.path.is_file():
            size = f" ({entry.size / 1e6:.0f} MB)" if entry.size else ""
            how = f"`evodiff fetch {entry.name}`{size}" if entry.urls else entry.by_hand
            yield f"{entry.kind} {entry.name}: {how}"
    for path in made:
        if not path.is_file():
            yield f"reference {path.relative_to(ROOT)}: `evodiff stats build`"
    yield from (f"{missing.what}: {missing.how}" for missing in missing_inputs(table))


def plan(table: Table) -> Iterator[str]:
    """What `evodiff table` says before it begins: what it samples, and how long that takes."""
    cells = [job for job in table.todo.values() if not has_images(job)]
    references = {job.reference.run.key(): job.reference for job in cells if job.reference is not None}
    absent = [*(job for job in references.values() if not has_images(job)), *cells]
    if not absent:
        return
    recorded = sum(table.record_of(job) is not None for job in absent)
    report = shlex.join(["evodiff", "report", table.config, *table.overrides])
    shown = f"; of {recorded} the records are here: `{report}` shows them without sampling" if recorded else ""
    yield f"{table.name}: {len(absent)} run{'s' * (len(absent) > 1)} to sample{shown}"
    yield from cost(table, [job.run for job in absent])


def cost(table: Table, runs: Iterable[Run]) -> Iterator[str]:
    """The evaluations of runs; and by device, the fastest first, the hours they take."""
    evaluations, todo = 0, defaultdict[str, float](float)
    for run in runs:
        n = len(run.seed_range) * (run.nfe or 0)
        evaluations += n
        todo[run.model["name"]] += n * passes(run)
    yield f"{evaluations / 1e6:,.3g} million evaluations to do"
    estimates = []
    for device, rates in rates_of(table).items():
        found = {model: rate_on(rates, model) for model in todo}
        used = {model: rate for model, rate in found.items() if rate is not None}
        if used.keys() == todo.keys():
            how = "; ".join(f"{model}: {show(rate.value)}/s, {rate.how}" for model, rate in used.items())
            hours = sum(todo[model] / rate.value for model, rate in used.items()) / 3600
            told = f"{show(hours)} hours" if hours >= 1 else f"{show(60 * hours)} minutes"
            estimates.append((hours, f"{told} on {device} ({how})"))
    yield from (line for _, line in sorted(estimates))
    if not estimates:
        yield f"hours unknown: no throughput of {', '.join(todo)} is recorded, nor of a network like it"


def unfinished(table: Table) -> list[Run]:
    """The runs without a record, those that others are compared with among them."""
    records = table.records
    cells = [job.run for place, job in table.jobs.items() if place not in records]
    return cells + [job.run for job in table.references.values() if table.record_of(job) is None]


def rates_of(table: Table) -> dict[str, dict[str, Rate]]:
    """device -> model -> rate, of this table's own runs where it has some."""
    found = known_rates()
    seconds, evaluations = (defaultdict[tuple[str, str], float](float) for _ in range(2))
    for place, record in table.records.items():
        where = (record.device, record.run["model"]["name"])
        seconds[where] += record.seconds
        evaluations[where] += record.images * record.nfe * passes(table.jobs[place].run)
    for (device, model), s in seconds.items():
        if s > 0:
            found.setdefault(device, {})[model] = Rate(evaluations[device, model] / s, "its own runs")
    return found


def names() -> str:
    return ", ".join(choices("table"))


def refuse_others(command: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for keys that say how runs are made: this command makes none."""
    for text in overrides:
        key = text.lstrip("+~").split("=")[0]
        if key not in OF_CONTENT and not key.startswith("table."):
            possible = ", ".join((*OF_CONTENT, "table.FIELD"))
            raise ConfigError(
                f"{text} has no effect on `evodiff {command}`, which makes no runs. Possible: {possible}."
            )


def show_main(argv: list[str]) -> int:
    """`evodiff show NAME [row=ROW] [nfe=N,...] [key=value ...]`: the commands of cells, or the rows there are."""
    given = dict(arg.partition("=")[::2] for arg in argv)
    name, row, nfe = given.pop("table", ""), given.pop("row", None), given.pop("nfe", None)
    if argv and "=" not in argv[0]:  # as the other commands take it
        given.pop(name := argv[0])
    if not name:
        raise ConfigError(f"usage: evodiff show table=NAME [row=ROW] [nfe=N,...] [key=value ...]. Tables: {names()}.")
    if name not in choices("table"):
        raise ConfigError(f"{name} is no table.{nearest(name, choices('table'))} Possible: {names()}.")
    overrides = [f"{k}={v}" for k, v in given.items()]
    refuse_others("show", overrides)
    if row is None and nfe is not None:
        raise ConfigError(f"nfe={nfe} needs a row. `evodiff show {name}` lists them.")
    table = Table.of_file(name, overrides)
    if row is None:
        for r in table.rows.values():
            print(f"evodiff show table={name} row={shlex.quote(r.name)} nfe={','.join(map(str, r.nfe))}")
        return 0
    if row not in table.rows:
        raise ConfigError(f"row={row} is not in table {name}.{nearest(row, table.rows)} Rows: {'; '.join(table.rows)}.")
    cells = {str(cell.nfe): cell for cell in table.cells.values() if cell.row == row}
    wanted = nfe.strip("[]").split(",") if nfe is not None else list(cells)
    if absent := [n for n in wanted if n not in cells]:
        has = ", ".join(cells)
        raise ConfigError(f"row {row} of table {name} has no cell at nfe={','.join(absent)}; it has {has}.")
    for cell in (cells[n] for n in wanted):
        print(*(f"# {p.value}: {p.cite} ({p.confidence})" for p in cell.papers), *commands(table, cell), sep="\n")
    return 0
