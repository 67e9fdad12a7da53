"""`evodiff status`: how much of each table is done, what it still needs, how long that takes. `evodiff show`: the
commands of a cell."""

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

from evodiff.checkpoints import needs
from evodiff.checkpoints.registry import find
from evodiff.config import choices, compose, nearest
from evodiff.errors import ConfigError
from evodiff.inputs import missing_inputs
from evodiff.paths import RESULTS, ROOT
from evodiff.published import STATES
from evodiff.report import Table
from evodiff.text import commands, show

THROUGHPUT = "bench/throughput.json"
"""Below results/: device -> model -> evaluations per second. `python scripts/bench.py batches` writes it."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evodiff status", description=__doc__)
    parser.add_argument("table", nargs="*", help=f"of {', '.join(choices('table'))}; all if none is named")
    parser.add_argument("--needs", action="store_true", help="one line for each thing that is missing")
    given = parser.parse_args(argv)
    for name in given.table:
        if name not in choices("table"):
            raise ConfigError(f"{name} is no table.{nearest(name, choices('table'))} Possible: {names()}.")
    for name in given.table or choices("table"):
        print(*lines_of(Table.from_config(compose("table", [f"table={name}"])), given.needs), sep="\n", flush=True)
    return 0


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
    lacking = list(missing_files(table))
    if done < len(table.jobs):
        if details or len(lacking) < 2:
            yield from (f"  needs {text}" for text in lacking)
        else:
            yield f"  needs {len(lacking)} files or folders: `evodiff status --needs {table.config}` lists them"
        yield f"  {cost(table)}" + ("" if lacking else f"; nothing else is needed: `make table-{table.config}`")


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


def cost(table: Table) -> str:
    """The evaluations that are missing, and the hours they take where a throughput of every model is known."""
    jobs, records = table.jobs, table.records
    todo: Counter[str] = Counter()
    for place, job in jobs.items():
        if place not in records:
            todo[job.run.model["name"]] += len(job.run.seed_range) * (job.run.nfe or 0)
    for key, (job, run) in table.references.items():
        if table.record_of(job, key) is None:
            todo[run.model["name"]] += len(run.seed_range) * (run.nfe or 0)
    known = throughputs(table)
    evaluations = f"{sum(todo.values()) / 1e6:,.3g} million evaluations to do"
    unknown = [model for model in todo if model not in known]
    if unknown:
        return f"{evaluations}; hours unknown: no throughput of {', '.join(unknown)} is recorded"
    hours = sum(count / known[model][0] for model, count in todo.items()) / 3600
    how = "; ".join(f"{model}: {show(known[model][0])}/s on {known[model][1]}" for model in todo)
    return f"{evaluations}, {show(hours)} hours ({how})"


def throughputs(table: Table) -> dict[str, tuple[float, str]]:
    """model -> (evaluations per second, where measured): of this table's own runs, otherwise the most recorded."""
    found: dict[str, tuple[float, str]] = {}
    path = RESULTS / THROUGHPUT
    if path.is_file():
        recorded: dict[str, Any] = json.loads(path.read_text())
        measured = sorted((rate, device, model) for device, rates in recorded.items() for model, rate in rates.items())
        found = {model: (rate, device) for rate, device, model in measured}
    seconds: Counter[tuple[str, str]] = Counter()
    evaluations: Counter[tuple[str, str]] = Counter()
    for record in table.records.values():
        place = (record.run["model"]["name"], record.device)
        seconds[place] += record.seconds  # type: ignore[assignment]
        evaluations[place] += record.images * record.nfe
    own = {m: (evaluations[m, d] / s, f"{d}, its own runs") for (m, d), s in seconds.items() if s > 0}
    return found | own


def names() -> str:
    return ", ".join(choices("table"))


def show_main(argv: list[str]) -> int:
    """`evodiff show table=NAME [row=ROW] [nfe=N,...] [key=value ...]`: the commands of cells, or the rows there are."""
    given = dict(arg.partition("=")[::2] for arg in argv)
    name, row, nfe = given.pop("table", ""), given.pop("row", None), given.pop("nfe", None)
    wanted = nfe.split(",") if nfe is not None else None
    if name not in choices("table"):
        raise ConfigError(f"usage: evodiff show table=NAME [row=ROW] [nfe=N,...] [limit=N]. Tables: {names()}.")
    table = Table.from_config(compose("table", [f"table={name}", *(f"{k}={v}" for k, v in given.items())]))
    if row is None:
        for r in table.rows.values():
            print(f"evodiff show table={name} row={shlex.quote(r.name)} nfe={','.join(map(str, r.nfe))}")
        return 0
    if row not in table.rows:
        raise ConfigError(f"row={row} is not in table {name}.{nearest(row, table.rows)} Rows: {'; '.join(table.rows)}.")
    cells = [cell for cell in table.cells.values() if cell.row == row and (wanted is None or str(cell.nfe) in wanted)]
    if not cells:
        has = ", ".join(str(n) for n in table.rows[row].nfe)
        raise ConfigError(f"row {row} of table {name} has no cell at nfe={nfe}; it has {has}.")
    for cell in cells:
        print(*(f"# {p.value}: {p.cite} ({p.confidence})" for p in cell.papers), *commands(table, cell), sep="\n")
    return 0
