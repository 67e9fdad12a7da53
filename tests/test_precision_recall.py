import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evodiff.compat import import_torchvision
from evodiff.errors import MetricError
from evodiff.metrics import precision_recall as module
from evodiff.metrics.precision_recall import Coverage, precision_recall


def normal(n, d=3, seed=0, shift=0.0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) + shift


def by_definition(fake, real, k):
    def radius(points, i):
        return sorted((points[i] - p).norm().item() for p in points)[k]

    def inside(x, centres):
        return [(x - c).norm().item() <= radius(centres, i) for i, c in enumerate(centres)]

    in_real = [inside(x, real) for x in fake]
    in_fake = [inside(x, fake) for x in real]
    n, m = len(fake), len(real)
    return Coverage(
        sum(map(any, in_real)) / n,
        sum(map(any, in_fake)) / m,
        sum(map(sum, in_real)) / (k * n),
        sum(map(any, zip(*in_real, strict=True))) / m,
    )


@given(st.integers(5, 14), st.integers(5, 14), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_equals_the_definition(n, m, k, seed):
    fake, real = normal(n, seed=seed, shift=0.5), normal(m, seed=seed + 1)
    assert vars(precision_recall(fake, real, k)) == pytest.approx(vars(by_definition(fake, real, k)))


def test_blocks_of_any_size_give_the_same(monkeypatch):
    fake, real = normal(50, seed=1, shift=0.5), normal(41, seed=2)
    whole = precision_recall(fake, real)
    monkeypatch.setattr(module, "BLOCK_BYTES", 41 * 8 * 3)
    assert precision_recall(fake, real) == whole


def test_equal_sets_have_all_and_distant_sets_nothing():
    x = normal(60)
    same = precision_recall(x, x.clone())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    apart = precision_recall(x, x + 100)
    assert apart == Coverage(0, 0, 0, 0)


def test_one_mode_of_two_is_precise_and_has_no_recall_of_the_other():
    real = torch.cat([normal(100, seed=1), normal(100, seed=2, shift=50.0)])
    found = precision_recall(normal(100, seed=3), real)
    assert found.precision > 0.7 and found.recall < 0.5
    swapped = precision_recall(real, normal(100, seed=3))
    assert swapped.precision < 0.55 and swapped.recall > 0.7


def test_far_from_the_origin_float32_still_tells_points_apart():
    """Distances from inner products lose everything at |x| = 1e4 without centring."""
    fake, real = normal(80, seed=1, dtype=torch.float32), normal(80, seed=2, dtype=torch.float32)
    assert vars(precision_recall(fake + 1e4, real + 1e4)) == pytest.approx(vars(precision_recall(fake, real)), abs=0.05)


def test_equals_torch_fidelity():
    import_torchvision()
    from torch_fidelity.metric_prc import prc_features_to_metric

    fake, real = normal(200, 8, seed=1, shift=0.3), normal(220, 8, seed=2)
    expected = prc_features_to_metric(fake, real, verbose=False)
    found = precision_recall(fake, real)
    assert 0.2 < found.precision < 1 and 0.2 < found.recall < 1
    # torch-fidelity averages in float32
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)


def test_too_few_points_are_refused():
    with pytest.raises(MetricError, match="more than 3 images"):
        precision_recall(normal(3), normal(10))
