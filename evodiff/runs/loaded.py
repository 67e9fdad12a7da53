"""The model of a run, kept for the next one."""

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from evodiff.config import build
from evodiff.models.pretrained import Pretrained
from evodiff.paths import resolve
from evodiff.precision import prepared
from evodiff.runs.run import Run

NAMING_FILES = ("checkpoint", "classifier", "weights", "pipeline", "prompts")
"""Fields of a model that may name a file or a folder."""
_kept: dict[str, Pretrained | None] = {}
"""The model of the run before, under what it was made of; None after a run that failed."""


@contextmanager
def loaded(run: Run, device: str) -> Iterator[Pretrained]:
    """The model of a run on a device, computing as the run says.

    It is kept for the next run, unless what happens inside fails, for example for want of memory. Only one is kept: the
    one before is let go of first, and so it is when a file that the configuration names has changed. Raises what
    building the model raises.
    """
    key = json.dumps([run.as_dict()["model"], run.computing, device, _states(run.model)], sort_keys=True)
    model = _kept.get(key)
    if model is None:
        if _kept:
            _kept.clear()
            gc.collect()  # a compiled network refers to itself
        model = _kept[key] = prepared(build(run.model, device=device), *run.computing)
    try:
        yield model
    except BaseException:
        _kept[key] = None
        raise


def _states(model: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Size and time of change of the files that a model's configuration names, also of those in folders."""
    named = [resolve(model[key]) for key in NAMING_FILES if isinstance(model.get(key), str)]
    files = [path for one in named for path in (one, *sorted(one.rglob("*"))) if path.is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
