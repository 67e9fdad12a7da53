"""The exact denoisers against what they claim to be."""

import pytest
import torch

from evodiff.config import build, compose
from evodiff.data import mnist_digits
from evodiff.models.analytic import GaussianMixture, mixture
from evodiff.models.mnist import mixture_digits
from evodiff.schedule import EDM, LinearVP


@pytest.mark.parametrize("schedule", [EDM(), LinearVP()])
def test_mixture_denoiser_is_the_posterior_mean(schedule):
    """Against Bayes' rule by quadrature over x_0, in one dimension."""
    means = torch.tensor([-0.7, 0.4], dtype=torch.float64).view(2, 1, 1, 1)
    stds, weights = torch.tensor([0.2, 0.3]).double(), torch.tensor([0.3, 0.7]).double()
    model = GaussianMixture(means, stds, weights, schedule)
    node = schedule.node(0.5 * (schedule.t_start + schedule.t_end) if schedule != EDM() else 0.6)
    x0 = torch.linspace(-4, 4, 40001, dtype=torch.float64)
    prior = sum(
        w * torch.exp(-0.5 * ((x0 - m) / s) ** 2) / s for m, s, w in zip((-0.7, 0.4), stds, weights, strict=True)
    )
    for x in (-1.0, 0.1, 0.8):
        posterior = prior * torch.exp(-0.5 * ((x - node.alpha * x0) / node.sigma) ** 2)
        expected = (x0 * posterior).sum() / posterior.sum()
        D = model(torch.full((1, 1, 1, 1), x, dtype=torch.float64), node)
        assert D.item() == pytest.approx(expected.item(), rel=1e-8)


def test_digit_oracle_returns_the_digit_at_low_noise():
    """With little noise the posterior is one digit, and D moves towards it by std^2 / (std^2 + sigma^2)."""
    model = build(compose("run", ["model=mixture_digits", "model.digits=50"]).model)
    images, _ = mnist_digits()
    digit = images[::100][7:8].double() / 127.5 - 1
    noise = torch.randn(digit.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = 0.05
    D = model.denoiser(None)(digit + sigma * noise, EDM().node(sigma))
    expected = digit + 0.1**2 / (0.1**2 + sigma**2) * sigma * noise
    torch.testing.assert_close(D, expected, atol=1e-9, rtol=0)


def test_in_float32_too_an_image_between_two_digits_is_told_from_others():
    """|x|^2 - 2 x.mu + |mu|^2 in float32 loses what a small variance then amplifies: 4e-3 here, ten times as much."""
    model = build(compose("run", ["model=mixture_digits"]).model).denoiser(None)
    between, node = (model.means[1:] + model.means[:-1]).unsqueeze(1) / 2, EDM().node(0.1)
    torch.testing.assert_close(model(between.float(), node).double(), model(between, node), atol=1e-3, rtol=0)


@pytest.mark.parametrize("make", [mixture, mixture_digits])
def test_oracles_are_on_their_device_whole(make):
    """Or their numbers are copied there at every call."""
    oracle = make(device="meta").denoiser(None)
    assert {a.device.type for a in (oracle.means, oracle.stds, oracle.weights)} == {"meta"}


@pytest.mark.parametrize("make", [mixture, mixture_digits])
def test_oracles_go_to_devices_without_float64(make, mps):
    oracle, exact = (make(device=device).denoiser(None) for device in (mps, "cpu"))
    assert {a.dtype for a in (oracle.means, oracle.stds, oracle.weights)} == {torch.float32}
    assert torch.equal(oracle.means, exact.means.float())
