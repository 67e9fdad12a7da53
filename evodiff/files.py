"""Files that are whole or absent."""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evodiff.errors import StoreError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends without an error.

    Raises StoreError, leaving nothing behind, when the disk is full or the folder cannot be written.
    """
    # by chance, for a process on another machine that shares the folder may have the same number
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        full = "make room and " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StoreError(
            f"cannot write {path}: {e.strerror or e}. Nothing was changed; {full}run the same command again."
        ) from e
    finally:
        with suppress(OSError):  # where nothing could be written there may be no folder to look in
            temporary.unlink()


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
