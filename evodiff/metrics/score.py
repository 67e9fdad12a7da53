"""From uint8 images to numbers, in one pass."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import ConfigError, MetricError
from evodiff.files import sha256
from evodiff.metrics.datasets import DATASETS
from evodiff.metrics.features import Extractor, Features, extractor
from evodiff.metrics.frechet import frechet_distance
from evodiff.metrics.inception_score import PARTS, inception_score
from evodiff.metrics.kid import SUBSET_SIZE, kid
from evodiff.metrics.moments import Moments
from evodiff.metrics.precision_recall import NEIGHBOURS, precision_recall
from evodiff.metrics.protocol import Protocol
from evodiff.metrics.reference import Reference
from evodiff.metrics.uncertainty import (
    LEAST_FOR_A_LIMIT,
    frechet_infinity,
    influence,
    least_for_a_limit,
    standard_error,
)
from evodiff.paths import CHECKPOINTS

METRICS = {
    "fid": "the Fréchet distance of the protocol",
    "sfid": "the same of spatial features (sfid)",
    "is": "Inception Score (is, is_std)",
    "kid": "Kernel Inception Distance (kid, kid_std)",
    "pr": "precision, recall, density, coverage",
    "curve": "fid of 5, 10, 25 and 50 thousand of the images, drawn by chance",
    "ci": "standard error of fid from this choice of images (fid_se)",
    "limit": "fid extrapolated to infinitely many images (fid_inf)",
}
AT_ONCE = 250
"""Images that the extractor sees at one time, of a run."""
CURVE = (5_000, 10_000, 25_000, 50_000)
RESULTS = {"pr": ("precision", "recall", "density", "coverage"), "ci": (), "limit": ("fid_inf",)}
"""What comes of a metric, beside its error, where that has another name."""
LEAST = {"is": PARTS, "kid": SUBSET_SIZE, "pr": NEIGHBOURS + 1, "curve": CURVE[0], "limit": LEAST_FOR_A_LIMIT}
"""Images that a metric needs, whatever the features; the others need 2."""
RESERVED = 100_000
_FROM_FEATURES = {"kid", "pr", "curve", "ci", "limit"}


def score(
    batches: Iterable[Tensor],
    protocol: Protocol,
    device: torch.device | str = "cpu",
    metrics: Sequence[str] = ("fid",),
    weights: Path | None = None,
) -> dict[str, float]:
    """Metrics (names in METRICS) of uint8 images [B, C, H, W] under `protocol`, each named with the number of images:
    {"fd_mnist@1000": 3.2}.

    The images are seen once and not kept; features are kept only for the metrics that need them. `weights` replaces the
    extractor's file of the registry. Raises MetricError for images, weights or a reference that the protocol does not
    allow, ConfigError for an unknown metric.
    """
    scorer = Scorer(protocol, str(device), metrics, weights)
    for images in batches:
        scorer.add(images)
    return scorer.result()


def score_moments(parts: Iterable[Moments], protocol: Protocol, reference: Reference | None = None) -> dict[str, float]:
    """The Fréchet distance of images whose moments were taken elsewhere, in any number of parts and any order, from the
    protocol's reference or another one.

    Raises MetricError for moments of features that another protocol takes, or of images of another size.
    """
    total = sum_of(parts)
    if not total.made_by.startswith(protocol.features):
        raise MetricError(
            f"the moments are of features by {total.made_by or 'an unknown network'}, but protocol {protocol.name} "
            f"takes {protocol.features}. Score with the protocol they were made for, or make them anew."
        )
    reference = reference or reference_of(protocol)
    _check_maker(reference, total.made_by.rpartition("=")[2], protocol)
    check_size(total.image_size, protocol, reference)
    return {protocol.key("fid", total.n): frechet_distance(total, reference.gaussian)}


def check_size(size: Sequence[int] | None, protocol: Protocol, reference: Reference) -> None:
    """Raise MetricError for images [width, height] of another size than the reference's, where both are known."""
    expected = reference.provenance.get("image_size")
    if size and expected and [*size] != [*expected]:
        raise MetricError(
            f"the images are {size[0]}x{size[1]}, but {protocol.reference} was made of {expected[0]}x{expected[1]} "
            f"ones ({protocol.dataset}): choose another protocol.dataset, or score images of that size"
        )


def result_names(metrics: Sequence[str], protocol: Protocol, n: int) -> set[str]:
    """What metrics (names in METRICS) of n images are called in a score, without their errors."""
    curve = [("fid", size) for size in CURVE if size <= n] if "curve" in metrics else []
    once = [(name, n) for metric in metrics if metric != "curve" for name in RESULTS.get(metric, (metric,))]
    return {protocol.key(name, size) for name, size in (*once, *curve)}


def sum_of(parts: Iterable[Moments]) -> Moments:
    """Raises MetricError if there is none, or if they are of different features."""
    total = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise MetricError("there are no moments to score")
    return total


class Scorer:
    """Takes images batch by batch, and scores what it has seen. `moments` is what other processes can add.

    A `reference` takes the place of the file that the protocol names."""

    def __init__(
        self,
        protocol: Protocol,
        device: str = "cpu",
        metrics: Sequence[str] = ("fid",),
        weights: Path | None = None,
        reference: Reference | None = None,
    ):
        if unknown := sorted(set(metrics) - METRICS.keys()):
            raise ConfigError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}")
        self.protocol, self.metrics = protocol, tuple(metrics)
        self.extract = extractor_of(protocol, device, weights)
        self.reference = reference or reference_of(protocol)
        if self.reference.dim != self.extract.dim:
            raise MetricError(
                f"{protocol.reference} has {self.reference.dim} features, but {protocol.extractor} gives "
                f"{self.extract.dim}: it belongs to another protocol than {protocol.name}"
            )
        _check_maker(self.reference, self.extract.sha256, protocol)
        self._check_reference()
        self.moments = Moments.zeros(self.extract.dim, protocol.features_by(self.extract.sha256))
        self.spatial: Moments | None = None
        self.features = Rows(protocol.n) if _FROM_FEATURES & set(metrics) else None
        self.logits = Rows(protocol.n) if "is" in metrics else None

    @property
    def needs(self) -> tuple[str, ...]:
        """Which fields of Features the metrics are taken from."""
        return ("features", *("logits",) * ("is" in self.metrics), *("spatial",) * ("sfid" in self.metrics))

    def extracted(self, images: Tensor) -> Features:
        """What the extractor says of uint8 images [B, C, H, W]. Raises MetricError unless they suit the protocol."""
        if images.ndim == 4:
            check_size(size := [images.shape[3], images.shape[2]], self.protocol, self.reference)
            self.moments.image_size = size
        return self.extract(images)

    def check_count(self, n: int) -> None:
        """Raise MetricError if a metric needs more than n images."""
        for name in self.metrics:
            least = least_for_a_limit(self.extract.dim) if name == "limit" else LEAST.get(name, 0)
            if n < least:
                raise MetricError(
                    f"metrics={name} needs at least {least} images, and there are {n}: score more, or leave {name} out"
                )

    def parts(self, images: Tensor) -> Iterator[Features]:
        """The same, AT_ONCE images at a time."""
        return map(self.extracted, images.split(AT_ONCE))

    def add(self, images: Tensor) -> None:
        self.add_features(self.extracted(images))

    def add_features(self, out: Features) -> None:
        """Of images whose features were taken before: with logits for `is`, with spatial ones for `sfid`."""
        self.moments.add(out.features)
        if "sfid" in self.metrics and out.spatial is not None:
            self.spatial = self.spatial or Moments.zeros(out.spatial.shape[1])
            self.spatial.add(out.spatial)
        if self.features is not None:
            self.features.add(out.features)
        if self.logits is not None and out.logits is not None:
            self.logits.add(out.logits)

    def result(self) -> dict[str, float]:
        self.check_count(self.moments.n)
        values: dict[str, float] = {}
        n, key = self.moments.n, self.protocol.key
        if "fid" in self.metrics:
            values[key("fid", n)] = frechet_distance(self.moments, self.reference.gaussian)
        if self.spatial is not None and self.reference.spatial is not None:
            values[key("sfid", n)] = frechet_distance(self.spatial, self.reference.spatial)
        if self.logits is not None:
            found = inception_score(self.logits.tensor, self.protocol.is_part)
            values |= zip((key("is", n), key("is_std", n)), found, strict=True)
        if self.features is not None:
            values |= self._from_features(self.features.tensor)
        return values

    def _from_features(self, features: Tensor) -> dict[str, float]:
        values: dict[str, float] = {}
        n, key, real = len(features), self.protocol.key, self.reference.features
        if "curve" in self.metrics:
            # images from elsewhere may be sorted, by class say: the first of them would be of a few classes
            order = torch.from_numpy(np.random.default_rng(0).permutation(n))
            for size in (size for size in CURVE if size <= n):
                values[key("fid", size)] = frechet_distance(Moments.of(features, order[:size]), self.reference.gaussian)
        if "ci" in self.metrics:
            values[key("fid_se", n)] = standard_error(influence(features, self.reference.gaussian))
        if "limit" in self.metrics:
            values[key("fid_inf", n)] = frechet_infinity(features, self.reference.gaussian)
        if "kid" in self.metrics and real is not None:
            values |= zip((key("kid", n), key("kid_std", n)), kid(features, real), strict=True)
        if "pr" in self.metrics and real is not None:
            found = precision_recall(features, real)
            values |= {key(name, n): value for name, value in vars(found).items()}
        return values

    def _check_reference(self) -> None:
        """What the metrics need beside mean and covariance must be in the reference, and in the extractor."""
        lacking = {
            "kid": self.reference.features is None,
            "pr": self.reference.features is None,
            "sfid": self.reference.spatial is None,
        }
        if asked := [name for name in self.metrics if lacking.get(name)]:
            raise MetricError(
                f"{self.protocol.reference} cannot serve {', '.join(asked)}: kid and pr need the features of the real "
                f"images, sfid their spatial moments. Build a reference with `evodiff stats build`, or leave them out."
            )
        real = self.reference.features
        for name in ("kid", "pr"):
            if name in self.metrics and real is not None and len(real) < LEAST[name]:
                raise MetricError(
                    f"metrics={name} needs the features of at least {LEAST[name]} real images, and "
                    f"{self.protocol.reference} has {len(real)}: build one of more images, or leave {name} out"
                )
        if "is" in self.metrics and not self.extract.classes:
            raise MetricError(f"{self.protocol.extractor} has no logits, so there is no Inception Score of it")


@dataclass
class Rows:
    """Rows added one batch after the other, in memory for `expected` rows from the start (it is used when written); for
    RESERVED at most, as what a protocol expects may be more than there will be."""

    expected: int
    _filled: int = 0
    _data: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def add(self, rows: Tensor) -> None:
        end = self._filled + len(rows)
        if end > len(self._data):
            room = max(end, min(self.expected, RESERVED), len(self._data) * 3 // 2)
            grown = torch.empty(room, rows.shape[1], dtype=rows.dtype)
            if self._filled:
                grown[: self._filled] = self.tensor
            self._data = grown
        self._data[self._filled : end] = rows
        self._filled = end

    @property
    def tensor(self) -> Tensor:
        return self._data[: self._filled]


def extractor_of(protocol: Protocol, device: str = "cpu", weights: Path | None = None) -> Extractor:
    """Built once; MetricError if its weights are not those the protocol names."""
    extract = extractor(protocol.extractor, device, protocol.resize, protocol.scaling, weights)
    _check_digest(f"weights of {protocol.extractor}", extract.sha256, protocol.extractor_sha256, protocol)
    return extract


def reference_path(protocol: Protocol) -> Path:
    """Where the reference file lies. Raises MetricError or ConfigError, saying how to get it, if it is not here."""
    path = CHECKPOINTS / protocol.reference
    if path.exists():
        return path
    if path.suffix:
        named = [name for name in (path.stem, protocol.dataset) if name in ("mnist", *DATASETS)]
        raise MetricError(
            f"there is no reference file {path}: make it with `evodiff stats build {(*named, 'IMAGES')[0]} --protocol "
            f"{protocol.name} --out {path}`, or set protocol.reference to another"
        )
    from evodiff.checkpoints import require

    return require(protocol.reference)


def files_used(protocol: Protocol, device: str = "cpu", weights: Path | None = None) -> dict[str, str]:
    """sha256 in full of what a score depends on: for the record, where the protocol knows less than that."""
    extract = extractor_of(protocol, device, weights)
    return {"extractor": extract.sha256, "reference": sha256(reference_path(protocol))}


def files_left_open(protocol: Protocol, device: str = "cpu") -> dict[str, str]:
    """sha256 in full of those files that the protocol names without saying what they must be."""
    found = {}
    if protocol.extractor_sha256 is None:
        found["extractor"] = extractor_of(protocol, device).sha256
    if protocol.reference_sha256 is None:
        found["reference"] = sha256(reference_path(protocol))
    return found


def scored_by(protocol: Protocol) -> str:
    """The hash of a protocol, which goes on with the sha256 of each file that it leaves open."""
    return "-".join([protocol.hash, *(digest[:8] for digest in files_left_open(protocol).values())])


@cache
def reference_of(protocol: Protocol) -> Reference:
    """Loaded once, so that its covariance is factored once. MetricError if it is another file than the protocol names,
    or was made by another extractor."""
    path = reference_path(protocol)
    reference = Reference.load(path)
    _check_digest(str(path), sha256(path), protocol.reference_sha256, protocol)
    made_by = reference.provenance.get("extractor_sha256")
    _check_digest(f"extractor that made {path}", made_by, protocol.extractor_sha256, protocol)
    for part in ("resize", "scaling"):
        made_with = reference.provenance.get(f"extractor_{part}", getattr(protocol, part))
        if made_with != getattr(protocol, part):
            raise MetricError(
                f"{path} was made with {part}={made_with}, but protocol {protocol.name} has {getattr(protocol, part)}"
            )
    return reference


def _check_maker(reference: Reference, extractor_sha256: str, protocol: Protocol) -> None:
    """Raise MetricError for a reference made by another extractor than the one in use, as far as it is known."""
    made_by = reference.provenance.get("extractor_sha256")
    if made_by and made_by != extractor_sha256:
        raise MetricError(
            f"{protocol.reference} was made by another {protocol.extractor} (sha256 {made_by[:16]}...) than the one of "
            f"the images ({extractor_sha256[:16]}...): make both with the same weights"
        )


def _check_digest(what: str, found: str | None, expected: str | None, protocol: Protocol) -> None:
    """Digests may be given by their leading digits; None on either side is not checked."""
    if found and expected and not (found.startswith(expected) or expected.startswith(found)):
        raise MetricError(
            f"{what}: sha256 {found[:16]}..., but protocol {protocol.name} expects {expected[:16]}...; "
            f"fetch the published file or choose the protocol it belongs to"
        )
