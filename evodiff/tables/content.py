"""What a file of configs/table may say."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from evodiff.config import parse_range
from evodiff.errors import ConfigError
from evodiff.tables.cells import Row

KEYS = ("name", "title", "base", "rows", "nfe", "seeds", "at", "published", "metric")
PAPER_METRICS = {"FID": "fid", "IS": "is", "latent MSE": "mse"}
"""A paper's name of a metric, and ours before the @."""


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
    for key in ("limit", "repeats"):
        if cfg[key] is not None and (not isinstance(cfg[key], int) or cfg[key] < 1):
            raise ConfigError(f"{key}={cfg[key]} is impossible: expected a number of at least 1, or null for all.")
    if (metric := content.get("metric")) is not None and metric not in PAPER_METRICS:
        raise ConfigError(f"metric={metric} is not known; possible: {', '.join(PAPER_METRICS)}.")
    ranges = content.get("seeds") or ()
    if (cfg.repeats or 1) > max(len(ranges), 1):
        many = f"{max(len(ranges), 1)} range{'s' * (len(ranges) > 1)} of seeds"
        raise ConfigError(f"repeats={cfg.repeats} is impossible: the table has {many}. Ask for fewer, or add seeds.")
    return content, _rows(content), tuple(parse_range(text) for text in ranges[: cfg.repeats])


def _rows(content: dict[str, Any]) -> dict[str, Row]:
    rows = content["rows"]
    if not isinstance(rows, dict) or not rows or content["nfe"] == []:
        raise ConfigError(
            f"table {content['name']} has no rows, or no nfe: give rows: {{NAME: [override, ...]}}, nfe: [5]"
        )
    whole = [fields for fields in (content, *rows.values()) if isinstance(fields, dict)]
    for fields in (*whole, *(at for part in whole for at in part.get("at") or ())):
        if isinstance(fields.get("nfe"), int):
            fields["nfe"] = [fields["nfe"]]
    return {name: Row.of(name, row, content["nfe"], content.get("at") or ()) for name, row in rows.items()}
