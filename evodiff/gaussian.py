"""The Gaussian with the mean and covariance of a data set, for `Teleport`."""

import numpy as np
import torch
from torch import Tensor

from evodiff.data import mnist_digits
from evodiff.errors import ConfigError
from evodiff.paths import resolve
from evodiff.solvers.teleport import Gaussian


def fit(images: Tensor) -> Gaussian:
    """From uint8 images [N, C, H, W] as models see them, in [-1, 1]."""
    x = images.double() / 127.5 - 1
    mean = x.mean(0)
    z = (x - mean).flatten(1)
    return from_covariance(mean, z.T @ z / (len(z) - 1))


def from_covariance(mean: Tensor, cov: Tensor) -> Gaussian:
    """mean [C, H, W], cov [C H W, C H W]."""
    variances, axes = torch.linalg.eigh(cov)
    return Gaussian(mean, axes.T.contiguous(), variances.clamp(min=0))


def digits() -> Gaussian:
    """Of the shipped MNIST digits, for mnist_tiny."""
    return fit(mnist_digits()[0])


def load(path: str) -> Gaussian:
    """From an .npz with `mean` [C, H, W] and `cov` [C H W, C H W] of images in [-1, 1]. Raises ConfigError."""
    try:
        with np.load(resolve(path)) as content:
            mean, cov = (torch.from_numpy(content[key]).double() for key in ("mean", "cov"))
    except Exception as e:  # what a damaged or foreign file makes numpy, zipfile and zlib raise has no end
        raise ConfigError(f"gaussian.path={path}: {e}. Expected an .npz with mean [C, H, W] and cov.") from e
    if mean.ndim != 3 or cov.shape != (mean.numel(), mean.numel()):
        raise ConfigError(f"gaussian.path={path}: mean {tuple(mean.shape)} and cov {tuple(cov.shape)} do not fit")
    if not bool(mean.isfinite().all() and cov.isfinite().all()):
        raise ConfigError(f"gaussian.path={path}: mean or cov holds NaN or infinite numbers; compute them again")
    return from_covariance(mean, cov)
