"""The schedulers' configurations: those of other schedulers name their process, and ours survive the way back."""

import pytest
import torch
from diffusers_loop import MEANS, loop, noise

from evodiff.errors import ConfigError
from evodiff.grid import Karras
from evodiff.schedule import EDM

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array")  # diffusers' own, on NumPy 2
from evodiff.interop.diffusers import EVODiffScheduler, SolverScheduler  # noqa: E402
from evodiff.interop.process import VP, Preconditioned, Straight  # noqa: E402

VP_SCHEDULERS = (
    "DDPM DDIM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete DPMSolverMultistep "
    "DPMSolverSinglestep DEISMultistep UniPCMultistep SASolver LCM DDIMInverse"
)
FOREIGN = {
    **{name: {} for name in VP_SCHEDULERS.split()},
    "FlowMatchEulerDiscrete": {"shift": 3.0},
    "FlowMatchHeunDiscrete": {},
    "EDMEuler": {},
    "EDMDPMSolverMultistep": {"sigma_max": 20.0},
}


CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0}
"""As of Stable Video Diffusion."""


def test_continuous_timesteps_are_those_of_a_preconditioned_network():
    theirs = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear", **CONTINUOUS)
    ours = EVODiffScheduler.from_config(theirs.config)
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    assert (ours.init_noise_sigma, ours.timesteps[0].item()) == pytest.approx((700, theirs.timesteps[0].item()))
    x, out = noise() * 700, noise(range(3, 6))
    x_0 = theirs.step(out, theirs.timesteps[0], x).pred_original_sample
    node = ours.process.schedule.node(ours.process.t_of_timestep(ours.timesteps[0].item()))
    torch.testing.assert_close(ours.process.data(x, out, node), x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FOREIGN)
def test_any_schedulers_configuration_gives_a_sampler_of_its_process(name, caplog):
    """A perfect network of that process ends at the mixture's modes, and the configuration survives the way back."""
    theirs = getattr(diffusers, f"{name}Scheduler")(**FOREIGN[name])
    ours = EVODiffScheduler.from_config(theirs.config)
    assert not caplog.records  # diffusers warns of keys that nobody knows
    kind = Straight if name.startswith("Flow") else Preconditioned if name.startswith("EDM") else VP
    assert type(ours.process) is kind
    n = 15 if kind is Straight else 30
    out = loop(ours, noise() * ours.init_noise_sigma, n)
    distance = (out[:, None] - MEANS).flatten(2).norm(dim=2).amin(1)
    assert (distance < 0.1 * 18**0.5 * 2).all(), distance
    back = type(theirs).from_config(ours.config)
    assert {k: back.config[k] for k in FOREIGN[name]} == FOREIGN[name]
    assert dict(EVODiffScheduler.from_config(back.config).config)["flow_shift"] == ours.config["flow_shift"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01}, "noise schedule of ScoreSdeVeScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"prediction_type": "score"}, "prediction_type=score does not exist; possible: epsilon"),
        ({"beta_schedule": "laplace"}, "beta_schedule=laplace is not known here"),
        ({"timestep_spacing": "log"}, "timestep_spacing=log does not exist; possible: linspace"),
        ({"solver_fields": {"moo": 1}}, "solver=evodiff has no field moo"),
        ({"prediction_type": "sample", "sigma_data": 0.5}, "prediction_type=sample with sigma_data"),
        ({"_class_name": "EulerDiscreteScheduler", **CONTINUOUS, "prediction_type": "epsilon"}, "timestep_type=contin"),
        ({"_class_name": "EulerDiscreteScheduler", **CONTINUOUS, "sigma_max": None}, "timestep_type=continuous"),
        ({"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 3.0}, "with snr_shift_scale shifts its noise"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02}, "with shift_terminal stretches"),
    ],
)
def test_configurations_that_cannot_be_right_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        EVODiffScheduler.from_config({"beta_schedule": "linear", **config} if "_class" not in str(config) else config)


COSINE = {"sigma_data": 1.0, "sigma_schedule": "exponential", "prediction_type": "v_prediction", "solver_order": 2}
"""Keys of CosineDPMSolverMultistepScheduler, which needs torchsde."""


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["CMStochasticIterativeScheduler", "CosineDPMSolverMultistepScheduler"])
def test_sigma_data_alone_is_not_edm(name, named):
    """Consistency models and Stable Audio's scheduler have one, and tell their networks the time in other ways."""
    config = dict(diffusers.CMStochasticIterativeScheduler().config) if name.startswith("CM") else COSINE
    config = {**config, "_class_name": name} if named else config
    with pytest.raises(ConfigError, match=f"noise schedule of {name if named else 'this'}.* is not known here"):
        EVODiffScheduler.from_config(config)


def test_defaults_of_another_scheduler_are_part_of_its_process():
    theirs = diffusers.LCMScheduler()
    assert theirs.config.beta_schedule == "scaled_linear"
    assert torch.allclose(EVODiffScheduler.from_config(theirs.config).betas, theirs.betas, rtol=2e-4)
    edm = EVODiffScheduler.from_config(diffusers.EDMEulerScheduler(sigma_max=20.0).config)
    edm.set_timesteps(5)
    assert edm.sigmas.tolist() == pytest.approx(Karras().times(5, EDM(20.0, 0.002), 20.0, 0.002), rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_that_of_diffusers(prediction):
    theirs = diffusers.EDMEulerScheduler(prediction_type=prediction)
    ours = EVODiffScheduler.from_config(theirs.config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    x, out, sigma = noise(), noise(range(3, 6)), theirs.sigmas[2]
    node = ours.process.schedule.node(sigma.item())
    assert theirs.timesteps[2] == pytest.approx(ours.process.timestep(sigma.item()), abs=1e-6)
    assert torch.allclose(ours.process.data(x, out, node), theirs.precondition_outputs(x, out, sigma), atol=1e-6)
    scaled = ours.scale_model_input(x, ours.process.timestep(sigma.item()))
    assert torch.allclose(scaled, theirs.precondition_inputs(x, sigma), atol=1e-6)


def test_betas_are_those_of_diffusers():
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        theirs = diffusers.DDPMScheduler(beta_schedule=kind)
        ours = EVODiffScheduler.from_config(theirs.config)
        assert torch.allclose(ours.betas, theirs.betas, rtol=2e-4, atol=1e-7)
        assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)
    rescaled = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = diffusers.DPMSolverMultistepScheduler(**rescaled)
    ours = EVODiffScheduler(**rescaled)
    assert torch.allclose(ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], rtol=2e-2, atol=1e-6)
    assert 0 < ours.alphas_cumprod[-1] < 1e-6
    assert EVODiffScheduler(trained_betas=[0.1, 0.3]).betas.tolist() == pytest.approx([0.1, 0.3])
    clipped = EVODiffScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    clipped.set_timesteps(5)
    assert clipped._nodes.all[0].lam == pytest.approx(-5.1)


def test_save_and_load(tmp_path):
    scheduler = SolverScheduler(solver="dpmpp_3m", solver_fields={"lower_order_final": False}, spacing="karras")
    scheduler.save_pretrained(tmp_path)
    loaded = SolverScheduler.from_pretrained(tmp_path)
    assert loaded.solver == scheduler.solver and not loaded.solver.lower_order_final
    assert torch.equal(loop(loaded, noise()), loop(scheduler, noise()))
    assert EVODiffScheduler.from_pretrained(tmp_path, solver_fields=None).config["solver"] == "evodiff"


@pytest.mark.parametrize(
    "make",
    [
        lambda: SolverScheduler("unipc_3", sigma_data=0.5),
        lambda: EVODiffScheduler.from_config(diffusers.EDMEulerScheduler().config, use_karras_sigmas=False),
        lambda: EVODiffScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, flow_shift=7),
    ],
)
def test_what_was_set_here_outlives_what_came_from_another_scheduler(make, tmp_path):
    scheduler = make()
    scheduler.save_pretrained(tmp_path)
    copies = [type(scheduler).from_pretrained(tmp_path), type(scheduler).from_config(scheduler.config)]
    for each in (scheduler, *copies):
        each.set_timesteps(5)
    assert all(each.sigmas.tolist() == scheduler.sigmas.tolist() for each in copies)


def test_the_other_schedulers_own_arguments_can_be_given_with_its_configuration():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
    ours = EVODiffScheduler.from_config(theirs.config, shift=7.0, shift_terminal=None)
    assert ours.config["flow_shift"] == 7


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_clipped_noise_levels_are_left_out_of_listed_timesteps(spacing):
    config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": spacing}
    theirs, ours = diffusers.DPMSolverMultistepScheduler(**config), EVODiffScheduler(**config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
    assert torch.allclose(ours.timesteps, theirs.timesteps.float(), atol=4)  # theirs has gaps of the unclipped range
    assert ours.timesteps[0] == theirs.timesteps[0] < 999 - 111 * (spacing == "leading")
