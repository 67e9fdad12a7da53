"""Sums over feature vectors from which mean and covariance follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import MetricError
from evodiff.files import whole_file

ROWS = 4096
"""Converted to float64 at one time."""


@dataclass
class Moments:
    """n vectors of dimension d, their sum `total` [d] and the sum of their outer products `outer` [d, d], in float64.

    Moments of parts add up to the moments of the whole, in any order and grouping, to rounding. Taking the mean out at
    the end costs digits when it is large: the relative error of `cov` is about 1e-16 mean^2 / variance.
    `made_by` says by what the vectors were made (Protocol.features), `image_size` of what images, [width, height]; only
    those of one kind add up, as far as it is known.
    """

    n: int
    total: Tensor
    outer: Tensor
    made_by: str = ""
    image_size: list[int] | None = None

    @classmethod
    def zeros(cls, dim: int, made_by: str = "") -> Self:
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64), made_by)

    @classmethod
    def of(cls, features: Tensor, rows: Tensor | None = None) -> Self:
        """Moments of features [n, d], or of some `rows` of them, by number, without a copy of these."""
        moments = cls.zeros(features.shape[1])
        for part in (features,) if rows is None else (features[some] for some in rows.split(ROWS)):
            moments.add(part)
        return moments

    @property
    def dim(self) -> int:
        return len(self.total)

    def add(self, features: Tensor) -> None:
        """Take in features [B, d] of any float type. Raises MetricError on another dimension, or on NaN and inf."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise MetricError(f"features of shape {tuple(features.shape)} do not fit moments of dimension {self.dim}")
        finite = features.isfinite().all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise MetricError(
                f"the features of image {self.n + row} (counted from 0) are not finite: look at that image and at the "
                f"precision of the extractor"
            )
        for part in features.split(ROWS):
            # products of float32 numbers are exact in float64; summed in float32 they lose the small eigenvalues
            wide = part.to("cpu", torch.float64)
            self.n += len(wide)
            self.total += wide.sum(0)
            self.outer.addmm_(wide.T, wide)

    def __add__(self, other: Moments) -> Moments:
        if other.dim != self.dim:
            raise MetricError(f"moments of dimension {self.dim} and {other.dim} cannot be added")
        if other.made_by != self.made_by:
            raise MetricError(f"moments of {self.made_by} and of {other.made_by} cannot be added")
        sizes = [size for size in (self.image_size, other.image_size) if size]
        if sizes[:1] != sizes[-1:]:
            raise MetricError("moments of {}x{} and of {}x{} images cannot be added".format(*sizes[0], *sizes[1]))
        total, outer = self.total + other.total, self.outer + other.outer
        return Moments(self.n + other.n, total, outer, self.made_by, sizes[0] if sizes else None)

    @property
    def mean(self) -> Tensor:
        """[d]."""
        if self.n < 1:
            raise MetricError("no images were scored, so there is no mean: give at least 2")
        return self.total / self.n

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance [d, d]."""
        if self.n < 2:
            raise MetricError(f"a covariance needs at least 2 images, and there is {self.n}")
        mean = self.mean
        cov = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return (cov + cov.T) / 2

    def save(self, path: Path) -> None:
        """Write one npz, whole or not at all."""
        total, outer, size = self.total.numpy(), self.outer.numpy(), np.array(self.image_size or [], dtype=int)
        with whole_file(path) as temporary:
            np.savez(temporary, n=self.n, total=total, outer=outer, made_by=self.made_by, image_size=size)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises MetricError for any other file."""
        try:
            with np.load(path) as file:
                n, total, outer = int(file["n"]), torch.from_numpy(file["total"]), torch.from_numpy(file["outer"])
                made_by = str(file["made_by"])
                size = file["image_size"].tolist() if "image_size" in file else None  # older files do not say it
        except Exception as e:  # as of images in an npz: of a damaged one what is raised has no end
            raise MetricError(f"{path} holds no moments ({e}); expected an npz with n, total, outer, made_by") from e
        if total.ndim != 1 or outer.shape != (len(total), len(total)) or total.dtype != torch.float64:
            raise MetricError(f"{path} holds no moments: total {tuple(total.shape)}, outer {tuple(outer.shape)}")
        return cls(n, total, outer, made_by, size or None)
