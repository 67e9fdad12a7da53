"""Locks between processes that share a folder, of one machine or of several."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evodiff.errors import StoreError

NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What a file system without locks answers."""
NO_MARKERS: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock).parameters else {}
"""No files in the place of locks: the one of a process that died on another machine would stay for ever. Old versions
of filelock do not know this setting."""
ELSEWHERE = "EVODIFF_RESULTS for runs, EVODIFF_CACHE for weights"


@contextmanager
def locked(folder: Path, name: str, timeout: float = -1) -> Iterator[bool]:
    """Hold one lock of a folder, which ends with its process; yields False if another process has it, still after
    `timeout` seconds (-1: wait).

    Raises StoreError for a folder that cannot be written, or whose file system has no locks.
    """
    try:
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
        # thread_local=False: the thread that writes a shard lets go of its seeds
        lock = FileLock(folder / ".locks" / name, thread_local=False, **NO_MARKERS)
        lock.acquire(timeout=timeout)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as e:  # the latter is what old versions of filelock make of ENOSYS
        why = getattr(e, "strerror", None) or e
        if getattr(e, "errno", errno.ENOSYS) in NO_FLOCK:
            raise StoreError(
                f"{folder} is on a file system without locks (flock: {why}), and processes cannot share work without "
                f"them. Mount it with the option that gives them (Lustre: -o flock), or choose a folder elsewhere "
                f"({ELSEWHERE}); then run the same command again."
            ) from e
        raise StoreError(
            f"cannot write to {folder}: {why}. Make room, or choose another folder ({ELSEWHERE}); then run the same "
            f"command again."
        ) from e
    try:
        yield True
    finally:
        lock.release()
