"""The pages of a table, results/tables/<name>/: from the records alone; images where their runs are here."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evodiff.errors import EvodiffError, StoreError
from evodiff.files import whole_file
from evodiff.plots import save_curves, save_sample_sheet
from evodiff.runs.job import store_of
from evodiff.runs.record import Record
from evodiff.tables import html, text, trajectory

if TYPE_CHECKING:
    from evodiff.tables.table import Table

SHOWN = (5, 6, 8, 10, 12, 15, 20, 25)
"""NFE of the sample sheet, where a table has many."""


def write(table: "Table") -> None:
    """table.md, .tex and .csv, the figures, report.html and a copy of each record."""
    if not table.records and not table.published:
        raise EvodiffError(f"table {table.config} has no records yet. `evodiff table {table.config}` makes them.")
    copy_records(table)
    _write(table, "table.md", f"# {table.title}\n\n{text.markdown(table)}")
    _write(table, "table.tex", text.latex(table))
    _write(table, "table.csv", text.table_csv(table))
    for metric in table.metrics:
        paths = [table.folder / f"{table.stem(metric)}.{kind}" for kind in ("png", "svg")]
        save_curves(paths, table.curves(metric), metric, table.levels(metric), title=f"{metric} against NFE")
    if sheets := sample_sheets(table):
        save_sample_sheet(table.folder / "samples.png", sheets)
    trajectory.save_sheet(table.folder / "trajectories.png", table)
    _write(table, "report.html", html.page(table))


def copy_records(table: "Table") -> None:
    """Beside the pages, so that they can be committed and made again without the runs."""
    keys = {job.run.key(): job for job in table.jobs.values()}
    keys |= {key: job for key, (job, _) in table.references.items()}
    for key, job in keys.items():
        copy = table.folder / "records" / f"{key}.json"
        record = table.record_of(job, key)
        if record is not None and record != _copied(copy):
            record.write(copy)


def _copied(copy: Path) -> Record | None:
    """None if there is none yet, or one of another version of this project, which is to be replaced."""
    try:
        return Record.read(copy)
    except StoreError:
        return None


def sample_sheets(table: "Table") -> dict[str, dict[int, np.ndarray]]:
    """Row -> NFE -> the first nine images of each cell whose shards are here."""
    sheets: dict[str, dict[int, np.ndarray]] = {}
    shown = table.nfe if len(table.nfe) <= 8 else [n for n in table.nfe if n in SHOWN]
    for cell in table.cells.values():
        job = cell.jobs[0]
        if cell.nfe in shown and job.run.folder.exists() and not (store := store_of(job)).missing():
            first = store.first(9)
            if len(first) == 9:
                sheets.setdefault(cell.row, {})[cell.nfe] = first
    return sheets


def _write(table: "Table", name: str, content: str) -> None:
    with whole_file(table.folder / name) as temporary:
        temporary.write_text(content)
