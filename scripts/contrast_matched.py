"""Cells of a table after their best gain, into its matched.csv.

Needs the states of the cells (`metrics` with rmse keeps them). Cells that are in the file already stay as they are, and
of the others those are left out whose images are not here.
"""

import argparse
import sys

from evodiff.errors import EvodiffError
from evodiff.locks import locked
from evodiff.metrics.contrast import contrast_matched, read_matched, write_matched
from evodiff.runs.job import store_of
from evodiff.tables.table import Table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python scripts/contrast_matched.py", description=__doc__)
    parser.add_argument("table", help="its name in configs/table")
    parser.add_argument("nfe", type=int, nargs="*", help="which of its columns; all if none is named")
    given = parser.parse_args(argv)
    table = Table.of_file(given.table)
    path = table.folder / "matched.csv"
    found = read_matched(path)
    absent = 0
    for (row, nfe, k), job in table.jobs.items():
        key = table.keys[row, nfe, k]
        if key in found or (given.nfe and nfe not in given.nfe) or job.protocol is None:
            continue
        if not job.run.folder.exists() or (store := store_of(job)).missing():
            absent += 1
            continue
        cell = contrast_matched(store, job.protocol, job.device)
        print(
            f"{row} at NFE {nfe}: {cell.plain:.2f}, with gain {cell.gain:g} {cell.matched:.2f}, with "
            f"{cell.free_gain:.3g} {cell.free:.2f}",
            flush=True,
        )
        with locked(table.folder, "matched.lock"):  # another process may have added its own
            found = read_matched(path) | {key: cell}
            write_matched(path, {(r, n, key): found[key] for (r, n, _), key in table.keys.items() if key in found})
    print(f"{path} has {len(found)} cells")
    if absent:
        print(f"{absent} runs are left out: images or states are not here. `evodiff table {given.table}` makes them.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EvodiffError as e:
        sys.exit(f"evodiff: {e}")
