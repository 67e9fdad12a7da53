"""From uint8 images to numbers, in one pass."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.files import sha256
from evodiff.metrics.features import Extractor, extractor
from evodiff.metrics.frechet import frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import Protocol
from evodiff.metrics.reference import Reference
from evodiff.paths import CHECKPOINTS


def score(batches: Iterable[Tensor], protocol: Protocol, device: torch.device | str = "cpu") -> dict[str, float]:
    """Metrics of uint8 images [B, C, H, W] under `protocol`, named with their number: {"fd_mnist@1000": 3.2}.

    The images are seen once and not kept. Raises MetricError for images, weights or a reference that the protocol does
    not allow.
    """
    extract = extractor_of(protocol, str(device))
    reference = reference_of(protocol)
    moments = Moments.zeros(extract.dim)
    for images in batches:
        moments.add(extract(images).features)
    return {f"{protocol.metric}@{moments.n}": frechet_distance(moments, reference.gaussian)}


def extractor_of(protocol: Protocol, device: str = "cpu") -> Extractor:
    """Built once; MetricError if its weights are not those the protocol names."""
    extract = extractor(protocol.extractor, device)
    _check_digest("weights of " + protocol.extractor, extract.sha256, protocol.extractor_sha256, protocol)
    return extract


@cache
def reference_of(protocol: Protocol) -> Reference:
    """Loaded once, so that its covariance is factored once. MetricError if it is another file than the protocol names,
    or was made by another extractor."""
    path = CHECKPOINTS / protocol.reference
    reference = Reference.load(path)
    _check_digest(str(path), sha256(path), protocol.reference_sha256, protocol)
    made_by = reference.provenance.get("extractor_sha256")
    _check_digest(f"extractor that made {path}", made_by, protocol.extractor_sha256, protocol)
    return reference


def _check_digest(what: str, found: str | None, expected: str | None, protocol: Protocol) -> None:
    """Digests may be given by their leading digits; None on either side is not checked."""
    if found and expected and not (found.startswith(expected) or expected.startswith(found)):
        raise MetricError(
            f"{what}: sha256 {found[:16]}..., but protocol {protocol.name} expects {expected[:16]}...; "
            f"fetch the published file or choose the protocol it belongs to"
        )
