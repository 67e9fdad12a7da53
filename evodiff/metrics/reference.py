"""Reference statistics: the real images' side of a score, one npz with its provenance."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.files import whole_file
from evodiff.metrics.frechet import Gaussian

FORMAT = "evodiff-reference-1"


@dataclass(frozen=True, eq=False)
class Reference:
    """Gaussian of the features of a real data set, optionally of its spatial features, and the features themselves.

    `provenance` says where it comes from: dataset, crop, resize, image_size, count, extractor, extractor_sha256, source.
    """

    gaussian: Gaussian
    provenance: dict[str, Any] = field(default_factory=dict)
    spatial: Gaussian | None = None
    features: Tensor | None = None

    @property
    def dim(self) -> int:
        return len(self.gaussian.mean)

    def save(self, path: Path) -> None:
        arrays = {"mean": self.gaussian.mean.numpy(), "cov": self.gaussian.cov.numpy()}
        if self.spatial is not None:
            arrays |= {"spatial_mean": self.spatial.mean.numpy(), "spatial_cov": self.spatial.cov.numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        about = {"format": FORMAT, "count": self.gaussian.n, **self.provenance}
        with whole_file(path) as temporary:
            np.savez_compressed(temporary, provenance=json.dumps(about, sort_keys=True), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Raises MetricError, naming the file, for one that is missing, foreign or not possible."""
        arrays = read_npz(path)
        if "provenance" not in arrays:
            raise MetricError(
                f"{path} is not in this project's format (it holds {', '.join(sorted(arrays))}): "
                f"run `evodiff stats convert {path} OUT.npz` first"
            )
        about = json.loads(str(arrays["provenance"]))
        n = about.pop("count")
        if about.pop("format", None) != FORMAT:
            raise MetricError(f"{path} was written by another version of this format; expected {FORMAT}")
        spatial = None
        if "spatial_mean" in arrays:
            spatial = checked(path, arrays["spatial_mean"], arrays["spatial_cov"], n)
        features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
        return cls(checked(path, arrays["mean"], arrays["cov"], n), about, spatial, features)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz as data (nothing is unpickled). Raises MetricError naming the file."""
    if not path.is_file():
        raise MetricError(f"there is no reference file {path}; build, convert or fetch it first")
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as e:
        raise MetricError(f"{path} is no readable npz: {e}") from e


def checked(path: Path, mean: np.ndarray, cov: np.ndarray, n: int | None) -> Gaussian:
    """A Gaussian in float64 that is one: finite, square, symmetric, positive semidefinite. Raises MetricError."""
    what = f"{path}: mean {mean.shape}, covariance {cov.shape}"
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise MetricError(f"{what}: expected [d] and [d, d]")
    m, c = (torch.from_numpy(x.astype(np.float64)) for x in (mean, cov))
    if not (m.isfinite().all() and c.isfinite().all()):
        raise MetricError(f"{what}: holds NaN or inf")
    scale = c.diagonal().abs().max().item()
    asymmetry = (c - c.T).abs().max().item()
    if asymmetry > 1e-6 * scale:
        raise MetricError(f"{what}: not symmetric (by {asymmetry:.1e} of {scale:.1e})")
    lowest = torch.linalg.eigvalsh(c)[0].item() if torch.linalg.cholesky_ex(c).info else 0.0
    if lowest < -1e-6 * scale:
        raise MetricError(f"{what}: not positive semidefinite (lowest eigenvalue {lowest:.1e}, largest entry {scale:.1e})")
    if n is not None and n < 2:
        raise MetricError(f"{what}: estimated from {n} images; expected 2 or more")
    return Gaussian(m, (c + c.T) / 2, n)
