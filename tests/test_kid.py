import numpy as np
import pytest
import torch

from evodiff.compat import import_torchvision
from evodiff.errors import MetricError
from evodiff.metrics.inception_score import inception_score
from evodiff.metrics.kid import kid, mmd2
from evodiff.metrics.protocol import protocol


def normal(n, d=4, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) + shift


def kernel(a, b):
    return (a @ b / len(a) + 1) ** 3


def test_mmd2_is_the_sum_over_pairs():
    x, y = normal(7, seed=1), normal(5, seed=2)
    xx = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    assert mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_the_estimate_is_unbiased_and_the_biased_one_is_not():
    """Over many pairs of samples of one distribution the mean is 0 within its error; keeping the diagonal is not."""
    pairs = [(normal(20, seed=2 * i), normal(20, seed=2 * i + 1)) for i in range(400)]
    values = np.array([mmd2(x, y) for x, y in pairs])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))

    def with_diagonal(x, y):
        k = [(a @ b.T / 4 + 1).pow(3).mean().item() for a, b in ((x, x), (y, y), (x, y))]
        return k[0] + k[1] - 2 * k[2]

    biased = np.array([with_diagonal(x, y) for x, y in pairs])
    assert biased.mean() > 3 * biased.std() / np.sqrt(len(biased))


def test_another_distribution_is_seen():
    mean, std = kid(normal(300, seed=1), normal(300, seed=2, shift=1.0), subsets=10, size=100)
    assert mean > 5 * std


def test_equals_torch_fidelity_on_the_same_subsets():
    import_torchvision()
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(120, seed=1), normal(150, seed=2, shift=0.3)
    found = kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=50, verbose=False)
    expected = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    assert kid(x, y, subsets=7, size=50) == pytest.approx(expected, rel=1e-10)


def test_too_few_images_are_refused():
    with pytest.raises(MetricError, match="900 generated"):
        kid(normal(900), normal(2000))


def test_inception_score_of_one_hot_answers_is_the_number_of_classes():
    certain = 1e4 * torch.eye(10).repeat(20, 1)
    mean, std = inception_score(certain, part=len(certain))
    assert mean == pytest.approx(10) and std == 0
    assert inception_score(torch.zeros(100, 10))[0] == pytest.approx(1)


def test_an_inception_score_has_parts_of_as_many_images_as_the_protocol_says():
    logits = 3 * torch.randn(10_000, 40, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    whole = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    tenths, halves, (one, spread) = (
        inception_score(logits),
        inception_score(logits, 5_000),
        inception_score(logits, 50_000),
    )
    assert one == pytest.approx(whole, rel=1e-12) and spread == 0  # score_sde's, in one pass
    # the mean of p(y) of fewer images is nearer to each of them
    assert tenths[0] < halves[0] < one
    assert {name: protocol(name).is_part for name in ("adm", "score_sde", "edm")} == {
        "adm": 5_000,
        "score_sde": 50_000,
        "edm": None,
    }


def test_inception_score_equals_torch_fidelity():
    import_torchvision()
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * normal(103, 12).float()
    found = isc_features_to_metric(logits)
    expected = found["inception_score_mean"], found["inception_score_std"]
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(MetricError, match="at least 10"):
        inception_score(logits[:9])
