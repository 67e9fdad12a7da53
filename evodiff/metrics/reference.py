"""Reference statistics: the real images' side of a score, one npz with its provenance."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.files import whole_file
from evodiff.metrics.frechet import Gaussian
from evodiff.metrics.moments import Moments

FORMAT = "evodiff-reference-1"


@dataclass(frozen=True, eq=False)
class Reference:
    """Gaussian of the features of a real data set, optionally of its spatial features, and the features themselves.

    `provenance` says where it comes from: dataset, crop, resize, image_size, extractor, extractor_sha256, source ...
    """

    gaussian: Gaussian
    provenance: dict[str, Any] = field(default_factory=dict)
    spatial: Gaussian | None = None
    features: Tensor | None = None

    @property
    def dim(self) -> int:
        return len(self.gaussian.mean)

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {"mean": self.gaussian.mean.numpy(), "cov": self.gaussian.cov.numpy()}
        if self.spatial is not None:
            arrays |= {"spatial_mean": self.spatial.mean.numpy(), "spatial_cov": self.spatial.cov.numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        about = {"format": FORMAT, "count": self.gaussian.n, **self.provenance}
        with whole_file(path) as temporary:
            np.savez_compressed(temporary, provenance=json.dumps(about, sort_keys=True), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """This project's format, or a published one (see `_foreign`). Nothing is unpickled. Raises MetricError, naming
        the file, for one that is missing, unknown or not possible."""
        with _open(path) as file:
            if "provenance" not in file:
                return _foreign(path, file)
            about = json.loads(str(file["provenance"]))
            n = about.pop("count", None)
            if about.pop("format", None) != FORMAT:
                raise MetricError(f"{path} was written by another version of this format; expected {FORMAT}")
            spatial = None
            if "spatial_mean" in file:
                spatial = checked(path, file["spatial_mean"], file["spatial_cov"], n)
            features = torch.from_numpy(file["features"]) if "features" in file else None
            return cls(checked(path, file["mean"], file["cov"], n), about, spatial, features)


def _foreign(path: Path, file: Mapping[str, np.ndarray]) -> Reference:
    """mu, sigma (pytorch-fid, EDM, torch-fidelity), with mu_s, sigma_s (ADM); or pool_3 features of TF-GAN."""
    about: dict[str, Any] = {"source": path.name}
    if "pool_3" in file:
        features = torch.from_numpy(file["pool_3"]).float()
        if features.ndim != 2 or len(features) < 2:
            raise MetricError(f"{path}: pool_3 has shape {tuple(features.shape)}; expected [images, features]")
        return Reference(Gaussian.of(Moments.of(features)), {**about, "layout": "pool_3"}, features=features)
    if "mu" not in file or "sigma" not in file:
        raise MetricError(
            f"{path} holds {', '.join(sorted(file)[:5])}; reference statistics are mu and sigma, pool_3, or "
            f"a file written by `evodiff stats build`"
        )
    if ("mu_s" in file) != ("sigma_s" in file):
        raise MetricError(f"{path} has only one of mu_s and sigma_s, the mean and covariance of spatial features")
    spatial = checked(path, file["mu_s"], file["sigma_s"], None) if "mu_s" in file else None
    layout = "mu/sigma" if spatial is None else "mu/sigma/mu_s/sigma_s"
    return Reference(checked(path, file["mu"], file["sigma"], None), {**about, "layout": layout}, spatial)


@contextmanager
def _open(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an npz, each read when asked for (ADM's hold gigabytes of images), or of torch-fidelity's .pt."""
    if path.is_dir():
        raise MetricError(
            f"{path} is a folder, not statistics: `evodiff stats build {path} --protocol NAME` makes them"
        )
    if not path.is_file():
        raise MetricError(f"there is no reference file {path}; build, convert or fetch it first")
    try:
        if path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(_NUMPY_GLOBALS):
                file = torch.load(path, weights_only=True, map_location="cpu")
        else:
            with path.open("rb") as start:
                if start.read(1) == b"\x80":
                    raise MetricError(
                        f"{path} is a pickle, which is code and is not run. Where it is trusted, load it in Python and "
                        f"save what it has of one network: np.savez('statistics.npz', mu=..., sigma=...)"
                    )
            file = np.load(path)
        if not isinstance(file, Mapping):
            raise MetricError(f"{path} holds a {type(file).__name__}; reference statistics are arrays with names")
        with file if isinstance(file, np.lib.npyio.NpzFile) else nullcontext():
            yield file
    except MetricError:
        raise
    except Exception as e:  # what a damaged or foreign archive makes zipfile, zlib, numpy and torch raise has no end
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise MetricError(f"{path} cannot be read as reference statistics: {reason}") from e


_NUMPY_GLOBALS: list[Any] = [
    np.zeros(0).__reduce__()[0],
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]
"""What a pickled float array is made of; torch loads nothing else."""


def checked(path: Path, mean: np.ndarray, cov: np.ndarray, n: int | None) -> Gaussian:
    """A Gaussian in float64 that is one: finite, square, symmetric, positive semidefinite. Raises MetricError."""
    mean, cov = np.asarray(mean), np.asarray(cov)  # torch-fidelity keeps arrays; others keep tensors in a .pt
    what = f"{path}: mean {mean.shape}, covariance {cov.shape}"
    if any(array.dtype.kind not in "fiu" for array in (mean, cov)):
        raise MetricError(f"{what}: of {mean.dtype} and {cov.dtype}; expected real numbers")
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise MetricError(f"{what}: expected [d] and [d, d]")
    m, c = (torch.from_numpy(x.astype(np.float64)) for x in (mean, cov))
    if not (m.isfinite().all() and c.isfinite().all()):
        raise MetricError(f"{what}: holds NaN or inf")
    # at least the largest eigenvalue, to which the errors of float32 are in proportion; and the mean's, which Moments
    # takes out of a sum of squares
    rounding = 1e-6 * c.norm().item() + 1e-14 * m.square().sum().item()
    asymmetry = (c - c.T).abs().max().item()
    if asymmetry > rounding:
        raise MetricError(f"{what}: not symmetric (by {asymmetry:.1e}, where rounding explains {rounding:.1e})")
    # a factor of the slightly raised matrix exists if and only if no eigenvalue is below what rounding explains
    if rounding and torch.linalg.cholesky_ex(c + rounding * torch.eye(len(c), dtype=c.dtype)).info:
        raise MetricError(f"{what}: not positive semidefinite: a covariance has no eigenvalue below 0")
    if n is not None and n < 2:
        raise MetricError(f"{what}: estimated from {n} images; expected 2 or more")
    return Gaussian(m, (c + c.T) / 2, n)
