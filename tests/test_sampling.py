"""From seeds to images: rounding, counting, thresholds, and networks that fail."""

import dataclasses

import pytest
import torch

from evodiff import settings
from evodiff.denoiser import Clipped, Counting, DynamicThreshold
from evodiff.device import device_for
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import LogSNR, grid_for
from evodiff.models.analytic import mixture
from evodiff.noise import SeededNoise
from evodiff.sampling import generate, start, to_uint8
from evodiff.schedule import EDM, Flow, LinearVP, Node
from evodiff.solvers.ddim import DDIM


def test_rounding_and_truncating_bytes():
    x = torch.tensor([-1.5, -1.0, -0.9, 0.0, 0.001, 0.999, 1.0, 1.2])
    assert to_uint8(x).tolist() == [0, 0, 13, 128, 128, 255, 255, 255]
    assert to_uint8(x, "truncate").tolist() == [0, 0, 12, 127, 127, 254, 255, 255]
    with pytest.raises(ConfigError, match="rounding=rond does not exist; possible: round, truncate"):
        to_uint8(x, "rond")


@pytest.mark.parametrize(
    ("schedule", "t", "scale"),
    [
        *[(EDM(), 80.0, 80.0), (EDM(), 5.0, 5.0), (EDM(1e-3, 1e-5), 1e-3, 1e-3)],
        *[(LinearVP(), 1.0, 1.0), (LinearVP(), 0.2, 1.0), (Flow(), 0.8, 0.8)],
    ],
)
def test_the_start_is_sigma_z_but_z_where_the_variance_is_preserved(schedule, t, scale):
    noise = SeededNoise([3])
    expected = scale * noise.latents((1, 4, 4)).double()
    torch.testing.assert_close(start(noise, (1, 4, 4), schedule.node(t)), expected, rtol=1e-12, atol=0)


class OnMPS:
    """A tensor on a device without float64."""

    device = torch.device("mps")

    def __init__(self, on_cpu):
        self.on_cpu = on_cpu

    def cpu(self):
        return self.on_cpu


def test_bytes_are_rounded_in_float64_also_where_the_device_has_none():
    x = torch.tensor([-1.0, 0.001, 1.0])
    assert torch.equal(to_uint8(OnMPS(x)), to_uint8(x))


def test_a_state_in_float64_on_mps_is_refused():
    denoiser, grid = tiny()
    with pytest.raises(ConfigError, match=r"device=mps has no float64, .* Set dtype=float32\."):
        generate(denoiser, DDIM(), grid, [0], (1, 4, 4), device="mps")


def test_a_mac_is_not_given_a_device_without_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("auto") == "cpu"
    monkeypatch.setattr(settings, "device_for", lambda name: name)
    with pytest.raises(ConfigError, match="device=mps has no float64, and states are in float64 here. Use device=cpu"):
        settings.model_of("gits", ["device=mps"])


class Constant:
    """A denoiser that always says the same."""

    schedule = EDM()

    def __init__(self, D):
        self.D = D

    def __call__(self, x, node):
        return self.D.expand_as(x)


NODE = Node(1.0, 1.0, 1.0)


def test_clipped():
    D = Clipped(Constant(torch.tensor([-3.0, 0.5, 2.0])))(torch.zeros(1, 3), NODE)
    assert D.tolist() == [[-1.0, 0.5, 1.0]]


def test_dynamic_threshold_scales_by_the_quantile_of_each_sample():
    D = torch.stack([torch.linspace(-4, 4, 1001), torch.linspace(-0.5, 0.5, 1001)])
    out = DynamicThreshold(Constant(D))(torch.zeros(2, 1001), NODE)
    s = torch.quantile(D[0].abs(), 0.995)
    torch.testing.assert_close(out[0], D[0].clamp(-s, s) / s)
    assert torch.equal(out[1], D[1]), "what is within [-1, 1] stays"


def tiny(nfe=5):
    model = mixture(shape=(1, 4, 4), components=3)
    denoiser = model.denoiser(None)
    return denoiser, grid_for(nfe, DDIM(), LogSNR(), denoiser.schedule)


def test_batches_do_not_change_the_images():
    denoiser, grid = tiny()
    together = generate(denoiser, DDIM(), grid, range(6), (1, 4, 4))
    parts = [generate(denoiser, DDIM(), grid, range(a, b), (1, 4, 4)).images for a, b in ((0, 1), (1, 6))]
    assert torch.equal(together.images, torch.cat(parts))
    assert together.nfe == 5


def test_a_model_that_returns_nan_is_named_by_seed():
    denoiser, grid = tiny()

    class Broken:
        schedule = denoiser.schedule

        def __call__(self, x, node):
            D = denoiser(x, node)
            D[1] = torch.nan
            return D

    with pytest.raises(SamplingError, match=r"1 of 3 images are not finite \(seeds 11\)"):
        generate(Broken(), DDIM(), grid, [10, 11, 12], (1, 4, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_decoder_that_returns_nan_is_named_by_seed(value):
    """It would become an image: black, or white."""
    denoiser, grid = tiny()

    def decode(z):
        images = z.repeat(1, 3, 2, 2)
        images[2, 1, 0, 0] = value
        return images

    with pytest.raises(
        SamplingError, match=r"1 of 3 images are not finite \(seeds 12\): .*decoder returned NaN or inf"
    ):
        generate(denoiser, DDIM(), grid, [10, 11, 12], (1, 4, 4), decode=decode)


def test_a_solver_that_spends_other_than_it_declares_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Wasteful(DDIM):
        def step(self, denoise, x, step, state):
            denoise(x, step.s)
            return super().step(denoise, x, step, state)

    denoiser, grid = tiny()
    with pytest.raises(SamplingError, match="declares 5 evaluations on 5 steps but made 10"):
        generate(denoiser, Wasteful(), grid, [0], (1, 4, 4))


def test_counting_counts_calls():
    denoiser, grid = tiny()
    counting = Counting(denoiser)
    generate(counting, DDIM(), grid, [0, 1], (1, 4, 4), noise=SeededNoise([0, 1]), denoise_final=True)
    assert counting.nfe == 6
