"""Writes the generated pages of docs/: results.md from the records, and the measured parts of others.

`python scripts/make_docs.py --check` only compares, and exits with 1 if a page is not current.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from docs_numbers import table_of
from docs_reading import reading
from torch import Tensor

from evodiff.api import named_solver
from evodiff.config import choices
from evodiff.files import whole_file
from evodiff.grid import LogSNR, grid_for
from evodiff.metrics.contrast import Matched, read_matched
from evodiff.paths import ROOT, results_folder
from evodiff.sampling import integrate
from evodiff.schedule import EDM, Node
from evodiff.tables import published, text
from evodiff.tables.table import Table
from evodiff.verify import orders

DOCS = ROOT / "docs"
METHOD = DOCS / "figures" / "method.json"
BEGIN, END = "<!-- measured: {} -->", "<!-- end of measured -->"

LONG = 20
"""Rows above which a table has two metrics and one figure on results.md."""
SHOWN = (5, 8, 10, 12, 15, 16, 20, 25)
"""NFE of a table on results.md, where it has more than eight."""

RESULTS_TOP = """\
# Results

This page is made from the records in `results/tables/` by `make docs`: each score is that of a record in
`results/tables/NAME/records/`, which names the run, its seeds, the protocol, the sha256 of every file used, the device
and the versions. Distances with a gain stand in `matched.csv`, differences on the same seeds in `paired.csv` of a
table; both were taken from images that are not in the repository, and the commands beside them make both again. All
solvers run without a last call of the network (`denoise_final=false`). The interactive page of a table is its
`report.html`. How to read the columns is told in [the tutorial](tutorial.md#read-a-table), and what a protocol is in
[Protocols](protocols.md).
"""


def results_page() -> str:
    parts = [RESULTS_TOP, reading()]
    for name in choices("table"):
        folder = results_folder() / "tables" / name
        if name not in ("demo", "smoke") and (folder / "records").is_dir():
            parts.append(section(table_of(name)))
    return "\n".join(parts)


def section(table: Table) -> str:
    """One table: the columns that have records, eight of them at most, and who leads by which metric."""
    done = {nfe for _, nfe, _ in table.records}
    shown = {nfe for nfe in done if len(done) <= 8 or nfe in SHOWN}
    rows = {name: replace(row, nfe=tuple(n for n in row.nfe if n in shown)) for name, row in table.rows.items()}
    part = replace(table, rows=rows)
    folder = Path("../results/tables") / table.name
    long = len(table.rows) > LONG
    metrics = part.metrics[:2] if long else part.metrics
    lines = [f"## {table.title}\n", text.markdown(part, metrics)]
    lines += [f"- {leaders(part, metric)}" for metric in part.metrics if text.best(part, metric)]
    lines.append("")
    if left := len(done - shown):
        lines.append(f"{left} more columns are in `results/tables/{table.name}/table.md`.\n")
    if left := len(table.nfe) - len(done):
        lines.append(f"{left} of the {len(table.nfe)} columns of this table have not been made yet.\n")
    if long:
        shown_not = ", ".join(f"`{metric}`" for metric in part.metrics[2:])
        lines.append(f"{shown_not}, and their figures, are in `results/tables/{table.name}/`;")
        lines.append(f"`evodiff report {table.name}` makes its `report.html`.\n")
    for metric in part.metrics[:1] if long else part.metrics:
        if (ROOT / "results/tables" / table.name / f"{table.stem(metric)}.png").exists():
            lines.append(f"![{metric} against NFE]({folder}/{table.stem(metric)}.png)\n")
    return "\n".join([*lines, *matched(table, shown)])


MATCHED = """\
### With the contrast that suits each best

A solver that adds contrast can win by that alone. Here the images of each cell are first multiplied by one gain, about
mid-grey: the one of 0.9 to 1.3 that lowers the distance most on other seeds. Each cell has the distance of {images}
images with that gain, the gain in brackets; where that is the least or the largest tried, and one beyond is better on
those seeds, the same for the best gain of any size; and last the distance without a gain. Made by `python
scripts/contrast_matched.py {table} {budgets}`, which takes the runs whose images are there.
"""


def matched(table: Table, shown: set[int]) -> list[str]:
    """The part of a table on matched contrast, if its matched.csv is there."""
    found = read_matched(table.folder / "matched.csv", next(iter(table.jobs.values())).protocol)
    cells = {(row, nfe): found[key] for (row, nfe, _), key in table.keys.items() if key in found}
    if not cells:
        return []
    columns = sorted(shown & {nfe for _, nfe in cells})
    images = next(iter(cells.values())).images
    budgets = " ".join(map(str, sorted({nfe for _, nfe in cells})))
    lines = [
        MATCHED.format(table=table.config, images=images, budgets=budgets),
        "| | " + " | ".join(f"NFE {n}" for n in columns) + " |",
    ]
    lines.append("|---" + "|---:" * len(columns) + "|")
    for row in table.rows:
        here = [cells.get((row, n)) for n in columns]
        lines.append(f"| {row} | " + " | ".join(with_gains(cell) if cell else "" for cell in here) + " |")
    return [*lines, ""]


def with_gains(cell: Matched) -> str:
    gains = {cell.gain: cell.matched, cell.free_gain: cell.free}
    told = [f"{text.show(distance)} ({gain:.3g})" for gain, distance in gains.items()]
    return f"{' or '.join(told)}, {text.show(cell.plain)}"


def leaders(table: Table, metric: str) -> str:
    """`rmse@10000` is best at NFE 5 with A, at NFE 8 and 10 with B or C, which are equal there."""
    best, by_rows = text.best(table, metric), dict[str, list[int]]()
    for nfe in table.nfe:
        if rows := " or ".join(row for row in table.rows if (row, nfe) in best):
            by_rows.setdefault(rows, []).append(nfe)
    told = [f"{rows} (NFE {', '.join(map(str, budgets))})" for rows, budgets in by_rows.items()]
    return f"`{metric}` is best with {'; '.join(told)}."


RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "EVODiff, released": ("evodiff", {}),
    "EVODiff, Euler end": ("evodiff", {"final": "euler"}),
    "EVODiff, formulas of the paper": ("evodiff_paper", {"lower_order_final": False}),
    "EVODiff, formulas of the paper, zeta = 1": ("evodiff_paper", {"lower_order_final": False, "zeta": 1.0}),
    "DPM-Solver++ 2M": ("dpmpp_2m", {"lower_order_final": False}),
    "DPM-Solver++ 3M, released": ("dpmpp_3m", {"lower_order_final": False}),
    "UniP-3: 3M with the whole of D2": ("unipc_3", {"lower_order_final": False, "corrector": False}),
}
"""Whose convergence docs/reproduces.md shows."""


def convergence(steps: Iterable[int] = (32, 128, 512)) -> str:
    steps = list(steps)
    lines = ["| rule | schedule | " + " | ".join(f"{n} steps" for n in steps) + " |", "|---|---" + "|---:" * 3 + "|"]
    for label, (name, fields) in RULES.items():
        solver = named_solver(name, **fields)
        for schedule in orders.SCHEDULES:
            errors = " | ".join(f"{orders.error(solver, schedule, n):.1e}" for n in steps)
            lines.append(f"| {label} | {schedule} | {errors} |")
    return "\n".join(lines)


COMPARED = ("EVODiff", "DPM-Solver-v3", "AYS", "GITS")
"""Sources, by the beginning of their names."""


def baselines(nfe: int = 10) -> str:
    """FID of DPM-Solver++ and UniPC on EDM's CIFAR-10 networks as different papers report it."""
    lines = [f"| method | variant | FID, NFE {nfe} | source | how known |", "|---|---|---:|---|---|"]
    for p in published.read("cifar10_edm"):
        wanted = p.method in ("DPM-Solver++", "UniPC", "EVODiff") and p.source.startswith(COMPARED)
        if wanted and p.nfe == nfe and p.metric == "FID" and "schedule" not in p.variant and p.variant != "abstract":
            lines.append(f"| {p.method} | {p.variant or 'not stated'} | {p.value} | {p.cite} | {p.confidence} |")
    return "\n".join(lines)


def weights() -> str:
    """What docs/figures/weights.svg shows, as ranges over the steps."""
    found = json.loads(METHOD.read_text())["weights"]
    lines = ["| NFE | eta | zeta | (1 - 2 eta) / zeta |", "|---:|---:|---:|---:|"]
    for nfe, rows in found.items():
        columns = ([row[key] for row in rows] for key in ("eta", "zeta", "of_second_order"))
        lines.append(f"| {nfe} | " + " | ".join(f"{min(c):.2f} to {max(c):.2f}" for c in columns) + " |")
    return "\n".join(lines)


class Unchanging:
    """A network that gives the same answer everywhere: 1."""

    schedule = EDM()

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        return torch.ones_like(x)


def last_step(budgets: Iterable[int] = (5, 8, 10, 12, 15, 16, 17, 20, 25, 50)) -> str:
    """What EVODiff makes of an answer that no longer changes."""
    lines = ["| steps | kappa_t / kappa_s of the last step | released | euler |", "|---:|---:|---:|---:|"]
    for nfe in budgets:
        gains = []
        for final in ("released", "euler"):
            solver = named_solver("evodiff", final=final)
            grid = grid_for(nfe, solver, LogSNR(), EDM())
            gains.append(integrate(solver, Unchanging(), torch.zeros(1, 1, 1, 1).double(), grid).item())
        q = grid.nodes[-1].kappa / grid.nodes[-2].kappa
        lines.append(f"| {nfe} | {q:.3f} | {gains[0]:.3f} | {gains[1]:.3f} |")
    return "\n".join(lines)


def one_step() -> str:
    """What the right half of docs/figures/one_step.svg shows."""
    found = json.loads(METHOD.read_text())["one_step"]["steps"]
    lines = ["| from kappa | to kappa | DDIM | probe | corrected |", "|---:|---:|---:|---:|---:|"]
    for row in found:
        distances = " | ".join(f"{d:.3f}" for d in row["distance"].values())
        lines.append(f"| {row['kappa']:.3g} | {row['kappa_next']:.3g} | {distances} |")
    return "\n".join(lines)


def traces() -> str:
    """The extreme points of docs/figures/traces.svg."""
    found = json.loads(METHOD.read_text())["traces"]
    lines = [
        "| model | solver | entropy | least variance, of DDIM's | least entropy less DDIM's | exactly | distance |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, solvers in found.items():
        for solver, rows in solvers.items():
            pairs = list(zip(rows, solvers["ddim"], strict=True))
            variance = min(row["variance"] / other["variance"] for row, other in pairs)
            entropy, exact = (
                f"{min(row[key] - other[key] for row, other in pairs):.4f}" if key in rows[0] else ""
                for key in ("entropy", "exact_entropy")
            )
            ends = f"{rows[0]['entropy']:.2f} to {rows[-1]['entropy']:.2f}"
            distance = f"{rows[-1]['distance']:.4f}"
            lines.append(f"| {model} | {solver} | {ends} | {variance:.2f} | {entropy} | {exact} | {distance} |")
    return "\n".join(lines)


MEASURED: dict[str, dict[str, Callable[[], str]]] = {
    "method.md": {"one step": one_step, "weights": weights, "last step": last_step, "traces": traces},
    "reproduces.md": {"convergence": convergence, "baselines": baselines},
}
"""Parts of pages between `<!-- measured: NAME -->` and `<!-- end of measured -->`."""


def filled(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page with its measured parts as they are now."""
    content = (DOCS / page).read_text()
    for name, measure in parts.items():
        before, begin, rest = content.partition(f"{BEGIN.format(name)}\n")
        _, end, after = rest.partition(END)
        assert begin and end, f"docs/{page} has no part called {name}"
        content = f"{before}{begin}\n{measure()}\n\n{end}{after}"
    return content


def current(name: str) -> str:
    """What one of NAMES should hold."""
    return results_page() if name == "results.md" else filled(name, MEASURED[name])


NAMES = ("results.md", *MEASURED)


def main(argv: list[str]) -> int:
    wrong = [name for name in NAMES if not (DOCS / name).exists() or (DOCS / name).read_text() != current(name)]
    for name in wrong:
        if "--check" not in argv:
            with whole_file(DOCS / name) as temporary:
                temporary.write_text(current(name))
        print(f"docs/{name} {'is not current: make docs' if '--check' in argv else 'written'}")
    return int(bool(wrong) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
