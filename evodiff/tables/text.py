"""A table as Markdown, LaTeX (booktabs) and CSV, and the commands of its cells."""

import csv
import io
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from evodiff.metrics.distances import OF_IMAGES
from evodiff.tables.published import Verdict

if TYPE_CHECKING:
    from evodiff.tables.cells import Cell
    from evodiff.tables.table import Table

MARKS = {"proxy": "†", "off": "*"}
"""After a number: taken on another number of images than is asked for; beyond the tolerance of the paper's."""
FEWER = "‡"
"""After a mean of fewer sets of seeds than other cells have."""
SIGNS = {
    "±": "the standard deviation of one run, between its sets of seeds or, of one set, from its images",
    MARKS["off"]: "beyond the tolerance of the paper's number",
    MARKS["proxy"]: "on fewer images than the whole table's",
    FEWER: "of fewer sets of seeds than other cells",
    "–": "not run",
}
"""What signs of a cell mean."""
HIGHER = ("is", "precision", "recall", "density", "coverage")


def show(value: float) -> str:
    """Three significant digits, without an exponent where that reads well."""
    return f"{value:#.3g}".rstrip(".") if 0 < abs(value) < 999.5 else f"{value:.0f}"


def best(table: "Table", metric: str) -> set[tuple[str, int]]:
    """Cells that show the best number of their column; what only describes images has no best."""
    prefix = metric.split("@")[0]
    if prefix in OF_IMAGES:
        return set()
    ours = {place: v.ours for place, v in table.verdicts(metric).items() if v.ours is not None and not v.fewer}
    choose = max if prefix.startswith(HIGHER) else min
    lead = {nfe: choose(value for place, value in ours.items() if place[1] == nfe) for nfe in {n for _, n in ours}}
    return {place for place, value in ours.items() if value == lead[place[1]]}


def ours_and_paper(verdict: Verdict, missing: str = "missing") -> str:
    """`2.93±0.02 (2.91)`, the paper's in brackets; with a mark for its state."""
    paper = f" ({verdict.paper.value})" if verdict.paper is not None else ""
    if verdict.ours is None:
        return f"–{paper}" if paper else missing
    digits = verdict.paper.decimals if verdict.paper is not None else None
    ours = show(verdict.ours) if digits is None else f"{verdict.ours:.{digits}f}"
    spread = ""
    if verdict.scatter is not None:
        wide = digits is not None and verdict.scatter >= 10.0**-digits
        spread = f"±{verdict.scatter:.{digits}f}" if wide else f"±{float(f'{verdict.scatter:.1g}'):g}"
    return f"{ours}{spread}{MARKS.get(verdict.state, '')}{FEWER * verdict.fewer}{paper}"


def markdown(table: "Table", metrics: Sequence[str] | None = None) -> str:
    """One table for each metric (all, if they are not named), their levels, and what was done."""
    parts = []
    for metric in table.metrics if metrics is None else metrics:
        lines = [f"| {metric} | " + " | ".join(f"NFE {n}" for n in table.nfe) + " |"]
        lines.append("|---" + "|---:" * len(table.nfe) + "|")
        missing = "missing" if table.metric is None else "–"
        for row, cells in _grid(table, metric, lambda shown: f"**{shown}**", missing, plain):
            name = row.replace("|", r"\|")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        told = notes(table, metric, missing)
        parts.append("\n".join(lines) + (f"\n\n{'; '.join(told)}" if told else ""))
    return "\n\n".join(parts) + "\n\n" + footer(table) + "\n"


def notes(table: "Table", metric: str, missing: str, where: str = "in brackets") -> list[str]:
    """What else the metric has, `where` the papers' numbers stand, and what the signs mean that cells show."""
    verdicts = table.verdicts(metric).values()
    told = [f"{label}: {show(value)}" for label, value in table.levels(metric).items()]
    if papers := [v.paper for v in verdicts if v.paper]:
        notes_on = sum(paper.confidence == "secondary-note" for paper in papers)
        unchecked = f" ({notes_on} of {len(papers)} from notes on it, not checked)" if notes_on else ""
        told.append(f"{where} the paper's{unchecked}")
    shown = "".join(ours_and_paper(v, missing) for v in verdicts)
    return told + [f"{sign} {meaning}" for sign, meaning in SIGNS.items() if sign in shown]


def latex(table: "Table") -> str:
    parts = []
    for metric in table.metrics:
        lines = [r"\begin{tabular}{l" + "r" * len(table.nfe) + "}", r"\toprule"]
        lines += [f"{tex(metric)} & " + " & ".join(f"NFE {n}" for n in table.nfe) + r" \\", r"\midrule"]
        for row, cells in _grid(table, metric, lambda shown: rf"\textbf{{{shown}}}", "--", tex):
            lines.append(f"{tex(row)} & " + " & ".join(cells) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _grid(
    table: "Table", metric: str, strong: Callable[[str], str], missing: str, escape: Callable[[str], str] = str
) -> list[tuple[str, list[str]]]:
    """Every row with the text of each column."""
    verdicts, lead = table.verdicts(metric), best(table, metric)
    grid = []
    for row in table.rows:
        cells = []
        for nfe in table.nfe:
            verdict = verdicts.get((row, nfe))
            shown = "" if verdict is None else escape(ours_and_paper(verdict, missing))
            cells.append(strong(shown) if (row, nfe) in lead else shown)
        grid.append((row, cells))
    return grid


def footer(table: "Table") -> str:
    done, total = len(table.records), len(table.jobs)
    protocol = next(iter(table.jobs.values())).protocol
    scored = f"protocol {protocol.name} ({protocol.hash})" if protocol else "no features"
    runs = "cells" if len(table.cells) == total else "runs"
    command = shlex.join(["evodiff", "table", table.config, *table.overrides])
    return f"{done} of {total} {runs} done; {scored}; made by `{command}`."


def table_csv(table: "Table") -> str:
    """One line for each cell and metric: all digits, what the paper reports, and the verdict."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["solver", "nfe", "metric", "value", "sd", "runs", "images", "seconds"]
        + ["paper", "confidence", "source", "difference", "tolerance", "state", "keys"]
    )
    records = table.records
    for metric in table.metrics:
        for (row, nfe), v in table.verdicts(metric).items():
            cell = table.cells[row, nfe]
            done = [records[row, nfe, k] for k in range(len(cell.jobs)) if (row, nfe, k) in records]
            paper = [v.paper.value, v.paper.confidence, v.paper.cite] if v.paper else ["", "", ""]
            writer.writerow(
                [row, nfe, metric, _digits(v.ours), _digits(v.scatter), len(v.values), v.images]
                + [round(sum(r.seconds for r in done), 3) if done else "", *paper]
                + [_digits(v.difference), _digits(v.tolerance), v.state, " ".join(r.key for r in done)]
            )
    return out.getvalue()


def _digits(value: float | None) -> str:
    return "" if value is None else repr(value)


def commands(table: "Table", cell: "Cell") -> list[str]:
    """What makes one cell by itself: one line for each range of seeds, quoted for a shell."""
    lines = []
    for job in cell.jobs:
        first, last = job.run.seeds
        base = [o for o in table.base if not o.startswith("seeds=")]
        words = ["evodiff", "run", *base, *cell.overrides, f"nfe={cell.nfe}", f"seeds={first}-{last}"]
        lines.append(" ".join(shlex.quote(word) for word in words))
    return lines


def plain(text: str) -> str:
    """Text for Markdown, where a star would begin or end what is emphasised."""
    return text.replace("*", r"\*")


TEX = {sign: f"\\{sign}" for sign in "_%&#${}"} | {sign: f"${sign}$" for sign in "<>|"}
TEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
TEX |= {"±": r"$\pm$", "†": r"\textsuperscript{\dag}", "‡": r"\textsuperscript{\ddag}", "–": "--"}
"""What LaTeX writes as something else."""


def tex(text: str) -> str:
    """Text for LaTeX."""
    return "".join(TEX.get(sign, sign) for sign in text)
