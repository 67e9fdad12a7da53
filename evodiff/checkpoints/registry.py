"""What can be had from elsewhere: the entries of checkpoints/manifest.yaml, and where their files lie here."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from evodiff.errors import ConfigError
from evodiff.files import read_yaml
from evodiff.paths import CHECKPOINTS, check_checkout

MANIFEST = CHECKPOINTS / "manifest.yaml"
KINDS = ("model", "classifier", "reference", "extractor")
_IN_YAML: Mapping[Any, tuple[Any, str]] = {
    str: (str, "text, in quotes where it looks like a number"),
    int | None: (int | float, "a number"),
    tuple[str, ...]: (list, "a list"),
    Mapping[str, Any]: (dict, "a mapping"),
}
"""The type of a field -> what it is in YAML."""


@dataclass(frozen=True)
class Entry:
    """One published file; the fields are explained at the head of the manifest."""

    name: str
    kind: str
    file: str
    licence: str
    paper: str = ""
    urls: tuple[str, ...] = ()
    page: str = ""
    bytes: int | None = None
    mb: int | None = None
    sha256: str = ""
    sha256_reported: str = ""
    md5: str = ""
    needs: tuple[str, ...] = ()
    architecture: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def path(self) -> Path:
        """Where the file lies once fetched."""
        return cache_folder() / self.name / self.file

    @property
    def size(self) -> int | None:
        """Bytes, exact if published, otherwise approximate."""
        return self.bytes or (self.mb * 10**6 if self.mb else None)

    @property
    def by_hand(self) -> str:
        """What to do where no program can download."""
        where = f"open {self.page} in a browser, download {self.file}" if self.page else f"bring {self.file} here"
        return f"{where}, then `evodiff fetch {self.name} --from PATH`"


def cache_folder() -> Path:
    """EVODIFF_CACHE, or checkpoints/cache. Everything fetched or converted is below it."""
    return Path(os.environ.get("EVODIFF_CACHE") or CHECKPOINTS / "cache").expanduser()


def offline() -> bool:
    """Whether EVODIFF_OFFLINE forbids the network."""
    return os.environ.get("EVODIFF_OFFLINE", "").lower() not in ("", "0", "false", "no")


def registry() -> Mapping[str, Entry]:
    """All entries of the manifest by name. Raises ConfigError, naming the entry, for one that is not well formed."""
    return _read(MANIFEST)


@cache
def _read(path: Path) -> Mapping[str, Entry]:
    if not path.exists():
        check_checkout()
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is no mapping of names to entries. Mend it.")
    entries = {}
    for name, values in raw.items():
        if str(name).startswith("."):  # YAML anchors that entries share
            continue
        if wrong := _wrong(name, values):
            raise ConfigError(f"{path}: {name}: {wrong}. Mend this entry.")
        lists = {key: tuple(values[key]) for key in ("urls", "needs") if key in values}
        entries[name] = Entry(name=name, **{**values, **lists})
    return entries


def _wrong(name: Any, values: Any) -> str | None:
    """What keeps this from being an entry; None if nothing."""
    if not isinstance(values, dict):
        return f"{values!r} is no mapping of fields"
    types = {f.name: f.type for f in fields(Entry) if f.name != "name"}
    for key, value in values.items():
        if key not in types:
            return f"{key} is no field"
        expected, meaning = _IN_YAML[types[key]]
        items = value if expected is list and isinstance(value, list) else []
        if not isinstance(value, expected) or not all(isinstance(item, str) for item in items):
            return f"{key}={value!r} is not {meaning}"
    if values.get("kind") not in KINDS:
        return f"kind={values.get('kind')} is none of {', '.join(KINDS)}"
    for key in ("file", "licence"):
        if not values.get(key):
            return f"{key} is missing"
    for part in (name, values["file"]):  # both are in the path of the file
        if not isinstance(part, str) or Path(part).name != part or part == "..":
            return f"{part} is no name that a file can have"
    return None


def find(name: str) -> Entry:
    """The entry of that name. Raises ConfigError naming the nearest one."""
    entries = registry()
    if name not in entries:
        import difflib

        close = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{name} is not in the registry.{hint} `evodiff models` lists all {len(entries)} entries.")
    return entries[name]


def require(name: str) -> Path:
    """The file of an entry. Raises ConfigError, saying how to get it, if it is not here."""
    entry = find(name)
    if not entry.path.is_file():
        raise ConfigError(
            f"{name} ({entry.kind}) is not here: {entry.path} is missing. Run `evodiff fetch {name}`, or "
            f"`evodiff fetch {name} --from PATH` if you have {entry.file} already."
        )
    return entry.path


def resembling(fingerprint: str, file: str = "") -> Entry | None:
    """The model whose weights have these names and shapes; among several, the one with that file name."""
    found = [e for e in registry().values() if e.fingerprint and e.fingerprint == fingerprint]
    return next((e for e in found if e.file == file), found[0] if found else None)
