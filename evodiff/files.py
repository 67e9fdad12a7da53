"""Files that are whole or absent, and YAML that can be read or says where not."""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from evodiff.errors import ConfigError, StoreError


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


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ConfigError, with the line, for one that is not well formed."""
    try:
        with path.open(encoding="utf-8") as f:  # a stream has a name, which the error states
            return yaml.safe_load(f)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(e).split())}. Mend it.") from e


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read once as long as nobody touches it."""
    status = path.stat()
    return _sha256(path.resolve(), status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=100_000)
def _sha256(path: Path, inode: int, mtime_ns: int, size: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
