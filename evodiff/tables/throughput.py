"""Evaluations a second: measured here, told by a published training time, or scaled by the operations they take."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evodiff.config import build
from evodiff.paths import ROOT, results_folder
from evodiff.runs.run import Run
from evodiff.tables.published import FOLDER

SHIPPED = ROOT / "results" / "bench" / "throughput.json"
"""The project's own, which stays where results are written elsewhere."""
OPERATIONS = ROOT / "results" / "bench" / "operations.json"
"""model -> GFLOP of its network and classifier. `python scripts/count_operations.py` writes it."""
TRAINING = FOLDER / "training_time.json"
"""How long others trained on how many images: it tells what their GPUs do in a second."""
PASSES = 3
"""Evaluations that an image of training takes: one forward, and backward what two take."""
ALIKE = 100
"""Networks whose operations differ more than this do not tell each other's speed: small ones wait for launches."""


@dataclass(frozen=True)
class Rate:
    """Evaluations per second of a model without guidance, and how that is known."""

    value: float
    how: str


def measured_file() -> Path:
    """device -> model -> evaluations per second, as `python scripts/bench.py batches` writes it."""
    return results_folder() / "bench" / "throughput.json"


def known_rates() -> dict[str, dict[str, Rate]]:
    """device -> model -> rate, of what was measured here and of what training times of others tell."""
    found: dict[str, dict[str, Rate]] = {}
    for told in json.loads(TRAINING.read_text()):
        value = PASSES * told["million_images"] * 1e6 / (told["days"] * 86400 * told["gpus"])
        rate = Rate(value, f"by its training time in {told['source']}")
        found.setdefault(f"one {told['gpu']} in {told['precision']}", {}).update(dict.fromkeys(told["models"], rate))
    for path in (SHIPPED, measured_file()):
        for device, values in _read(path).items():
            found.setdefault(device, {}).update({model: Rate(value, "measured") for model, value in values.items()})
    return found


def rate_on(rates: Mapping[str, Rate], model: str) -> Rate | None:
    """A model's rate on a device of which `rates` are known: its own, or by operations from the nearest one's."""
    if model in rates:
        return rates[model]
    counts = {name: of["network"] for name, of in _read(OPERATIONS).items()}
    times = {name: counts[model] / counts[name] for name in rates if model in counts and name in counts}
    nearest = min(times, key=lambda name: max(times[name], 1 / times[name]), default=None)
    if nearest is None or not 1 / ALIKE <= times[nearest] <= ALIKE:
        return None
    return Rate(rates[nearest].value / times[nearest], f"{times[nearest]:.2g} times the operations of {nearest}")


def passes(run: Run) -> float:
    """What a guided evaluation of a run costs, in evaluations of its network."""
    return _passes(run.model["name"], json.dumps(run.guidance))


@cache
def _passes(model: str, guidance: str) -> float:
    of = _read(OPERATIONS).get(model, {})
    if json.loads(guidance)["name"] == "classifier" and "classifier" in of:
        return 1 + of["classifier"] / of["network"]
    return build(json.loads(guidance)).network_passes


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
