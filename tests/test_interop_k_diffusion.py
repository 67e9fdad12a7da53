"""k-diffusion's interface to every solver: signature, callback, noise, and the states of our own loop."""

import inspect

import pytest
import torch

from evodiff.config import choices
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import Karras, LogSNR, TimeGrid
from evodiff.interop import k_diffusion
from evodiff.models.analytic import GaussianMixture
from evodiff.sampling import integrate
from evodiff.schedule import EDM
from evodiff.solvers.evodiff import EVODiff

MEANS = 2 * torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
MIXTURE = GaussianMixture(MEANS, torch.full((4,), 0.1).double(), torch.full((4,), 0.25).double())
SCHEDULE = EDM(20.0, 0.05)
TIMES = Karras().times(6, SCHEDULE, SCHEDULE.t_start, SCHEDULE.t_end)
SIGMAS = torch.tensor(TIMES, dtype=torch.float64)
GRID = TimeGrid.at(SIGMAS.float().tolist(), SCHEDULE)
NAMES = choices("solver")


def model(x, sigma):
    """The mixture, called as k-diffusion calls models."""
    assert sigma.shape == (len(x),) and (sigma == sigma[0]).all()
    return MIXTURE(x.double(), SCHEDULE.node(sigma[0].item())).to(x.dtype)


def start():
    return SIGMAS[0] * torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Replayed:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(7)

    def normal(self, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_steps_as_in_our_own_loop(name):
    solver = k_diffusion.named_solver(name)
    times = [TIMES[0], TIMES[-1]] if solver.adaptive else TIMES
    noise = Replayed()
    expected = integrate(solver, MIXTURE, start(), TimeGrid.at(times, SCHEDULE), noise)
    again = Replayed()
    out = k_diffusion.sampler(name)(
        model, start(), SIGMAS, disable=True, noise_sampler=lambda sigma, sigma_next: again.normal(start())
    )
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)


def test_the_signature_is_that_of_k_diffusion():
    parameters = inspect.signature(k_diffusion.sample_evodiff).parameters
    assert list(parameters)[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert k_diffusion.sample_evodiff.__name__ == "sample_evodiff"
    assert {f"sample_{name}" for name in NAMES} <= set(dir(k_diffusion))
    with pytest.raises(AttributeError, match="sample_moo"):
        _ = k_diffusion.sample_moo


@pytest.mark.parametrize("name", ["evodiff", "heun", "dpmpp_2s"])
def test_the_callback_is_told_of_each_step_once(name):
    seen = []
    sigmas = torch.cat([SIGMAS, SIGMAS.new_zeros(1)])
    out = getattr(k_diffusion, f"sample_{name}")(model, start(), sigmas, callback=seen.append, disable=True)
    assert [told["i"] for told in seen] == list(range(7))
    assert [told["sigma"].item() for told in seen] == TIMES
    for told in seen:
        assert set(told) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert torch.equal(told["sigma"], told["sigma_hat"])
        assert torch.equal(told["denoised"], model(told["x"], told["sigma"].expand(3)))
    assert torch.equal(seen[0]["x"], start())
    assert torch.equal(out, seen[-1]["denoised"])  # the last sigma is 0


def test_a_last_sigma_of_0_is_one_evaluation():
    calls = []

    def counted(x, sigma):
        calls.append(sigma[0].item())
        return model(x, sigma)

    out = k_diffusion.sample_evodiff(counted, start(), torch.tensor([*TIMES, 0.0], dtype=torch.float64), disable=True)
    assert calls == TIMES
    expected = integrate(EVODiff(final="euler"), MIXTURE, start(), TimeGrid.at(TIMES, SCHEDULE), denoise_final=True)
    assert torch.allclose(out, expected, atol=1e-12)
    alone = k_diffusion.sample_evodiff(model, start(), torch.tensor([TIMES[0], 0.0], dtype=torch.float64), disable=True)
    assert torch.equal(alone, model(start(), torch.full((3,), TIMES[0])))


def test_before_a_last_0_evodiff_takes_a_plain_step_unless_told():
    """The released end would scale the state by 1 - sqrt(1.6 * 0.6), which is next to nothing."""
    sigmas = torch.tensor([20.0, 6.0, 3.0, 1.6, 0.6, 0.0], dtype=torch.float64)
    fine = torch.tensor([*LogSNR().times(300, SCHEDULE, 20.0, 0.05), 0.0], dtype=torch.float64)
    truth = k_diffusion.sample_dpmpp_2m(model, start(), fine, disable=True)

    def error(**fields):
        out = k_diffusion.sample_evodiff(model, start(), sigmas, disable=True, **fields)
        return (out - truth).square().mean().sqrt()

    assert error() == error(final="euler") < 0.5 * error(final="released")


def test_extra_args_and_fields_reach_the_model_and_the_solver():
    def conditioned(x, sigma, shift):
        return model(x, sigma) + shift

    plain = k_diffusion.sample_evodiff(model, start(), SIGMAS, disable=True)
    shifted = k_diffusion.sample_evodiff(conditioned, start(), SIGMAS, {"shift": 0.5}, disable=True)
    euler = k_diffusion.sample_evodiff(model, start(), SIGMAS, disable=True, final="euler")
    made = k_diffusion.sampler("evodiff", final="released")(model, start(), SIGMAS, disable=True, final="euler")
    assert not torch.allclose(plain, shifted)
    assert not torch.allclose(plain, euler)
    assert torch.equal(made, euler)
    with pytest.raises(ConfigError, match="solver=evodiff has no field moo"):
        k_diffusion.sample_evodiff(model, start(), SIGMAS, moo=1)


def test_sigma_hat_is_what_the_network_saw():
    asked, seen = [], []

    def watched(x, sigma):
        asked.append(sigma[0].item())
        return model(x, sigma)

    k_diffusion.sample_heun(watched, start(), SIGMAS, callback=seen.append, disable=True, S_churn=1.0)
    assert [told["sigma_hat"].item() for told in seen] == asked[::2]
    assert [told["sigma_hat"] / told["sigma"] for told in seen] == pytest.approx([1 + 1 / 7] * 6)


def test_noise_is_that_of_the_sampler_between_two_sigmas_or_torchs_own():
    asked = []

    def noise_sampler(sigma, sigma_next):
        asked.append((sigma.item(), sigma_next.item()))
        return torch.zeros(3, 2, 3, 3)

    k_diffusion.sample_sde_dpmpp_2(model, start(), SIGMAS, disable=True, noise_sampler=noise_sampler)
    assert asked == list(zip(TIMES, TIMES[1:], strict=False))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(k_diffusion.sample_sde_dpmpp_2(model, start(), SIGMAS, disable=True))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_sigmas_are_told_in_their_own_dtype():
    """As in k-diffusion, where only the model's has that of x: a Brownian tree refuses a sigma beyond its largest."""
    told, sigmas = [], SIGMAS.float()
    z = torch.zeros(3, 2, 3, 3)

    def noise_sampler(*pair):
        told.extend(pair)
        return z

    def callback(step):
        told.extend((step["sigma"], step["sigma_hat"]))

    given = {"disable": True, "noise_sampler": noise_sampler, "callback": callback}
    k_diffusion.sample_sde_dpmpp_2(model, start().half(), sigmas, **given)
    assert len(told) == 4 * 6 and {sigma.dtype for sigma in told} == {torch.float32}
    assert {sigma.item() for sigma in told} == set(sigmas.tolist())


def test_noise_of_an_interval_is_not_used_twice():
    def of_interval(sigma, sigma_next):  # as a Brownian tree
        generator = torch.Generator().manual_seed(int(1000 * sigma + sigma_next))
        return torch.randn(3, 2, 3, 3, generator=generator)

    k_diffusion.sample_sde_dpmpp_2(model, start(), SIGMAS, disable=True, noise_sampler=of_interval)
    with pytest.raises(SamplingError, match="draws noise more than once in a step.*noise_sampler=None"):
        k_diffusion.sample_pc(model, start(), SIGMAS, disable=True, noise_sampler=of_interval)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_model_and_the_caller_see_the_dtype_of_x(dtype):
    seen = set()

    def watched(x, sigma):
        seen.update({x.dtype, sigma.dtype})
        return model(x, sigma)

    out = k_diffusion.sample_evodiff(watched, start().to(dtype), SIGMAS.float(), disable=True)
    assert seen == {dtype} and out.dtype == dtype
    in_float32 = integrate(EVODiff(), lambda x, node: model(x, x.new_full((3,), node.sigma)), start().float(), GRID)
    if dtype == torch.float32:
        assert torch.equal(out, in_float32)
    else:  # two digits fewer in the network's input, not in the steps
        assert torch.allclose(out.float(), in_float32, atol=1e-2)


def test_other_shapes():
    def flat(x, sigma):
        return model(x.reshape(3, 2, 3, 3), sigma).reshape(x.shape)

    video = k_diffusion.sample_dpmpp_2m(flat, start().reshape(3, 2, 3, 3, 1), SIGMAS, disable=True)
    image = k_diffusion.sample_dpmpp_2m(model, start(), SIGMAS, disable=True)
    assert torch.allclose(video.reshape(image.shape), image, atol=1e-12)


def test_progress_is_told_unless_disabled(capsys):
    k_diffusion.sample_evodiff(model, start(), SIGMAS, disable=True)
    assert capsys.readouterr().err == ""
    k_diffusion.sample_evodiff(model, start(), SIGMAS)
    assert "6/6 steps" in capsys.readouterr().err
    seen = []
    sigmas = torch.cat([SIGMAS, SIGMAS.new_zeros(1)])
    k_diffusion.sample_teleport(model, start(), sigmas, callback=seen.append)
    assert "7/7 steps" in capsys.readouterr().err
    assert [told["i"] for told in seen] == [4, 5, 6]  # not of those that evaluate nothing


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.0, 0.0], [0.0, 0.0], [1.0, -1.0], [1.0, 2.0]])
def test_sigmas_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ConfigError, match="fall"):
        k_diffusion.sample_evodiff(model, start(), torch.tensor(sigmas), disable=True)


def test_dpmpp_2m_is_that_of_k_diffusion_without_lower_order_final():
    x, old, sigmas = start().double(), None, SIGMAS.double()
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        D = model(x, s.expand(len(x)))
        h, last = (s / t).log(), sigmas[i - 1]
        r = (last / s).log() / h
        slope = D if old is None or t == 0 else (1 + 1 / (2 * r)) * D - old / (2 * r)
        x, old = (t / s) * x - (-h).expm1() * slope, D
    same = k_diffusion.sample_dpmpp_2m(model, start().double(), sigmas, disable=True, lower_order_final=False)
    other = k_diffusion.sample_dpmpp_2m(model, start().double(), sigmas, disable=True)
    assert torch.allclose(same, x, atol=1e-6)
    assert not torch.allclose(other, x, atol=1e-4)
