"""`python scripts/contrast_matched.py TABLE`: every cell after its best gain, into results/tables/TABLE/matched.csv.

Needs the states of the cells (`metrics` with rmse keeps them). Cells that are in the file already stay as they are, and
of the others those are left out whose images are not here.
"""

import csv
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from evodiff.config import compose
from evodiff.contrast import contrast_matched
from evodiff.files import whole_file
from evodiff.report import Table
from evodiff.run import store_of

COLUMNS = ["solver", "nfe", "images", "plain", "gain", "matched", "run"]

if __name__ == "__main__":
    table = Table.from_config(compose("table", [f"table={sys.argv[1]}", *sys.argv[2:]]))
    path = table.folder / "matched.csv"
    with path.open(newline="") if path.exists() else nullcontext([]) as lines:
        before = {line["run"]: [line[name] for name in COLUMNS] for line in csv.DictReader(lines)}
    rows: list[Sequence[object]] = []
    for (row, nfe, _), job in table.jobs.items():
        if job.run.key() in before:
            rows.append(before[job.run.key()])
        elif job.protocol and job.run.folder.exists() and not (store := store_of(job)).missing():
            found = contrast_matched(store, job.protocol, job.device)
            rows.append([row, nfe, found.n, repr(found.plain), found.gain, repr(found.matched), job.run.key()])
            print(f"{row} at NFE {nfe}: {found.plain:.2f}, with gain {found.gain:g} {found.matched:.2f}", flush=True)
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
