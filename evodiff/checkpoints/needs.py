"""Which files a table or a model needs, read from its configuration without building anything."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from evodiff.checkpoints.registry import find, registry
from evodiff.errors import ConfigError
from evodiff.files import read_yaml
from evodiff.paths import CHECKPOINTS, CONFIGS, check_checkout, resolve

GROUPS = ("model", "solver", "grid", "guidance", "protocol")


def tables() -> list[str]:
    check_checkout()
    return sorted(path.stem for path in (CONFIGS / "table").glob("*.yaml"))


def of_table(name: str) -> tuple[list[str], list[Path]]:
    """Entries of the registry that a table needs, and its files under checkpoints/ that are not fetched but made."""
    words = _of_rows(name)
    return _entries(words), sorted(CHECKPOINTS / word for word in words if word.endswith(".npz"))


def by_hand(name: str) -> list[Path]:
    """Folders and files that a model or a table names and nobody publishes in one piece: pipelines, prompts."""
    words = _of_rows(name) if _read("table", name) is not None else set(_strings(_read("model", name)))
    return sorted(resolve(word) for word in words if word.startswith("checkpoints/") or word.endswith(".txt"))


def _of_rows(name: str) -> set[str]:
    """Every string in the configurations of a table's rows."""
    table = _read("table", name)
    if table is None:
        raise ConfigError(f"there is no table {name}; possible: {', '.join(tables())}.")
    try:
        base = list(table.get("base") or [])
        rows = [[*base, *_overrides(row)] for row in (table.get("rows") or {}).values()] or [base]
        return {word for row in rows for word in _words(_choices(row))}
    except (LookupError, ValueError, AttributeError, TypeError) as e:
        raise ConfigError(
            f"table {name} cannot be read ({type(e).__name__}: {e}). Mend configs/table/{name}.yaml: its rows are "
            "lists of overrides like [solver=ddim], or mappings with `run`."
        ) from e


def of(name: str) -> list[str]:
    """Entries to fetch for a name of the registry or of a model, or else of a table. Raises ConfigError."""
    model = _read("model", name)
    if name in registry() or model is not None:  # often both: a model's weights, and what its configuration adds
        return _entries({name, *_strings(model)})
    if name in tables():
        return of_table(name)[0]
    find(name)  # raises, naming the nearest
    return []


def _overrides(row: Any) -> list[str]:
    """All of a row: a list, or a mapping with those at some NFEs apart (evodiff.tables.cells.Row)."""
    if isinstance(row, list):
        return row
    return [*row["run"], *(override for at in row.get("at") or () for override in at["run"])]


def _entries(words: Iterable[str]) -> list[str]:
    """The words that are entries, and what these need."""
    found: dict[str, None] = {}
    for word in sorted(words):
        if word in registry():
            found |= dict.fromkeys([word, *_entries(find(word).needs)])
    return list(found)


def _choices(overrides: Iterable[str]) -> dict[str, str]:
    """The last value of each `key=value`, the defaults of run.yaml where a group is not mentioned."""
    run = read_yaml(CONFIGS / "run.yaml")
    chosen = {k: str(v) for entry in run["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    return chosen | dict(str(text).split("=", 1) for text in overrides if "=" in str(text))


def _words(chosen: dict[str, str]) -> Iterator[str]:
    """Every string in the configurations chosen, and in overrides; of a protocol's references only its data set's."""
    for group in GROUPS:
        config = _read(group, chosen.get(group, "")) or {}
        if "references" in config:
            dataset = chosen.get(f"{group}.dataset", config.get("dataset"))
            config = {**config, "references": config["references"].get(dataset)}
        yield from _strings(config)
    yield from chosen.values()


def _read(group: str, name: str) -> dict[str, Any] | None:
    path = CONFIGS / group / f"{name}.yaml"
    return read_yaml(path) or {} if path.is_file() else None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
