"""`python scripts/contrast_matched.py TABLE`: every cell after its best gain, into results/tables/TABLE/matched.csv.

Needs the states of the cells (`metrics` with rmse keeps them); cells whose images are not here are left out.
"""

import csv
import sys

from evodiff.config import compose
from evodiff.contrast import contrast_matched
from evodiff.files import whole_file
from evodiff.report import Table
from evodiff.run import store_of

if __name__ == "__main__":
    table = Table.from_config(compose("table", [f"table={sys.argv[1]}", *sys.argv[2:]]))
    rows: list[list[object]] = []
    for (row, nfe, _), job in table.jobs.items():
        if job.protocol and job.run.folder.exists() and not (store := store_of(job)).missing():
            found = contrast_matched(store, job.protocol, job.device)
            rows.append([row, nfe, found.n, repr(found.plain), found.gain, repr(found.matched), job.run.key()])
            print(f"{row} at NFE {nfe}: {found.plain:.2f}, with gain {found.gain:g} {found.matched:.2f}", flush=True)
    with whole_file(table.folder / "matched.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([["solver", "nfe", "images", "plain", "gain", "matched", "run"], *rows])
