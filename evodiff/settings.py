"""key=value arguments of the commands that look at a model (ems, gits, trace): their own keys, and run.yaml's."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from evodiff.config import build, compose
from evodiff.errors import ConfigError
from evodiff.models.pretrained import Pretrained
from evodiff.run import device_for


def parse(
    command: str, description: str | None, argv: Sequence[str], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The command's own settings, typed as their defaults are (counts at least 1), and the overrides left for run.yaml.

    Raises ConfigError for a value of another type.
    """
    parser = argparse.ArgumentParser(
        prog=f"evodiff {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = ", ".join(f"{k}={v}" if v is not None else k for k, v in defaults.items())
    parser.add_argument("setting", nargs="*", metavar="key=value", help=f"{keys}; others as in configs/run.yaml")
    values, overrides = dict(defaults), []
    for text in parser.parse_args(argv).setting:
        key, _, value = text.partition("=")
        if key not in defaults:
            overrides.append(text)
            continue
        kind = type(defaults[key]) if defaults[key] is not None else str
        try:
            values[key] = kind(value)
        except ValueError as e:
            raise ConfigError(f"{text} is impossible: {key} must be a number, like {key}={defaults[key]}") from e
        if kind is int and values[key] < 1:
            raise ConfigError(f"{text} is impossible: {key} must be at least 1")
    return values, overrides


def model_of(overrides: list[str]) -> tuple[Any, Pretrained, tuple[float, float]]:
    """The configuration, its model on its device, and (t_start, t_end): the schedule's own unless given."""
    cfg = compose("run", overrides)
    model: Pretrained = build(cfg.model, device=device_for(cfg.device))
    schedule = model.denoiser(None).schedule
    t_start, t_end = cfg.t_start or schedule.t_start, cfg.t_end or schedule.t_end
    if not t_start > t_end > 0:
        raise ConfigError(f"t_start={t_start} must be above t_end={t_end}, and t_end above 0")
    return cfg, model, (t_start, t_end)
