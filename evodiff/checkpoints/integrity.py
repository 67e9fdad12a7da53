"""Whether a file is what it should be: by what its authors published, or by what it was when it came."""

import hashlib
import json
from pathlib import Path
from typing import Any

from evodiff.checkpoints.registry import Entry
from evodiff.files import whole_file

SIZE_TOLERANCE = 0.1
"""By how much a file may differ from the manifest's `mb`, a rounded number."""


def check(entry: Entry, path: Path, hashes: bool = True) -> str | None:
    """What is wrong with a file, by the manifest and by what it was when it came; None if nothing."""
    size, came_with = path.stat().st_size, entry.bytes or _remembered(path).get("bytes")
    if came_with is not None and size != came_with:
        return f"it has {size:,} bytes, expected {came_with:,}"
    expected = {"sha256": entry.sha256 or _remembered(path).get("sha256", ""), "md5": entry.md5}
    for algorithm, digest in expected.items():
        found = _digest(path, algorithm) if digest and hashes else ""
        if found and not found.startswith(digest):
            return f"its {algorithm} is {found}, expected {digest}"
    with path.open("rb") as f:
        if f.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "it is a web page (sign-in, quota or virus scan), not the file"
    return None


def odd_size(entry: Entry, size: int) -> str | None:
    """What tells a file of this size from the published one, where an approximate size is all that is known of it."""
    exact = entry.bytes or entry.sha256 or entry.md5
    if exact or not entry.mb or abs(size / 1e6 - entry.mb) <= SIZE_TOLERANCE * entry.mb:
        return None
    return f"it has {size / 1e6:,.1f} MB, and the published file some {entry.mb:,} MB"


def differs_from_report(entry: Entry, path: Path) -> str | None:
    """A remark if the file is of another size than published, or of another hash than others reported, though not the
    authors."""
    if odd := odd_size(entry, path.stat().st_size):
        return f"{entry.name}: {odd}; it is used as it is"
    found = (_remembered(path).get("sha256") or _digest(path, "sha256")) if entry.sha256_reported else ""
    if found == entry.sha256_reported:
        return None
    return f"{entry.name}: sha256 is {found}; others reported {entry.sha256_reported} for the file at {entry.urls[0]}"


def _receipt(target: Path) -> Path:
    return target.with_name(f"{target.name}.fetched.json")


def remember(target: Path, file: Path, source: str) -> None:
    """Keep the hash a file had when it came, so that damage shows later even if nobody published one."""
    about = {"sha256": _digest(file, "sha256"), "bytes": file.stat().st_size, "source": source}
    with whole_file(_receipt(target)) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")


def _remembered(path: Path) -> dict[str, Any]:
    return read_json(_receipt(path))


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, algorithm).hexdigest()
