"""What is written down of a finished run, and what is measured on its states."""

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evodiff.errors import StoreError
from evodiff.files import whole_file
from evodiff.metrics.distances import project, wasserstein_of_columns
from evodiff.store import SampleStore


@dataclass(frozen=True)
class Record:
    """score.json: everything needed to repeat one cell and to judge it.

    `asked` are the metrics that were asked for, `files` the sha256 of extractor and reference in full.
    """

    key: str
    run: dict[str, Any]
    protocol: dict[str, Any] | None
    metrics: dict[str, float]
    nfe: int
    network_passes: int
    images: int
    seconds: float
    weights: dict[str, str]
    shards: dict[str, str]
    reference_run: str | None
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises StoreError for a file that is no record, or one of another version of this project."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as e:
            raise StoreError(f"{path} cannot be read as a record ({e}). Remove it: it is made anew by scoring.") from e

    def write(self, path: Path) -> None:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")


def rmse(store: SampleStore, reference: SampleStore, of: str = "x") -> float:
    """Root mean square of x - x_ref over all samples and pixels of the same seeds, x in [-1, 1] and beyond."""
    total, count = 0.0, 0
    pairs = (recut(s.batches("seeds", of)) for s in (store, reference))
    for (seeds, x), (ref_seeds, ref) in zip(*pairs, strict=True):
        assert np.array_equal(seeds, ref_seeds)
        total += float(((x.astype(np.float64) - ref) ** 2).sum())
        count += x.size
    return float(np.sqrt(total / count))


def rmse_images(store: SampleStore, reference: SampleStore) -> float:
    """The same of the images, in the same units: what lies beyond [-1, 1] is clipped, and grey levels are rounded,
    which alone makes up to 0.003."""
    return rmse(store, reference, of="images") / 127.5


def sliced_wasserstein(store: SampleStore, reference: SampleStore) -> float:
    """Sliced 2-Wasserstein distance between the states of two runs, x in [-1, 1] before rounding."""
    a, b = (torch.cat([project(torch.from_numpy(x)) for (x,) in s.batches("x")]) for s in (store, reference))
    return wasserstein_of_columns(a, b)


def contrast(images: np.ndarray) -> np.ndarray:
    """Standard deviation of each image's pixels, in grey levels: uint8 [N, C, H, W] -> [N]."""
    return images.reshape(len(images), -1).std(axis=1, dtype=np.float64)


def saturated(images: np.ndarray) -> np.ndarray:
    """Share of each image's values that are 0 or 255, where ends what lies beyond the range: [N, C, H, W] -> [N]."""
    return ((images == 0) | (images == 255)).mean((1, 2, 3))


AGAINST_REFERENCE: dict[str, Callable[[SampleStore, SampleStore], float]] = {
    "rmse": rmse,
    "rmse_images": rmse_images,
    "sw": sliced_wasserstein,
}
"""Distances of the states, or the images, to those of the reference run, which both have to keep."""
OF_IMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"contrast": contrast, "saturated": saturated}
"""What describes images and is neither good nor bad; of a run, the mean."""


def recut(parts: Iterator[tuple[np.ndarray, ...]], size: int = 500) -> Iterator[tuple[np.ndarray, ...]]:
    """The same rows in tuples of `size` rows, whatever the shards they lie in."""
    held: tuple[np.ndarray, ...] | None = None
    for part in parts:
        held = part if held is None else tuple(map(np.concatenate, zip(held, part, strict=True)))
        while len(held[0]) >= size:
            yield tuple(a[:size] for a in held)
            held = tuple(a[size:] for a in held)
    if held is not None and len(held[0]):
        yield held


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("evodiff", "torch", "numpy")}
