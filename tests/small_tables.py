"""A table of four cells on the mixture, and what its tests look at."""

import torch

from evodiff.config import compose
from evodiff.tables.table import Table

SMALL = ["table=smoke", "table.nfe=[5,6]"]
BASE = ["model=mixture", "seeds=0-15", "shard=8", "batch=8"]


def small_table(rows=None, *overrides, **changes):
    """Of other rows, with overrides of the command line, or other fields of the file."""
    cfg = compose("table", [*SMALL, *overrides])
    cfg.table.base = [*BASE, "protocol=none"]
    cfg.table.rows = rows or {"DDIM": ["solver=ddim"], "EVODiff": ["solver=evodiff"]}
    cfg.table.update(changes)
    return Table.from_config(cfg)


def bytes_of(folder, pattern):
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob(pattern) if p.is_file()
    }


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")
