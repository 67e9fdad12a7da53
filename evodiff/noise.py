"""Random numbers: a sample is its seed, whatever the batch size, the shard or the number of devices."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import ConfigError


class Noise(Protocol):
    """The random numbers of one batch, one image per seed."""

    def latents(self, shape: Sequence[int]) -> Tensor:
        """Standard normal start of the sampler, [B, *shape], float32."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Fresh standard normal noise for a stochastic step, shape, dtype and device of `like`."""
        ...

    def labels(self, num_classes: int) -> Tensor:
        """One class per seed, int64 [B]."""
        ...


class SeededNoise:
    """One generator per sample, and another one for its label: neither can disturb the other.

    The latent of seed k is the first `torch.randn` after `torch.manual_seed(k)` on the CPU, as in EDM's
    generator.
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds = tuple(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def latents(self, shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators])

    def normal(self, like: Tensor) -> Tensor:
        return self.latents(like.shape[1:]).to(like.device, like.dtype)

    def labels(self, num_classes: int) -> Tensor:
        label_stream = 1
        draws = [np.random.default_rng([seed, label_stream]).integers(num_classes) for seed in self.seeds]
        return torch.tensor(draws, dtype=torch.int64)


class LegacyNoise:
    """Replays one global seed: `torch.manual_seed(seed)`, then batches of `batch` latents one after the other.

    The way of the released EVODiff and DPM-Solver-v3 scripts (seed 10, batches of 500). Image k is row
    k % batch of draw k // batch, so this works for any shard, at the cost of drawing what came before.
    """

    def __init__(self, seeds: Sequence[int], seed: int = 10, batch: int = 500):
        self.seeds, self.seed, self.batch = tuple(seeds), seed, batch

    def latents(self, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        wanted = {index: row for row, index in enumerate(self.seeds)}
        out = torch.empty(len(self.seeds), *shape)
        for first in range(0, max(self.seeds) + 1, self.batch):
            draw = torch.randn((self.batch, *shape), generator=generator)
            for index in range(first, first + self.batch):
                if index in wanted:
                    out[wanted[index]] = draw[index - first]
        return out

    def normal(self, like: Tensor) -> Tensor:
        raise ConfigError("noise=legacy replays start noise only: a stochastic solver needs noise=seeded")

    def labels(self, num_classes: int) -> Tensor:
        raise ConfigError("noise=legacy draws no labels: a class-conditional model needs noise=seeded")
