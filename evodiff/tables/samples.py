"""The sample sheet of a table: the first nine images of each run, the same seeds by every method at every NFE."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from evodiff.errors import StoreError
from evodiff.plots import CELLS, save_sample_sheet
from evodiff.runs.job import Job, store_of
from evodiff.tables.cells import Cell

if TYPE_CHECKING:
    from evodiff.tables.table import Table

SHOWN = (5, 6, 8, 10, 12, 15, 20, 25)
"""NFE of the sheet, where a table has many."""


def save_sheet(path: Path, table: "Table") -> None:
    """One picture of the cells whose images are here. An older one of more cells stays, for records may be here without
    the images of their runs."""
    sheets = sample_sheets(table)
    if sheets and sum(map(len, sheets.values())) >= cells_on(path, table):
        save_sample_sheet(path, sheets)


def caption(path: Path, table: "Table") -> str:
    """What a sheet shows, and how much of it is missing."""
    n, done = cells_on(path, table), len(recorded(table))
    part = f": {n} of {done} cells, whose images were here" if n < done else ""
    return f"The same nine seeds by every method at every NFE{part}."


def sample_sheets(table: "Table") -> dict[str, dict[int, np.ndarray]]:
    """Row -> NFE -> the first nine images of each cell whose shards are here."""
    sheets: dict[str, dict[int, np.ndarray]] = {}
    for cell in shown(table):
        first = _first_nine(cell.jobs[0])
        if len(first) == 9:
            sheets.setdefault(cell.row, {})[cell.nfe] = first
    return sheets


def shown(table: "Table") -> list[Cell]:
    nfes = table.nfe if len(table.nfe) <= 8 else SHOWN
    return [cell for cell in table.cells.values() if cell.nfe in nfes]


def recorded(table: "Table") -> list[Cell]:
    records = table.records
    return [cell for cell in shown(table) if (cell.row, cell.nfe, 0) in records]


def cells_on(path: Path, table: "Table") -> int:
    """How many cells a sheet shows; one that does not say it is of all that are recorded. 0 if there is none."""
    try:
        with Image.open(path) as sheet:
            return int(sheet.info.get(CELLS, len(recorded(table))))
    except OSError:
        return 0


def _first_nine(job: Job) -> np.ndarray:
    """Nothing of a run that is not complete here, or whose folder cannot be read."""
    try:
        whole = job.run.folder.exists() and not (store := store_of(job)).missing()
        return store.first(9) if whole else np.empty(0)
    except StoreError:
        return np.empty(0)
