"""How the CPU works: with how many threads, and what becomes of freed memory."""

import ctypes
import os
from functools import cache

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of glibc's mallopt (malloc.h)."""
LARGEST = 32 << 20
"""Bytes of a buffer; glibc takes no larger threshold."""
KEPT = 1 << 30
"""Bytes in all."""
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Of the environment, by which glibc is told the same."""


def use_cpu(threads: int | None) -> None:
    """Compute with so many threads; None leaves it at torch's choice, one per core that it sees. Keep freed memory."""
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GB of what is freed, for a network takes and frees the same buffers at every call.

    Otherwise it gives them back to the system, and the next call waits for fresh pages (`python scripts/bench.py
    memory` has what that costs). Holds for the whole process. False, with nothing changed, where the environment
    already says what to do, or the C library is another one.
    """
    if not os.environ.keys().isdisjoint(SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS; musl; Windows
        return False
    return all(mallopt(name, size) == 1 for name, size in ((MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, KEPT)))
