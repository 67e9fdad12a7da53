"""How far the distances of a table's rows are from one row's on the same seeds, into its paired.csv.

With the standard error of each difference. What is there already stays, if it is of the table's protocol and reference;
rows are left out whose images are not here.
"""

import argparse
import sys

from evodiff.errors import ConfigError, EvodiffError
from evodiff.locks import locked
from evodiff.metrics.paired import paired, read_paired, scored, write_paired
from evodiff.runs.job import store_of
from evodiff.tables.table import Table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python scripts/paired.py", description=__doc__)
    parser.add_argument("table", help="its name in configs/table")
    parser.add_argument("row", help="what the others are compared with")
    parser.add_argument("nfe", type=int, nargs="*", help="which of its columns; all if none is named")
    given = parser.parse_args(argv)
    table, against = Table.of_file(given.table), given.row
    if against not in table.rows:
        raise ConfigError(f"table {given.table} has no row {against!r}. Possible: {', '.join(table.rows)}.")
    budgets = table.rows[against].nfe
    if unknown := sorted({*given.nfe} - {*budgets}):
        raise ConfigError(
            f"row {against} of table {given.table} has no NFE {unknown[0]}. Possible: {', '.join(map(str, budgets))}."
        )
    protocol, path = table.jobs[against, budgets[0], 0].protocol, table.folder / "paired.csv"
    if protocol is None:
        raise ConfigError(f"table {given.table} has protocol=none, so its images have no distance. Name another table.")
    found = read_paired(path, protocol)
    absent = 0
    for nfe in given.nfe or budgets:
        jobs = {row: job for (row, n, k), job in table.jobs.items() if (n, k) == (nfe, 0)}
        stores = {
            row: store
            for row, job in jobs.items()
            if job.run.folder.exists()
            and not (store := store_of(job)).missing()
            and all("images" in shard.holds for shard in store.shards)
        }
        keys = {row: table.keys[row, nfe, 0] for row in jobs}
        wanted = [row for row in jobs if row != against and (keys[row], keys.get(against)) not in found]
        here = [row for row in wanted if {row, against} <= stores.keys()]
        absent += len(wanted) - len(here)
        if not here:
            continue
        device = jobs[against].device
        other = scored(stores[against], protocol, device)
        for row in here:
            pair = paired(scored(stores[row], protocol, device), other)
            print(f"{row} at NFE {nfe}: {pair.difference:+.3f} ± {pair.standard_error:.3f}", flush=True)
            with locked(table.folder, "paired.lock"):  # another process may have added its own
                found = read_paired(path, protocol) | {(keys[row], keys[against]): pair}
                write_paired(path, found, protocol)
    print(f"{path} has {len(found)} pairs" if found else f"no pair of this protocol is in {path} yet")
    if absent:
        print(f"{absent} pairs are left out: the images of one are not here. `evodiff table {given.table}` makes them.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EvodiffError as e:
        sys.exit(f"evodiff: {e}")
