"""Cells of a table after their best gain, into its matched.csv.

Needs the states of the cells (`metrics` with rmse keeps them). Cells that are in the file already stay as they are, if
they are of the table's protocol and reference, and of the others those are left out whose states are not here.
"""

import argparse
import sys

from evodiff.errors import ConfigError, EvodiffError
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
    if unknown := sorted({*given.nfe} - {*table.nfe}):
        raise ConfigError(f"table {given.table} has no NFE {unknown[0]}. Possible: {', '.join(map(str, table.nfe))}.")
    protocol, path = next(iter(table.jobs.values())).protocol, table.folder / "matched.csv"
    if protocol is None:
        raise ConfigError(f"table {given.table} has protocol=none, so its images have no distance. Name another table.")
    found = read_matched(path, protocol)
    absent = 0
    for (row, nfe, k), job in table.jobs.items():
        key = table.keys[row, nfe, k]
        if key in found or (given.nfe and nfe not in given.nfe):
            continue
        if (
            not job.run.folder.exists()
            or (store := store_of(job)).missing()
            or any("x" not in shard.holds for shard in store.shards)
        ):
            absent += 1
            continue
        cell = contrast_matched(store, protocol, job.device)
        print(
            f"{row} at NFE {nfe}: {cell.plain:.2f}, with gain {cell.gain:g} {cell.matched:.2f}, with "
            f"{cell.free_gain:.3g} {cell.free:.2f}",
            flush=True,
        )
        with locked(table.folder, "matched.lock"):  # another process may have added its own
            found = read_matched(path, protocol) | {key: cell}
            cells = {(r, n, key): found[key] for (r, n, _), key in table.keys.items() if key in found}
            write_matched(path, cells, protocol)
    print(f"{path} has {len(found)} cells" if found else f"no cell of this protocol is in {path} yet")
    if absent:
        print(f"{absent} runs are left out: images or states are not here. `evodiff table {given.table}` makes them.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EvodiffError as e:
        sys.exit(f"evodiff: {e}")
