"""How much of a solver's score is contrast: its distance after the best single gain on its output.

A solver that overshoots widens the spread of pixels, and where a model's own samples are too flat that alone lowers a
Fréchet distance. So every cell is scored again as g x before clipping, with the gain g that is best for it, chosen on
other seeds than it is reported on.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch

from evodiff.errors import ConfigError
from evodiff.files import whole_file
from evodiff.metrics.distances import recut
from evodiff.metrics.protocol import Protocol
from evodiff.metrics.score import score, scored_by
from evodiff.sampling import to_uint8
from evodiff.store import SampleStore

GAINS = tuple(round(0.9 + 0.025 * i, 3) for i in range(17))
"""0.9 to 1.3."""
STEP = 1.1
"""Between gains beyond those."""


@dataclass(frozen=True)
class Matched:
    """Distances of the reported half of the seeds, of so many images: as they are, with the best of GAINS, tuned on the
    other half, and with the best gain of any size."""

    images: int
    plain: float
    gain: float
    matched: float
    free_gain: float
    free: float


def read_matched(path: Path, protocol: Protocol | None) -> dict[str, Matched]:
    """What matched.csv has of this protocol and its reference, by the run's key; nothing if it is not there."""
    if protocol is None or not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            line["run"]: Matched(int(line["images"]), *(float(line[field.name]) for field in fields(Matched)[1:]))
            for line in csv.DictReader(file)
            if line.get("protocol") == scored_by(protocol)
        }


def write_matched(path: Path, cells: Mapping[tuple[str, int, str], Matched], protocol: Protocol) -> None:
    """matched.csv from (row, NFE, the run's key)."""
    names = ["solver", "nfe", *(field.name for field in fields(Matched)), "run", "protocol"]
    lines = [[row, nfe, *astuple(cell), key, scored_by(protocol)] for (row, nfe, key), cell in cells.items()]
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([names, *lines])


def contrast_matched(
    store: SampleStore, protocol: Protocol, device: str = "cpu", tuned_on: int = 2500, gains: Sequence[float] = GAINS
) -> Matched:
    """The gain is tuned on the first `tuned_on` seeds, at most half of them, and reported on the second half.

    Raises StoreError for a run that has not kept its states, ConfigError for one of fewer than 4 images.
    """
    half = len(store.seeds) // 2
    if half < 2:
        raise ConfigError(f"{store.folder} has {len(store.seeds)} images; tuning and reporting need 2 each, so 4")
    x = [part for (part,) in recut(store.batches("x"))]

    @cache
    def distance(rows: range, gain: float) -> float:
        images = (to_uint8(gain * torch.from_numpy(part), protocol.rounding) for part in _rows(x, rows))
        return next(iter(score(images, protocol, device).values()))

    tuning, reported = range(min(tuned_on, half)), range(half, len(store.seeds))
    gain = min(gains, key=lambda g: distance(tuning, g))
    free = outward(gain, gains, lambda g: distance(tuning, g))
    plain, matched, freely = (distance(reported, g) for g in (1.0, gain, free))
    return Matched(len(reported), plain, gain, matched, free, freely)


def outward(gain: float, gains: Sequence[float], distance: Callable[[float], float]) -> float:
    """The best gain of any size: where it is the least or the largest of `gains`, steps go on until nothing is won."""
    if min(gains) < gain < max(gains):
        return gain
    step = STEP if gain == max(gains) else 1 / STEP
    while distance(gain * step) < distance(gain):
        gain *= step
    return gain


def _rows(parts: Iterable[np.ndarray], rows: range) -> Iterable[np.ndarray]:
    first = 0
    for part in parts:
        piece = part[max(0, rows.start - first) : max(0, rows.stop - first)]
        if len(piece):
            yield piece
        first += len(part)
