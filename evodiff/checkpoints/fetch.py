"""Downloads that can be interrupted, by several processes at once, from mirrors that may be dead."""

import http.client
import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from evodiff.checkpoints.integrity import SIZE_TOLERANCE, check, odd_size, read_json, remember
from evodiff.checkpoints.registry import Entry, find, offline
from evodiff.errors import CheckpointError, ConfigError, StoreError
from evodiff.files import whole_file
from evodiff.locks import locked

CHUNK = 1 << 20
ATTEMPTS = 3
"""Times a mirror is asked again after a connection that broke off, counted anew when more is here than ever before."""
BUSY = {408, 429, 500, 502, 503, 504}
"""Statuses of HTTP after which the same question may be answered a little later."""
PAUSE = 2.0
"""Seconds before a busy mirror is asked again, doubled each time, unless it names others itself (Retry-After)."""
LONGEST_PAUSE = 60.0
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
DRIVE = "https://drive.usercontent.google.com/download?id={id}&export=download&confirm=t"

Advance = Callable[[int, int | None], None]
"""Called with (bytes here so far, total bytes if known)."""


class _Failure(Exception):
    """One mirror did not give the file; the next may."""


class _Stale(Exception):
    """The part here does not continue to what the mirror has now."""


def fetch(name: str, source: Path | None = None, advance: Advance | None = None) -> Path:
    """The file of an entry, brought here if it is not: from `source`, or from the first mirror that gives it whole.

    A download that broke off goes on where it stopped. The file appears under its name only after its size and hash
    were found right. One process fetches; others wait and then find it. Raises ConfigError offline and where only a
    browser can download, CheckpointError when every mirror failed or a damaged file is in its place, StoreError when
    the disk is full.
    """
    entry = find(name)
    target = entry.path
    with _writing(target), _alone(target, name):
        if source is not None:
            _copy(entry, source, target)
        elif not target.exists():
            _download(entry, target, advance or (lambda done, total: None))
        elif wrong := check(entry, target):
            raise CheckpointError(f"{target} is not {name}: {wrong}. Delete it and run the same command again.")
    return target


@contextmanager
def _alone(target: Path, name: str) -> Iterator[None]:
    """Hold the lock of a file; the system frees it when the process ends, however it ends."""
    lock = partial(locked, target.parent, f"{target.name}.lock")
    with lock(timeout=0) as held:
        if held:
            yield
            return
    print(f"{name}: another process is fetching it; waiting for it to finish", file=sys.stderr, flush=True)
    with lock():
        yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the disk, kept apart from those of the network."""
    try:
        yield
    except OSError as e:
        raise StoreError(
            f"cannot write {path}: {e.strerror or e}. Make room there, or set EVODIFF_CACHE to another folder, "
            "and run the same command again."
        ) from e


def _copy(entry: Entry, source: Path, target: Path) -> None:
    if not source.is_file():
        raise ConfigError(f"--from {source}: there is no such file. Give the path of your copy of {entry.file}.")
    try:
        copy = source.open("rb")
    except OSError as e:
        raise ConfigError(f"--from {source} cannot be read: {e.strerror or e}.") from e
    with copy, whole_file(target) as temporary:
        with temporary.open("wb") as f:
            shutil.copyfileobj(copy, f)
        wrong = check(entry, temporary)
        if wrong:
            raise CheckpointError(f"--from {source} is not {entry.file} of {entry.name}: {wrong}. Nothing was changed.")
    remember(target, target, str(source.resolve()))
    _discard(_part(target))


def _download(entry: Entry, target: Path, advance: Advance) -> None:
    if offline():
        raise ConfigError(
            f"{entry.name} is not here and EVODIFF_OFFLINE is set. On a machine with internet run `evodiff fetch "
            f"{entry.name}`, copy {entry.file} here, then `evodiff fetch {entry.name} --from PATH`."
        )
    if not entry.urls:
        raise ConfigError(f"{entry.name} has no link that a program can follow: {entry.by_hand}.")
    part = _part(target)
    failures = []
    for url in entry.urls:
        try:
            _from_mirror(entry, _address(url), part, advance)
            remember(target, part, url)
            part.replace(target)
            _validator(part).unlink(missing_ok=True)
            return
        except _Failure as e:
            failures.append(f"{_address(url)}: {e}")
    raise CheckpointError(
        f"{entry.name} could not be fetched. {'; '.join(failures)}. Run the same command again to go on, or "
        f"{entry.by_hand}."
    )


def _address(url: str) -> str:
    return DRIVE.format(id=url.removeprefix("drive:")) if url.startswith("drive:") else url


def _from_mirror(entry: Entry, url: str, part: Path, advance: Advance) -> None:
    """Complete `part` from one mirror, and check it. Raises _Failure; what came so far stays, unless it is wrong."""
    attempt, continued, problem = 0, False, ""
    most = _size(part)
    while attempt < ATTEMPTS:
        try:
            continued |= _transfer(entry, url, part, advance)
        except _Stale:
            attempt, problem = attempt + 1, "it answers with other parts of the file than it is asked for"
            _discard(part)
            continue
        except urllib.error.HTTPError as e:
            attempt, problem = attempt + 1, f"HTTP {e.code} {e.reason}"
            if e.code not in BUSY:
                raise _Failure(problem) from e
            if attempt < ATTEMPTS:
                time.sleep(_pause(e, attempt))
            continue
        except (OSError, http.client.HTTPException) as e:
            attempt = 0 if _size(part) > most else attempt + 1
            most = max(most, _size(part))
            problem = str(getattr(e, "reason", "") or e) or type(e).__name__
            continue
        wrong = check(entry, part) or odd_size(entry, _size(part))
        if wrong is None:
            return
        _discard(part)
        if not continued:
            raise _Failure(f"what it sent is not the file: {wrong}")
        continued = False  # what was here before may have been the fault: once more, from the start
    raise _Failure(problem)


def _pause(error: urllib.error.HTTPError, attempt: int) -> float:
    """Seconds to wait after the given attempt."""
    asked = error.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdecimal() else PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def _transfer(entry: Entry, url: str, part: Path, advance: Advance) -> bool:
    """Append to `part` what is missing; returns whether it continued an earlier part.

    A part is continued if the mirror says that it has the same file still (If-Range), or if its hash is known.
    """
    had = _size(part)
    known = read_json(_validator(part))
    same = known.get("url") == url and known.get("etag")
    headers = {"User-Agent": "evodiff"}
    if had and (same or entry.sha256 or entry.md5):
        headers["Range"] = f"bytes={had}-"
        if same:
            headers["If-Range"] = known["etag"]
    else:
        had = 0
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and had:
            if entry.bytes == had or e.headers.get("Content-Range", "").endswith(f"/{had}"):
                return True  # it was complete already
            raise _Stale from e
        raise
    except ValueError as e:
        raise _Failure(f"this is no address that can be asked ({e})") from e
    with response:
        if "text/html" in response.headers.get("Content-Type", "") and not entry.file.endswith(".html"):
            raise _Failure("it shows a web page (sign-in, quota or virus scan) instead of the file")
        if coding := response.headers.get("Content-Encoding"):
            raise _Failure(f"it sends the file in another form ({coding}), without being asked to")
        if response.status != http.client.PARTIAL_CONTENT:
            had = 0  # all of it, from the start
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {had}-"):
            raise _Stale
        length = response.headers.get("Content-Length", "")
        total = had + int(length) if length.isdecimal() else entry.bytes
        if entry.bytes is not None and total is not None and total != entry.bytes:
            raise _Failure(f"it has another file, of {total:,} bytes; expected {entry.bytes:,}")
        if total and (odd := odd_size(entry, total)):
            raise _Failure(f"it has another file: {odd}")
        _room(part, total, had)
        etag = response.headers.get("ETag", "")
        if not etag or etag.startswith("W/"):  # a weak tag promises no equality of bytes
            etag = response.headers.get("Last-Modified", "")
        done = had
        with _writing(part):
            _validator(part).write_text(json.dumps({"url": url, "etag": etag}))
            f = part.open("ab" if had else "wb")
        with f:
            while chunk := response.read1(CHUNK):
                with _writing(part):
                    f.write(chunk)
                    f.flush()
                done += len(chunk)
                advance(done, total)
        if total is not None and done < total:
            raise ConnectionError(f"the connection broke off after {done:,} of {total:,} bytes")
        least = (1 - SIZE_TOLERANCE) * (entry.size or 1)
        if not total and done < least:  # without a length, the end may be that of the connection
            raise ConnectionError(f"it ended after {done:,} bytes" + f" of some {entry.mb} MB" * bool(entry.mb))
    return had > 0


def _room(part: Path, total: int | None, had: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - had > free:
        raise StoreError(
            f"{part.parent} has {free / 1e9:.1f} GB left, and {(total - had) / 1e9:.1f} GB are to come. Make room, or "
            "set EVODIFF_CACHE to a folder on another disk."
        )


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")
