"""`python scripts/paired.py TABLE ROW [NFE ...]`: how far the other rows' distances are from ROW's on the same seeds.

Into the table's paired.csv, with the standard error of each difference; what is there already stays. Rows are left out
whose images are not here.
"""

import sys

from evodiff.metrics.paired import paired, read_paired, scored, write_paired
from evodiff.runs.job import store_of
from evodiff.tables.table import Table

if __name__ == "__main__":
    name, against, *budgets = sys.argv[1:]
    table = Table.of_file(name)
    path = table.folder / "paired.csv"
    found = read_paired(path)
    for nfe in (nfe for nfe in table.nfe if not budgets or str(nfe) in budgets):
        here = {row: job for (row, n, k), job in table.jobs.items() if (n, k) == (nfe, 0) and job.run.folder.exists()}
        stores = {row: store for row, job in here.items() if not (store := store_of(job)).missing()}
        keys = {row: table.keys[row, nfe, 0] for row in stores}
        wanted = [row for row in stores if row != against and (keys[row], keys.get(against)) not in found]
        if against not in stores or not wanted:
            continue
        protocol, device = here[against].protocol, here[against].device
        assert protocol is not None
        other = scored(stores[against], protocol, device)
        for row in wanted:
            pair = found[keys[row], keys[against]] = paired(scored(stores[row], protocol, device), other)
            print(f"{row} at NFE {nfe}: {pair.difference:+.3f} ± {pair.standard_error:.3f}", flush=True)
            write_paired(path, found)
