"""What a file of configs/table may say."""

from collections.abc import Sequence, Set
from fnmatch import filter as matching
from itertools import pairwise
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evodiff.config import nearest, parse_range
from evodiff.errors import ConfigError
from evodiff.tables.cells import Row

KEYS = ("name", "title", "base", "rows", "nfe", "seeds", "at", "published", "metric")
PAPER_METRICS = {"FID": "fid", "IS": "is", "latent MSE": "mse"}
"""A paper's name of a metric, and ours before the @."""
LISTS: dict[str, tuple[tuple[type, ...], str]] = {
    "base": ((str,), "[model=mnist_tiny, nfe=10]"),
    "run": ((str,), "[solver=ddim]"),
    "nfe": ((int,), "[5, 10]"),
    "seeds": ((str, int), "[0-999, 1000-1999]"),
    "at": ((dict,), "[{nfe: [5], run: [t_end=0.01]}]"),
    "published": ((dict,), "[{source: EDM, method: Heun}]"),
}
"""What a list may hold, and an example."""


def checked(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Row], tuple[range, ...]]:
    """The fields of the composed `table.yaml`, its rows by name, and as many ranges of seeds as are asked for.

    Raises ConfigError for what is no table.
    """
    content: Any = OmegaConf.to_container(cfg.table)
    name = content["name"]
    if unknown := sorted(content.keys() - {*KEYS}):
        raise ConfigError(f"table {name}: {', '.join(unknown)} is no key; possible: {', '.join(KEYS)}")
    if missing := [key for key in ("title", "base", "rows", "nfe") if content.get(key) is None]:
        raise ConfigError(f"table {name} lacks {', '.join(missing)}: give it in its file in configs/table")
    for text in (content["title"], *(content["rows"] if isinstance(content["rows"], dict) else ())):
        if not isinstance(text, str):
            raise ConfigError(f"table {name}: {text!r} is no text: put it in quotes, a title as well as a row's name")
    if not isinstance(content.get("published"), str | None):
        raise ConfigError(
            f"table {name}: published: expected the name of a file of results/published, like cifar10_edm, not "
            f"{content['published']!r}; what describes a row's numbers stands in the row"
        )
    for key in ("limit", "repeats"):
        if cfg[key] is not None and (type(cfg[key]) is not int or cfg[key] < 1):
            raise ConfigError(f"{key}={cfg[key]} is impossible: expected a number of at least 1, or null for all.")
    if (metric := content.get("metric")) is not None and metric not in PAPER_METRICS:
        raise ConfigError(f"metric={metric} is not known; possible: {', '.join(PAPER_METRICS)}.")
    if (content.get("published") is None) != (metric is None):
        raise ConfigError(f"table {name}: published and metric go together: numbers of papers, and what they are of.")
    rows, ranges = _rows(content), content.get("seeds") or ()
    if (cfg.repeats or 1) > max(len(ranges), 1):
        many = f"{max(len(ranges), 1)} range{'s' * (len(ranges) > 1)} of seeds"
        raise ConfigError(f"repeats={cfg.repeats} is impossible: the table has {many}. Ask for fewer, or add seeds.")
    seeds = tuple(parse_range(text) for text in ranges[: cfg.repeats])
    for before, after in pairwise(sorted(seeds, key=lambda span: span.start)):
        if after.start < before.stop:
            raise ConfigError(
                f"table {name}: seeds {before.start}-{before.stop - 1} and {after.start}-{after.stop - 1} overlap: an "
                f"image would count twice. Give ranges without common seeds."
            )
    return content, rows, seeds


def chosen(cfg: DictConfig, rows: dict[str, Row]) -> Set[tuple[str, int]]:
    """The cells to be made now, (row, NFE): those of `rows` at `nfe` of the composed `table.yaml`, all without these.

    Raises ConfigError for names that are no row, and budgets that none of these rows has.
    """
    names, budgets = _asked(cfg, "rows", str), _asked(cfg, "nfe", int)
    for name in names or ():
        if not matching(rows, name):
            quotes = " One with a comma needs quotes: \"rows=['NAME']\"." if any("," in row for row in rows) else ""
            raise ConfigError(
                f"rows={name} is not in table {cfg.table.name}.{nearest(name, rows)} Rows: {'; '.join(rows)}.{quotes}"
            )
    wanted = [row for row in rows.values() if names is None or any(matching([row.name], name) for name in names)]
    possible = sorted({nfe for row in wanted for nfe in row.nfe})
    if budgets is not None and not {*budgets} <= {*possible}:
        has = ", ".join(map(str, possible))
        raise ConfigError(
            f"nfe={cfg.nfe}: not all are budgets of these rows of table {cfg.table.name}; they have {has}."
        )
    return {(row.name, nfe) for row in wanted for nfe in row.nfe if budgets is None or nfe in budgets}


def _asked(cfg: DictConfig, key: str, kind: type) -> list[Any] | None:
    """The list of an override; one value is a list of it, and null none."""
    given: Any = OmegaConf.to_container(cfg)
    value = given[key]
    values = value if isinstance(value, list) else [value]
    if value is not None and not (values and all(type(each) is kind for each in values)):
        example = "[EVODiff,UniPC*]" if kind is str else "[5,10]"
        raise ConfigError(f"{key}={value} is impossible: expected a list like {key}={example}, or null for all.")
    return None if value is None else values


def _rows(content: dict[str, Any]) -> dict[str, Row]:
    rows = content["rows"]
    if not isinstance(rows, dict) or not rows or content["nfe"] == []:
        raise ConfigError(
            f"table {content['name']} has no rows, or no nfe: give rows: {{NAME: [override, ...]}}, nfe: [5]"
        )
    _check_lists(f"table {content['name']}", content, "base", "nfe", "seeds", "at")
    for name, fields in rows.items():
        if isinstance(fields, dict):
            _check_lists(f"row {name}", fields, "nfe", "at", "published")
    _check_budgets(f"table {content['name']}: base", content["base"])
    found = {name: Row.of(name, row, content["nfe"], content.get("at") or ()) for name, row in rows.items()}
    for row in found.values():
        for overrides in (row.run, *(entry["run"] for entry in (*row.everywhere, *row.at))):
            _check_budgets(f"row {row.name}", overrides)
    return found


def _check_budgets(where: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for an NFE among them, which the table's column would take the place of."""
    if given := [text for text in overrides if text.lstrip("+").startswith("nfe=")]:
        raise ConfigError(f"{where}: {given[0]} has no effect: budgets are those of nfe, the table's or the row's")


def _check_lists(where: str, fields: dict[str, Any], *keys: str) -> None:
    """Raise ConfigError for what is no list of what it may hold; one number for nfe becomes a list."""
    if type(fields.get("nfe")) is int:
        fields["nfe"] = [fields["nfe"]]
    for key in keys:
        (kinds, example), value = LISTS[key], fields.get(key)
        if value is not None and not (isinstance(value, list) and all(type(entry) in kinds for entry in value)):
            raise ConfigError(f"{where}: {key}: expected a list like {example}, not {value!r}")
    for entry in (fields.get("at") or ()) if "at" in keys else ():
        _check_lists(f"{where}: at", entry, "nfe", "run")
