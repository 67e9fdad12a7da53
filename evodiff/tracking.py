"""Trackers: records go in, a dashboard comes out. A tracker is a view; the records stay on disk."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from evodiff.checkpoints.registry import offline
from evodiff.errors import ConfigError
from evodiff.paths import results_folder

if TYPE_CHECKING:
    from evodiff.runs.record import Record

MODES = ("offline", "online", "disabled")
PER_RUN = 15.0
"""Seconds that each run may take beyond the timeout."""
Curves = Mapping[str, Mapping[int, float]]
"""Label -> NFE -> value."""
Papers = Mapping[str, Curves]
"""By the metric that a paper reports, named as in the records."""


class Tracker(Protocol):
    """What a `configs/tracker/*.yaml` builds."""

    def publish(
        self,
        name: str,
        records: "Sequence[Record]",
        labels: Sequence[str] | None = None,
        published: Papers | None = None,
    ) -> bool:
        """Show the records of one run or table called `name`; False if that was asked for and did not work.

        `labels` are the table's rows, one for each record (None: their solvers); `published` are papers' values. Never
        raises for what the dashboard does.
        """
        ...


class Silent:
    """Publishes nothing."""

    def publish(
        self,
        name: str,
        records: "Sequence[Record]",
        labels: Sequence[str] | None = None,
        published: Papers | None = None,
    ) -> bool:
        return True


@dataclass(frozen=True)
class WandB:
    """Weights & Biases: a run for each record, and for a table one more with its cells and curves.

    It speaks to wandb from a process of its own, so that a wandb that hangs, crashes or is not there costs one line and
    `timeout` seconds, and PER_RUN more for each run. What could not be sent is written offline, for `wandb sync`.
    """

    project: str = "evodiff"
    entity: str | None = None
    mode: str = "offline"
    timeout: float = 60.0
    """Seconds until an answer is no longer waited for."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"tracker.mode={self.mode} does not exist; possible: {', '.join(MODES)}.")
        if type(self.timeout) not in (int, float) or not 0 < self.timeout < math.inf:
            raise ConfigError(f"tracker.timeout={self.timeout} is impossible: expected a number of seconds, above 0.")

    def publish(
        self,
        name: str,
        records: "Sequence[Record]",
        labels: Sequence[str] | None = None,
        published: Papers | None = None,
    ) -> bool:
        if self.mode == "disabled" or not records:
            return True
        is_table = [record.key for record in records] != [name]
        content: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "runs": [as_run(record, name if is_table else None) for record in records],
            "table": as_table(name, records, labels, published or {}) if is_table else None,
        }
        for mode in dict.fromkeys((self.mode, "offline")):
            trouble = self._push({**content, "mode": mode})
            if not trouble:
                return mode == self.mode
            last = mode == "offline" or "not installed" in trouble
            instead = "`evodiff wandb push TABLE` can send the records later" if last else "writing offline"
            print(f"evodiff: W&B: {trouble}; {instead}", file=sys.stderr)
            if last:
                break
        return False

    def _push(self, content: dict[str, Any]) -> str | None:
        """None, or in a few words why it did not work."""
        if content["mode"] == "online" and offline():
            return "EVODIFF_OFFLINE is set"
        limit = self.timeout + PER_RUN * len(content["runs"])
        environment = os.environ | {"EVODIFF_RESULTS": str(results_folder())}
        if offline():
            environment["WANDB_ERROR_REPORTING"] = "false"  # wandb's own crash reports are sent in every mode
        try:
            done = subprocess.run(
                [sys.executable, "-m", "evodiff.dashboard"],
                input=json.dumps(content),
                capture_output=True,
                text=True,
                timeout=limit,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {limit:.0f} s"
        except OSError as e:
            return f"its process cannot be started ({e.strerror or e})"
        said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
        if done.returncode == 0:
            if done.stdout.strip():
                print(f"evodiff: W&B: {said[-1]}", file=sys.stderr)
            return None
        return said[-1] if said else f"its process ended with exit code {done.returncode}"


def as_run(record: "Record", table: str | None) -> dict[str, Any]:
    """What W&B shows of one record. Its id is the run's key, so that publishing again adds nothing.

    Its group is the table that was published last, and every table that it is in is a tag.
    """
    grid = results_folder() / "runs" / record.run["model"]["name"] / record.key / "grid.png"
    return {
        "id": record.key,
        "name": record.key,
        "group": table or record.run["model"]["name"],
        "tags": [table] if table else [],
        "job_type": record.run["solver"]["name"],
        "config": {**record.run, "protocol": record.protocol, "weights": record.weights, "versions": record.versions},
        "summary": {
            **record.metrics,
            "nfe": record.nfe,
            "network_passes": record.network_passes,
            "images": record.images,
            "images_per_second": images_per_second(record),
        },
        "grid": str(grid) if grid.exists() else None,
    }


def as_table(name: str, records: "Sequence[Record]", labels: Sequence[str] | None, published: Papers) -> dict[str, Any]:
    """A table's cells, one line for each record, and of each metric the curves against NFE, means over seeds."""
    labels = labels or [record.run["solver"]["name"] for record in records]
    metrics = list(dict.fromkeys(metric for record in records for metric in record.metrics))
    compared = {metric: papers for metric, papers in published.items() if any(papers.values())}
    lines = [
        [
            *(label, record.nfe, *map(record.metrics.get, metrics)),
            *(papers.get(label, {}).get(record.nfe) for papers in compared.values()),
            *(record.images, images_per_second(record), record.key),
        ]
        for label, record in zip(labels, records, strict=True)
    ]
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for metric in metrics:
        found: dict[str, dict[int, list[float]]] = {}
        for label, record in zip(labels, records, strict=True):
            if metric in record.metrics:
                found.setdefault(label, {}).setdefault(record.nfe, []).append(record.metrics[metric])
        means = {label: {nfe: statistics.fmean(at[nfe]) for nfe in at} for label, at in found.items()}
        papers = {f"{label} (published)": at for label, at in compared.get(metric, {}).items() if at}
        curves[metric] = {
            label: [sorted(at), [at[nfe] for nfe in sorted(at)]] for label, at in {**means, **papers}.items()
        }
    papers_of = [f"{metric} (published)" for metric in compared]
    columns = ["row", "nfe", *metrics, *papers_of, "images", "images_per_second", "key"]
    return {"name": name, "columns": columns, "lines": lines, "curves": curves}


def images_per_second(record: "Record") -> float | None:
    return round(record.images / record.seconds, 3) if record.seconds else None
