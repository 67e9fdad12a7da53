"""`python scripts/contrast_matched.py TABLE [NFE ...]`: cells after their best gain, into the table's matched.csv.

Needs the states of the cells (`metrics` with rmse keeps them). Cells that are in the file already stay as they are, and
of the others those are left out whose images are not here.
"""

import sys

from evodiff.metrics.contrast import contrast_matched, read_matched, write_matched
from evodiff.runs.job import store_of
from evodiff.tables.table import Table

if __name__ == "__main__":
    name, *budgets = sys.argv[1:]
    table = Table.of_file(name)
    path = table.folder / "matched.csv"
    found = read_matched(path)
    for (row, nfe, k), job in table.jobs.items():
        key = table.keys[row, nfe, k]
        wanted = key not in found and (not budgets or str(nfe) in budgets)
        if wanted and job.protocol and job.run.folder.exists() and not (store := store_of(job)).missing():
            cell = found[key] = contrast_matched(store, job.protocol, job.device)
            print(
                f"{row} at NFE {nfe}: {cell.plain:.2f}, with gain {cell.gain:g} {cell.matched:.2f}, with "
                f"{cell.free_gain:.3g} {cell.free:.2f}",
                flush=True,
            )
            cells = {(row, nfe, key): found[key] for (row, nfe, _), key in table.keys.items() if key in found}
            write_matched(path, cells)
