"""What a distance is known to, and the distances between states: standard errors, limits, rmse, sliced Wasserstein."""

import numpy as np
import pytest
import torch

from evodiff.errors import MetricError
from evodiff.metrics.distances import project, rmse, rmse_images, sliced_wasserstein, wasserstein_of_columns
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.metrics.uncertainty import frechet_infinity, influence, standard_error
from evodiff.sampling import to_uint8
from evodiff.store import SampleStore


def normal(n, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_beside_equal_images_an_image_counts_by_its_distance():
    """A reference without spread has no factor: what is left is the distance to its mean, of each image."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = Gaussian(torch.ones(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))
    distances = (x - 1).square().sum(1)
    assert torch.allclose(influence(x, reference), distances - distances.mean())


def test_influence_is_the_derivative_by_the_weight_of_an_image():
    x = normal(300, seed=3).double()
    reference = Gaussian(torch.full((4,), 0.7).double(), torch.diag(torch.tensor([2.0, 1, 0.5, 3]).double()))
    weight, i = 1e-5, 17

    def distance(weight):
        w = torch.full((300,), (1 - weight) / 300, dtype=torch.float64)
        w[i] += weight
        mean = w @ x
        cov = ((x - mean).T * w) @ (x - mean) * 300 / 299
        return frechet_distance(Gaussian(mean, cov), reference)

    slope = (distance(weight) - distance(-weight)) / (2 * weight)
    found = influence(x, reference)
    # the squares are not multiplied by n / (n - 1)
    assert found[i].item() == pytest.approx(slope, abs=found.std().item() / 300)
    assert found.mean().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(400, 4), (60, 100)])
def test_the_standard_error_is_the_scatter_over_repetitions(n, d):
    """That said by one sample, against the spread over 200 samples; with fewer images than features too."""
    reference = Gaussian(torch.full((d,), 1.0, dtype=torch.float64), 2 * torch.eye(d, dtype=torch.float64))
    samples = [normal(n, d, i) for i in range(200)]
    spread = np.std([frechet_distance(Moments.of(x), reference) for x in samples])
    said = np.mean([standard_error(influence(x, reference)) for x in samples[:20]])
    assert said == pytest.approx(spread, rel=0.15)


def test_a_difference_on_the_same_seeds_is_known_better_than_its_terms():
    """Two runs of the same images, but for a shift: the scatter of their difference over repetitions."""
    reference = Gaussian(torch.full((4,), 1.0, dtype=torch.float64), 2 * torch.eye(4, dtype=torch.float64))
    pairs = [(x, 1.1 * x) for x in (normal(400, seed=i).double() for i in range(200))]
    spread = np.std([np.subtract(*(frechet_distance(Moments.of(x), reference) for x in pair)) for pair in pairs])
    first, second = (influence(x, reference) for x in pairs[0])
    assert standard_error(first - second) == pytest.approx(spread, rel=0.15)
    assert standard_error(first - second) < 0.3 * standard_error(first)


def test_one_image_has_no_standard_error():
    with pytest.raises(MetricError, match="at least 2 images"):
        standard_error(torch.zeros(1))


def test_the_limit_removes_the_bias_of_few_images():
    reference = Gaussian(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    plain = np.mean([frechet_distance(Moments.of(normal(1000, 8, i)), reference) for i in range(10)])
    limit = np.mean([frechet_infinity(normal(1000, 8, i), reference) for i in range(10)])
    assert abs(limit) < 0.2 * plain


def test_the_limit_is_taken_where_the_distance_is_a_line():
    """In features as unequal as Inception's, and as few images of them: a tenth would be fewer than features, and the
    line through such distances ends below 0."""
    d, n = 128, 625
    scale = torch.arange(1, d + 1, dtype=torch.float64).reciprocal().sqrt()
    scale /= scale.norm()
    reference = Gaussian(torch.zeros(d, dtype=torch.float64), torch.diag(scale**2))
    samples = [scale * normal(n, d, i) + 0.1 / d**0.5 for i in range(6)]
    assert np.mean([frechet_infinity(x, reference) for x in samples]) == pytest.approx(0.1**2, rel=0.25)
    assert np.mean([frechet_distance(Moments.of(x), reference) for x in samples]) > 3 * 0.1**2
    with pytest.raises(MetricError, match="a limit in N of 128 features needs at least 512 images, and there are 511"):
        frechet_infinity(samples[0][:511], reference)


def kept(folder, x, images=None):
    """A run of such states and images."""
    store = SampleStore(folder, {"nfe": 1}, range(len(x)), 200)
    images = x if images is None else images
    for seeds in store.missing():
        part = slice(seeds.start, seeds.stop)
        store.write(seeds, {"x": x[part].numpy(), "images": images[part].numpy()}, nfe=1, seconds=0.0, weights={})
    return store


def test_rmse_of_states_and_of_images(tmp_path):
    """Images end at black and white, so what goes beyond is in the error of the states alone."""
    converged = torch.rand(500, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    beyond = converged + torch.where(converged.abs() > 0.9, 3 * converged.sign(), 0.02)
    runs = [kept(tmp_path / name, x, to_uint8(x)) for name, x in (("converged", converged), ("beyond", beyond))]
    far = (converged.abs() > 0.9).double().mean().item()
    assert rmse(*runs) == pytest.approx((9 * far + 0.02**2 * (1 - far)) ** 0.5)
    clipped = (beyond.clamp(-1, 1) - converged).square().mean().sqrt().item()
    assert rmse_images(*runs) == pytest.approx(clipped, abs=0.003)
    assert rmse(runs[0], runs[0]) == rmse_images(runs[0], runs[0]) == 0


def test_sliced_wasserstein(tmp_path):
    x = normal(500, 3).reshape(500, 1, 3, 1)
    assert sliced_wasserstein(kept(tmp_path / "x", x), kept(tmp_path / "flipped", x.flip(0))) == pytest.approx(
        0, abs=1e-12
    )

    def distance(x, y, projections=256):
        return wasserstein_of_columns(project(x, projections), project(y, projections))

    # every projection moves by <s, direction>, whose mean square is |s|^2 / d
    shift = torch.tensor([3.0, 0.0, 0.0]).reshape(1, 3, 1)
    assert distance(x, x + shift, projections=4000) == pytest.approx(3 / 3**0.5, rel=0.05)
    assert distance(x, x[torch.randperm(len(x))]) == pytest.approx(0, abs=1e-12)
