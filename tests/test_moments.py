import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evodiff.errors import MetricError
from evodiff.metrics.moments import Moments


def features(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def close(a: Moments, b: Moments) -> bool:
    return a.n == b.n and torch.allclose(a.total, b.total, rtol=1e-12) and torch.allclose(a.outer, b.outer, rtol=1e-12)


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**31), st.data())
@settings(deadline=None, max_examples=60)
def test_any_partition_in_any_order_sums_to_the_whole(n, d, seed, data):
    x = features(n, d, seed, shift=3.0)
    part_of = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    order = data.draw(st.permutations(range(4)))
    total = Moments.zeros(d)
    for part in order:
        total = total + Moments.of(x[part_of == part])
    assert close(total, Moments.of(x))


def test_streaming_equals_the_whole_and_numpy():
    x = features(500, 7, shift=2.0)
    streamed = Moments.zeros(7)
    for batch in x.split(33):
        streamed.add(batch)
    assert close(streamed, Moments.of(x))
    np.testing.assert_allclose(streamed.mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_covariance_is_unbiased_not_divided_by_n():
    # the mean over all samples of size 2 of {0, 1} is the variance 1/4 only with division by n - 1
    pairs = [Moments.of(torch.tensor([[float(a)], [float(b)]])) for a in (0, 1) for b in (0, 1)]
    assert np.mean([p.cov.item() for p in pairs]) == pytest.approx(0.25)
    biased = np.mean([(p.outer / p.n - torch.outer(p.mean, p.mean)).item() for p in pairs])
    assert biased != pytest.approx(0.25)


def test_sums_are_kept_in_float64():
    """Small variance beside a large mean: float32 sums lose it, float64 ones do not."""
    x = features(4000, 3, shift=300.0) * 0.01
    exact = np.cov(x.double().numpy(), rowvar=False)
    ours = Moments.of(x).cov
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-12)
    outer, mean = x.T @ x, x.sum(0) / len(x)
    in_float32 = (outer - len(x) * torch.outer(mean, mean)) / (len(x) - 1)
    assert np.abs(in_float32.numpy() - exact).max() > 1e-2 * np.abs(exact).max()


def test_covariance_is_exactly_symmetric():
    cov = Moments.of(features(50, 20)).cov
    assert torch.equal(cov, cov.T)


def test_saved_and_loaded(tmp_path):
    moments = Moments.of(features(10, 4))
    moments.save(tmp_path / "shard.npz")
    loaded = Moments.load(tmp_path / "shard.npz")
    assert loaded.n == 10 and torch.equal(loaded.total, moments.total) and torch.equal(loaded.outer, moments.outer)
    assert [p.name for p in tmp_path.iterdir()] == ["shard.npz"]


def test_the_size_of_the_images_is_kept_and_must_agree(tmp_path):
    small, large, unknown = (Moments.of(features(10, 4)) for _ in range(3))
    small.image_size, large.image_size = [32, 32], [64, 48]
    small.save(tmp_path / "small.npz")
    assert Moments.load(tmp_path / "small.npz").image_size == [32, 32]
    assert (unknown + small).image_size == (small + unknown).image_size == [32, 32]
    with pytest.raises(MetricError, match="moments of 32x32 and of 64x48 images cannot be added"):
        small + large
    np.savez(tmp_path / "old.npz", n=2, total=np.zeros(4), outer=np.eye(4), made_by="before sizes were kept")
    assert Moments.load(tmp_path / "old.npz").image_size is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_by_number(value):
    moments = Moments.of(features(5, 3))
    bad = features(4, 3)
    bad[2, 1] = value
    with pytest.raises(MetricError, match="image 7"):
        moments.add(bad)
    assert moments.n == 5


def test_large_numbers_of_half_precision_are_finite():
    """Their sum over an image is beyond the largest such number."""
    x = torch.full((3, 2048), 100.0, dtype=torch.float16)
    assert Moments.of(x).mean.eq(100).all()


def test_moments_of_some_rows():
    x, rows = features(9000, 3), torch.randperm(9000)[:5000]
    some, copied = Moments.of(x, rows), Moments.of(x[rows])
    assert some.n == 5000 and torch.equal(some.outer, copied.outer) and torch.equal(some.total, copied.total)


def test_wrong_dimension_one_image_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(MetricError, match="dimension 3"):
        Moments.zeros(3).add(features(2, 4))
    with pytest.raises(MetricError, match="3 and 4"):
        Moments.zeros(3) + Moments.zeros(4)
    with pytest.raises(MetricError, match="moments of a and of b cannot be added"):
        Moments.zeros(3, "a") + Moments.zeros(3, "b")
    with pytest.raises(MetricError, match="at least 2 images, and there is 1"):
        Moments.of(features(1, 3)).cov  # noqa: B018
    np.savez(tmp_path / "other.npz", mu=1)
    with pytest.raises(MetricError, match="other.npz"):
        Moments.load(tmp_path / "other.npz")
