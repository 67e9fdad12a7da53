"""The pages of a table, results/tables/<name>/: from the records alone; images where their runs are here."""

from pathlib import Path
from typing import TYPE_CHECKING

from evodiff.errors import EvodiffError, StoreError
from evodiff.files import whole_file
from evodiff.plots import foremost, save_curves
from evodiff.runs.record import Record
from evodiff.tables import html, samples, text, trajectory

if TYPE_CHECKING:
    from evodiff.tables.table import Table


def write(table: "Table") -> None:
    """table.md, .tex and .csv, the figures, report.html and a copy of each record."""
    if not table.records and not table.published:
        raise EvodiffError(f"table {table.config} has no records yet. `evodiff table {table.config}` makes them.")
    copy_records(table)
    _write(table, "table.md", f"# {table.title}\n\n{text.markdown(table)}")
    _write(table, "table.tex", text.latex(table))
    _write(table, "table.csv", text.table_csv(table))
    named = foremost(table.curves(table.metrics[0])) if table.metrics else []
    for metric in table.metrics:
        paths = [table.folder / f"{table.stem(metric)}.{kind}" for kind in ("png", "svg")]
        title = f"{metric} against NFE"
        save_curves(paths, table.curves(metric), metric, table.levels(metric), title, named)
    samples.save_sheet(table.folder / "samples.png", table)
    trajectory.save_sheet(table.folder / "trajectories.png", table)
    _write(table, "report.html", html.page(table))


def copy_records(table: "Table") -> None:
    """Beside the pages, so that they can be committed and made again without the runs."""
    for job in (*table.jobs.values(), *table.references.values()):
        copy = table.folder / "records" / f"{job.run.key()}.json"
        record = table.record_of(job)
        if record is not None and record != _copied(copy):
            record.write(copy)


def _copied(copy: Path) -> Record | None:
    """None if there is none yet, or one of another version of this project, which is to be replaced."""
    try:
        return Record.read(copy)
    except StoreError:
        return None


def _write(table: "Table", name: str, content: str) -> None:
    with whole_file(table.folder / name) as temporary:
        temporary.write_text(content, encoding="utf-8")
