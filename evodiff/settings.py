"""key=value arguments of the commands that look at a model (ems, gits, trace): their own keys, and run.yaml's."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evodiff.config import build, compose
from evodiff.device import device_for
from evodiff.errors import ConfigError
from evodiff.grid import ends
from evodiff.models.pretrained import Pretrained
from evodiff.precision import prepared
from evodiff.runs.run import Run


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


READ = ("model", "device", "t_start", "t_end", "precision", "channels_last")
"""What each of these commands reads of run.yaml."""


def model_of(
    command: str, overrides: list[str], also: Sequence[str] = ()
) -> tuple[Any, Pretrained, tuple[float, float]]:
    """The configuration, its model on its device, and (t_start, t_end): the schedule's own unless given.

    The model computes as the configuration says, but is not compiled: trace goes back through one call several times,
    which a compiled network need not allow. Raises ConfigError for what cannot be.
    """
    cfg, read = compose("run", overrides), (*READ, *also)
    for text in overrides:
        if (key := text.lstrip("+~").partition("=")[0].split(".")[0]) not in read:
            raise ConfigError(f"{text}: evodiff {command} does not read {key}, only {', '.join(read)} and its own.")
    device = device_for(cfg.device)
    if torch.device(device).type == "mps":
        raise ConfigError(f"device={device} has no float64, and states are in float64 here. Use device=cpu.")
    built: Pretrained = build(cfg.model, device=device)
    precision, channels_last, *_ = Run.from_config(cfg).computing
    model = prepared(built, precision, channels_last)
    return cfg, model, ends(model.schedule, cfg.t_start, cfg.t_end)
