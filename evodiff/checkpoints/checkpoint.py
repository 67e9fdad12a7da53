"""A checkpoint of this project: safetensors that say what network they belong to. Every published file becomes one."""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from evodiff.checkpoints.description import Description, describe, described_beside
from evodiff.checkpoints.layouts import read_weights
from evodiff.checkpoints.registry import cache_folder, find, registry, require
from evodiff.errors import CheckpointError, ConfigError, StoreError
from evodiff.files import sha256, whole_file
from evodiff.locks import locked
from evodiff.paths import resolve

FORMAT = "evodiff-checkpoint-1"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights as data. `tensors` are mapped from the file, not copied; `sha256` is that of the published file."""

    architecture: str
    config: dict[str, Any]
    schedule: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: str
    path: Path


def load(name_or_path: str | Path, ema: bool = True) -> Checkpoint:
    """A name of the registry, a published file, or a converted one. A published file is converted once, into the cache.

    Raises ConfigError for a name that is unknown or not fetched, CheckpointError for a file that is damaged or refused.
    """
    name = str(name_or_path)
    if name in registry():
        entry, source = find(name), require(name)
        if entry.kind not in ("model", "classifier") or not entry.architecture:
            raise ConfigError(f"{name} is no network that can be loaded ({entry.kind}, {entry.file}).")
        return open_checkpoint(_converted(source, Description(entry.architecture, entry.config, entry.schedule), ema))
    source = resolve(name_or_path)
    if not source.is_file():
        if Path(name).suffix or len(Path(name).parts) > 1:
            raise ConfigError(f"{name} does not exist. Give a file, or a name that `evodiff models` lists.")
        find(name)  # raises, naming the nearest
    return open_checkpoint(source if is_converted(source) else _converted(source, Description(), ema))


def convert(
    source: Path,
    out: Path | None = None,
    description: Description | None = None,
    overrides: Sequence[str] = (),
    ema: bool = True,
) -> Path:
    """Write a published file as safetensors (to `out`, or the cache) with a JSON file beside it; returns its path.

    What the file does not say of its network comes from `description`, else from a JSON file beside it whose name its
    own begins with, else from the entry of the registry whose weights have the same names and shapes; `overrides` are
    `key=value` on the configuration, and `schedule.key=value` on the schedule. The network so described must have
    exactly these weights. Raises ConfigError where `source` or a file of somebody else would be overwritten.
    """
    if not source.is_file():
        raise ConfigError(f"{source} does not exist. Give a checkpoint file to convert.")
    if is_converted(source):
        raise ConfigError(f"{source} is converted already; it can be used as it is.")
    target = out or _cached(source, description or Description(), ema, overrides)
    _check_free(target, source)
    weights = read_weights(source, ema)
    architecture, config, schedule = describe(source, weights, description or Description(), overrides)
    if weights.kind == "only" and re.fullmatch(r"model\d+", source.stem):
        print(
            f"evodiff: {source.name} is what trainers call weights without averaging; beside it there may be an "
            f"ema_RATE_{source.stem.removeprefix('model')}{source.suffix}, which samples better.",
            file=sys.stderr,
        )
    about = {
        "format": FORMAT,
        "architecture": architecture,
        "config": config,
        "schedule": schedule,
        "weights": weights.kind,
        "source": {"file": source.name, "bytes": source.stat().st_size, "sha256": sha256(source)},
    }
    return _write(target, weights.tensors, about)


def is_converted(path: Path) -> bool:
    """Whether this is a file written by `convert`."""
    return path.suffix == ".safetensors" and _about(path) is not None


def open_checkpoint(path: Path) -> Checkpoint:
    """A converted file. Raises CheckpointError for any other."""
    about = _about(path)
    try:
        if about is None or about["format"] != FORMAT:
            raise KeyError(FORMAT)
        known = about["architecture"], dict(about["config"]), dict(about["schedule"]), str(about["source"]["sha256"])
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} was not written by this version of `evodiff convert`; do it again.") from e
    architecture, config, schedule, digest = known
    return Checkpoint(architecture, config, schedule, load_file(path), digest, path)


def _converted(source: Path, description: Description, ema: bool) -> Path:
    path = _cached(source, description, ema)
    if not path.exists():
        with locked(path.parent, f"{path.name}.lock"):
            if not path.exists():
                print(f"converting {source} (once; nothing in it is executed)", file=sys.stderr, flush=True)
                convert(source, path, description, ema=ema)
    return path


def _cached(source: Path, description: Description, ema: bool, overrides: Sequence[str] = ()) -> Path:
    """A name that changes with the source (by size and time of change: hashing gigabytes at each start costs seconds)
    and with what is known of it."""
    stat, beside = source.stat(), described_beside(source)
    parts = [FORMAT, str(source.resolve()), stat.st_size, stat.st_mtime_ns, ema, list(overrides)]
    for known in (description, beside):
        parts += [known.architecture, known.config, known.schedule] if known else []
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()[:12]
    return cache_folder() / "converted" / f"{source.stem}-{key}.safetensors"


def _check_free(path: Path, source: Path) -> None:
    """Raise ConfigError unless nothing is at `path` and beside it but what `convert` wrote."""
    beside = path.with_suffix(".json")
    described = beside.is_file() and f'"{FORMAT}"'.encode() in beside.read_bytes()
    try:
        ours = not path.exists() or _about(path) is not None
    except CheckpointError:  # damaged: the file beside it tells whose it was
        ours = described
    if path.resolve() == source.resolve() or not ours or (beside.is_file() and not described):
        foreign = beside if ours else path
        raise ConfigError(
            f"{foreign} is not a file of `evodiff convert` and would be overwritten; choose another --out."
        )


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
    beside = path.with_suffix(".json")
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors makes files that others cannot read
        try:
            save_file(tensors, temporary, metadata={"evodiff": json.dumps(about)})
            temporary.chmod(mode)
        except SafetensorError as e:
            raise StoreError(f"cannot write {path}: {e}. Nothing was changed; make room and run it again.") from e
    with whole_file(beside) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")
    return path


def _about(path: Path) -> dict[str, Any] | None:
    """What a converted file says of itself; None for safetensors of others."""
    try:
        with safe_open(path, "pt") as f:
            text = (f.metadata() or {}).get("evodiff")
        return json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(
            f"{path} cannot be read ({e}). It is cut short or damaged; fetch or convert it again."
        ) from e
