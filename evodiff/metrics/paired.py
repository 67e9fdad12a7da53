"""How well the difference of two runs on the same seeds is known: they share their noise, and most scatter cancels."""

import csv
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from evodiff.files import whole_file
from evodiff.metrics.frechet import frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import Protocol
from evodiff.metrics.score import AT_ONCE, extractor_of, reference_of, scored_by
from evodiff.metrics.uncertainty import influence, standard_error
from evodiff.store import SampleStore


@dataclass(frozen=True)
class Scored:
    """The distance of a run, and the influence [n] of each of its images on it."""

    distance: float
    influence: Tensor


@dataclass(frozen=True)
class Paired:
    """A run's distance less that of another one, and the standard error of this difference."""

    difference: float
    standard_error: float


def scored(store: SampleStore, protocol: Protocol, device: str = "cpu") -> Scored:
    """Of a complete run that keeps its images."""
    extract, reference = extractor_of(protocol, device), reference_of(protocol).gaussian
    parts = (part for (images,) in store.batches("images") for part in torch.from_numpy(images).split(AT_ONCE))
    features = torch.cat([extract(part).features for part in parts])
    return Scored(frechet_distance(Moments.of(features), reference), influence(features, reference))


def paired(run: Scored, other: Scored) -> Paired:
    """Both of the same seeds."""
    return Paired(run.distance - other.distance, standard_error(run.influence - other.influence))


def read_paired(path: Path, protocol: Protocol | None) -> dict[tuple[str, str], Paired]:
    """What paired.csv has of this protocol and its reference, by the keys of both runs; nothing if it is not there."""
    if protocol is None or not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (line["run"], line["other"]): Paired(*(float(line[field.name]) for field in fields(Paired)))
            for line in csv.DictReader(file)
            if line.get("protocol") == scored_by(protocol)
        }


def write_paired(path: Path, found: Mapping[tuple[str, str], Paired], protocol: Protocol) -> None:
    """paired.csv from what `read_paired` gives."""
    lines = [[run, other, *astuple(pair), scored_by(protocol)] for (run, other), pair in found.items()]
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([["run", "other", *(field.name for field in fields(Paired)), "protocol"], *lines])
