"""Random numbers: a sample is its seed, whatever the batch size, the shard or the number of devices."""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import repeat
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evodiff.background import one_ahead
from evodiff.errors import ConfigError


def normal32(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The next standard normal numbers of a generator of the CPU, whatever torch's defaults are set to."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


class Noise(Protocol):
    """The random numbers of one batch, one image per seed."""

    def latents(self, shape: Sequence[int]) -> Tensor:
        """Standard normal start of the sampler, [B, *shape], float32; the same when asked again."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Fresh standard normal noise for a stochastic step, shape, dtype and device of `like`."""
        ...

    def labels(self, num_classes: int) -> Tensor:
        """One class per seed, int64 [B]."""
        ...


class SeededNoise:
    """One generator per sample, and another one for its label: neither can disturb the other.

    The latent of seed k is the first `torch.randn` after `torch.manual_seed(k)` on the CPU. EDM's generators work alike
    but on its device, and a GPU draws other numbers.
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds = tuple(seeds)
        if not self.seeds:
            raise ConfigError("there are no seeds, so no images to make; give one for each, like range(16).")
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        self._start: Tensor | None = None
        self._fresh: Iterator[Tensor] | None = None

    def latents(self, shape: Sequence[int]) -> Tensor:
        if self._start is None:
            self._start = self._draw(shape)
        return self._start

    def normal(self, like: Tensor) -> Tensor:
        if self._fresh is None:
            self.latents(like.shape[1:])  # is the first of every stream, also where a caller has another start
            draw = partial(self._draw, pinned=like.is_cuda)
            self._fresh = one_ahead(draw, repeat(like.shape[1:]))  # the next while the network works on this one
        return next(self._fresh).to(like.device, non_blocking=like.is_cuda).to(like.dtype)

    def _draw(self, shape: Sequence[int], pinned: bool = False) -> Tensor:
        drawn = torch.stack([normal32(shape, g) for g in self.generators])
        return drawn.pin_memory() if pinned else drawn  # from there a copy to the device does not wait

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
        self._start: Tensor | None = None

    def latents(self, shape: Sequence[int]) -> Tensor:
        if self._start is None:
            draws = _draws(self.seed, (self.batch, *shape))
            self._start = torch.stack([draws[index // self.batch][index % self.batch] for index in self.seeds])
        return self._start

    def normal(self, like: Tensor) -> Tensor:
        raise ConfigError("noise=legacy replays start noise only: a stochastic solver needs noise=seeded")

    def labels(self, num_classes: int) -> Tensor:
        raise ConfigError("noise=legacy draws no labels: a class-conditional model needs noise=seeded")


class _Draws:
    """draws[k] is the k-th `torch.randn(shape)` after `torch.manual_seed(seed)`; in rising order each is drawn once."""

    def __init__(self, seed: int, shape: tuple[int, ...]):
        self.seed, self.shape = seed, shape
        self.index, self.last = -1, torch.empty(0)
        self.lock = Lock()

    def __getitem__(self, k: int) -> Tensor:
        with self.lock:  # the next batch is drawn on another thread
            if k < self.index or self.index < 0:
                self.generator, self.index = torch.Generator("cpu").manual_seed(self.seed), -1
            while self.index < k:
                self.last = normal32(self.shape, self.generator)
                self.index += 1
            return self.last


@cache
def _draws(seed: int, shape: tuple[int, ...]) -> _Draws:
    return _Draws(seed, shape)
