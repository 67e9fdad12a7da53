"""A sample is its seed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from evodiff import noise as noise_module
from evodiff.errors import ConfigError
from evodiff.noise import LegacyNoise, SeededNoise

SHAPE = (1, 4, 4)


def test_a_seed_does_not_depend_on_its_batch():
    together = SeededNoise(range(10)).latents(SHAPE)
    parts = torch.cat([SeededNoise(range(a, b)).latents(SHAPE) for a, b in ((0, 3), (3, 4), (4, 10))])
    assert torch.equal(together, parts)


def test_a_seed_is_torchs_own():
    torch.manual_seed(7)
    assert torch.equal(SeededNoise([7]).latents(SHAPE)[0], torch.randn(SHAPE))


@pytest.mark.parametrize("make", [lambda: SeededNoise([3, 4]), lambda: LegacyNoise([3, 7], batch=5)])
def test_numbers_do_not_depend_on_torchs_defaults(make, monkeypatch):
    monkeypatch.setattr(noise_module, "_draws", noise_module._Draws)  # nothing is remembered
    expected = make().latents(SHAPE)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = make().latents(SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_labels_have_their_own_stream():
    """Drawing labels changes no noise, and noise no labels; labels reach every class."""
    quiet, drawn = SeededNoise(range(50)), SeededNoise(range(50))
    labels = drawn.labels(10)
    assert torch.equal(quiet.latents(SHAPE), drawn.latents(SHAPE))
    assert torch.equal(quiet.labels(10), labels)
    assert set(labels.tolist()) == set(range(10))


def test_fresh_noise_is_fresh_and_repeatable():
    x = torch.zeros(2, *SHAPE, dtype=torch.float64)
    a, b = SeededNoise([1, 2]), SeededNoise([1, 2])
    first, second = a.normal(x), a.normal(x)
    assert not torch.equal(first, second)
    assert first.dtype == x.dtype
    assert torch.equal(first, b.normal(x))


def test_each_image_goes_on_with_its_own_stream():
    """The start is the first of it, and what is drawn ahead changes no number."""
    x = torch.zeros(3, *SHAPE, dtype=torch.float64)
    started, unasked = SeededNoise(range(3)), SeededNoise(range(3))
    started.latents(SHAPE)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    stream = [torch.stack([torch.randn(SHAPE, generator=g) for g in generators]) for _ in range(6)]
    for noise in (started, unasked):
        assert all(torch.equal(noise.normal(x), fresh.double()) for fresh in stream[1:])
        assert torch.equal(noise.latents(SHAPE), stream[0])


def test_legacy_replays_one_global_seed_in_batches():
    torch.manual_seed(10)
    stream = torch.cat([torch.randn(5, *SHAPE) for _ in range(3)])
    for seeds in (range(15), range(4, 11), [12, 3]):
        assert torch.equal(LegacyNoise(seeds, seed=10, batch=5).latents(SHAPE), stream[list(seeds)])


def test_legacy_draws_the_same_on_several_threads():
    """A run draws its next batch beside the one that is sampled."""
    batches = [range(first, first + 10) for first in range(0, 400, 10)]
    shape = (1, 32, 32)
    alone = [LegacyNoise(seeds, seed=4, batch=16).latents(shape) for seeds in batches]
    with ThreadPoolExecutor(8) as threads:
        together = threads.map(lambda seeds: LegacyNoise(seeds, seed=4, batch=16).latents(shape), batches * 3)
    assert all(torch.equal(a, b) for a, b in zip(alone * 3, together, strict=True))


def test_legacy_has_no_noise_for_stochastic_solvers_nor_labels():
    with pytest.raises(ConfigError, match="noise=seeded"):
        LegacyNoise([0]).normal(torch.zeros(1, *SHAPE))
    with pytest.raises(ConfigError, match="noise=seeded"):
        LegacyNoise([0]).labels(10)


@pytest.mark.parametrize("noise", [SeededNoise([3, 4]), LegacyNoise([3, 7], batch=5)])
def test_the_start_is_the_same_when_asked_again(noise):
    """And is not drawn again, when the generators have gone on."""
    assert noise.latents(SHAPE) is noise.latents(SHAPE)


def test_legacy_draws_nothing_twice_in_rising_order(monkeypatch):
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(a) or randn(*a, **k))
    for first in range(0, 40, 4):
        LegacyNoise(range(first, first + 4), seed=99, batch=8).latents(SHAPE)
    assert len(drawn) == 5


def test_no_seeds_are_refused():
    with pytest.raises(ConfigError, match="there are no seeds"):
        SeededNoise([])
