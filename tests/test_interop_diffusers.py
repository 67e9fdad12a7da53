"""The schedulers: the solver's own steps, whatever the process; and what diffusers asks."""

import importlib
import sys

import pytest
import torch
from diffusers_loop import MIXTURE, loop, network, noise

import evodiff
from evodiff.config import choices
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import Karras, LogSNR, TimeGrid, TimeUniform
from evodiff.models.edm import Preconditioned as OfKappa
from evodiff.models.mnist import mnist_tiny
from evodiff.noise import SeededNoise
from evodiff.sampling import integrate
from evodiff.schedule import DiscreteVP, Flow
from evodiff.solvers.evodiff import EVODiff

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array")  # diffusers' own, on NumPy 2
from evodiff.interop.diffusers import EVODiffScheduler, GivenOutput, SolverScheduler  # noqa: E402

SCHEDULE = DiscreteVP.linear()
SPACINGS = {"logsnr": LogSNR(), "karras": Karras(), "time_uniform": TimeUniform()}


def accepted():
    for name in choices("solver"):
        try:
            yield name, SolverScheduler(solver=name).solver
        except ConfigError as e:
            assert "does not evaluate the network exactly once per step" in str(e)


SOLVERS = dict(accepted())


def integrated(solver, x, scheduler, noise=None, denoise_final=False):
    """The same by the project's own loop, on the scheduler's nodes."""
    grid = TimeGrid(scheduler._nodes.all, scheduler.process.schedule)
    return integrate(solver, MIXTURE, x, grid, noise, denoise_final)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_steps_as_it_does_in_the_projects_own_loop(name):
    solver = SOLVERS[name]
    scheduler = SolverScheduler(solver=name, spacing="logsnr")
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    seeded = SeededNoise(range(3))
    x = torch.cat([torch.randn(1, 2, 3, 3, generator=g) for g in generators]).double()
    assert torch.equal(x, seeded.latents((2, 3, 3)).double())
    if solver.stochastic:  # diffusers draws in the dtype of the state, and this state is float64
        seeded.normal = lambda like: torch.cat([torch.randn(1, 2, 3, 3, generator=g, dtype=like.dtype) for g in redraw])
        redraw = [torch.Generator().manual_seed(k) for k in range(3)]
        for g in redraw:
            torch.randn(1, 2, 3, 3, generator=g)
    out = loop(scheduler, x, generator=generators)
    # the network sees timesteps in float32; bdia (gamma=1) multiplies that difference
    expected = integrated(solver, x, scheduler, seeded)
    assert torch.allclose(out, expected, rtol=0, atol=1e-4 if name == "bdia" else 1e-6)


def test_solvers_that_need_other_evaluations_are_refused():
    assert {"evodiff", "evodiff_paper", "dpmpp_3m", "unipc_3", "deis_tab3", "dpm_v3", "ipndm_4", "ddim"} <= set(SOLVERS)
    assert not {"heun", "dpm2", "dpmpp_2s", "probability_flow", "pc", "plms", "teleport"} & set(SOLVERS)
    with pytest.raises(ConfigError, match="heun does not evaluate the network exactly once per step"):
        SolverScheduler(solver="heun")
    with pytest.raises(
        ConfigError, match="ts_ddim does not evaluate the network exactly once per step, at the step's own"
    ):
        SolverScheduler(solver="ts_ddim")
    assert SolverScheduler(solver="ts_ddim", solver_fields={"window": 0.0}).solver.window == 0


def test_a_solver_that_asks_for_more_than_it_was_given_is_stopped():
    given = GivenOutput(noise(), SCHEDULE.node(0.5), SCHEDULE)
    given(noise(), SCHEDULE.node(0.5))
    for denoise in (given, GivenOutput(noise(), SCHEDULE.node(0.4), SCHEDULE)):
        with pytest.raises(SamplingError, match="asks for a network output that the pipeline has not computed"):
            denoise(noise(), SCHEDULE.node(0.5))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_predictions_spacings_and_ends(prediction, final, spacing):
    scheduler = EVODiffScheduler(prediction_type=prediction, final_sigmas_type=final, spacing=spacing)
    x, to_zero = noise(), final == "zero"
    out = loop(scheduler, x, 8)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 8
    schedule = scheduler.process.schedule
    times = SPACINGS[spacing].times(8 - to_zero, schedule, schedule.t_start, schedule.t_end)
    assert [node.t for node in scheduler._nodes.all] == times
    expected = integrated(scheduler.solver, x, scheduler, denoise_final=to_zero)
    assert torch.allclose(out, expected, rtol=0, atol=2e-6)


def test_timesteps_are_those_of_training_and_may_be_fractions():
    scheduler = EVODiffScheduler()
    scheduler.set_timesteps(4)
    assert torch.allclose(scheduler.timesteps, torch.tensor([999, 749.25, 499.5, 249.75]))
    node = SCHEDULE.node(0.5)
    assert scheduler.process.schedule.node(scheduler.process.t_of_timestep(499)).kappa == pytest.approx(node.kappa)
    assert scheduler.sigmas[-1] == pytest.approx(SCHEDULE.node(1e-3).kappa)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize(
    ("flags", "spacing"),
    [
        ({"use_karras_sigmas": True}, Karras()),
        ({"use_lu_lambdas": True}, LogSNR()),
        ({"use_exponential_sigmas": True}, LogSNR()),
        ({}, TimeUniform()),
    ],
)
def test_flags_of_other_schedulers_name_spacings(flags, spacing):
    scheduler = EVODiffScheduler(**flags)
    scheduler.set_timesteps(6)
    assert [node.t for node in scheduler._nodes.all] == pytest.approx(spacing.times(6, SCHEDULE, 1.0, 1e-3))


def test_beta_sigmas_are_those_of_diffusers():
    pytest.importorskip("scipy")
    config = {"use_beta_sigmas": True, "final_sigmas_type": "zero"}
    theirs, ours = diffusers.UniPCMultistepScheduler(**config), EVODiffScheduler(**config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    kappas = [node.kappa for node in ours._nodes.all]
    theirs_kappas = theirs.sigmas[:-1]
    assert torch.allclose(torch.tensor(kappas), theirs_kappas, rtol=1e-4)


@pytest.mark.parametrize("kind", ["leading", "trailing"])
def test_leading_and_trailing_are_those_of_diffusers(kind):
    theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing=kind, steps_offset=1)
    ours = EVODiffScheduler.from_config(theirs.config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    assert torch.allclose(ours.timesteps, theirs.timesteps.float())


@pytest.mark.parametrize(("flow", "last"), [(False, 999), (True, 1000)])
def test_timesteps_that_were_not_trained_are_refused(flow, last):
    scheduler = EVODiffScheduler(use_flow_sigmas=flow, prediction_type="flow_prediction" if flow else "epsilon")
    scheduler.set_timesteps(timesteps=[last, 500, 2])
    with pytest.raises(ConfigError, match=f"timestep 1500 is outside the trained ones, 0 to {last}"):
        scheduler.set_timesteps(timesteps=[1500, 500, 1])


def test_listed_timesteps_and_sigmas():
    x = noise()
    scheduler = EVODiffScheduler()
    ays = diffusers.schedulers.AysSchedules["StableDiffusionTimesteps"]
    out = loop(scheduler, x, timesteps=ays)
    assert scheduler.timesteps.tolist() == ays
    sigmas = scheduler.sigmas.tolist()
    assert torch.allclose(loop(scheduler, x, sigmas=sigmas), out, atol=1e-5)
    assert torch.allclose(scheduler.timesteps, torch.tensor(ays).float(), atol=1e-3)
    to_zero = loop(scheduler, x, sigmas=[*sigmas[:-1], 0.0])
    assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == len(ays)
    last = loop(EVODiffScheduler(final_sigmas_type="zero"), x, timesteps=ays)
    assert torch.allclose(to_zero, last, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({}, "one of num_inference_steps, timesteps and sigmas"),
        ({"num_inference_steps": 3, "timesteps": [9, 5, 1]}, "and only one"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is impossible"),
        ({"num_inference_steps": 1.5}, "num_inference_steps=1.5 is impossible; possible: whole numbers"),
        ({"sigmas": [5.0]}, "leaves no evaluation"),
        ({"timesteps": []}, "leaves no evaluation"),
        ({"timesteps": [10, 20]}, "must fall strictly"),
        ({"timesteps": [999, 500, 0]}, 'timestep 0, is no earlier than the end of .* set final_sigmas_type="zero"'),
        ({"sigmas": [1.0, 0.0, 0.5]}, "only the last may be 0"),
        ({"sigmas": [800.0, 5.0, 0.1]}, r"timestep 1\d+.* is outside the trained ones, 0 to 999"),
        ({"sigmas": [14.6, 5.0, 0.002, 0.0]}, "timestep -0.8.* is outside the trained ones"),
    ],
)
def test_impossible_nodes(nodes, message):
    with pytest.raises(ConfigError, match=message):
        EVODiffScheduler().set_timesteps(**nodes)


def test_flows_begin_below_1_and_are_shifted():
    scheduler = EVODiffScheduler(prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.timesteps.tolist() == pytest.approx([999, 900, 750, 500])
    scheduler.set_timesteps(sigmas=[0.75, 0.5], mu=0.0)
    assert scheduler.timesteps.tolist() == pytest.approx([750, 500])
    scheduler.set_timesteps(sigmas=[1.0, 0.9998, 0.5], mu=0.0)
    assert scheduler.timesteps.tolist() == pytest.approx([999.9, 999.8, 500])
    scheduler.set_timesteps(timesteps=[1000.0, 999.8, 500])
    assert scheduler.timesteps.tolist() == pytest.approx([999.9, 999.8, 500])
    with pytest.raises(ConfigError, match="must fall strictly"):
        scheduler.set_timesteps(sigmas=[1.0, 1.0, 0.5])


@pytest.mark.parametrize("shift", ["exponential", "linear"])
def test_flow_pipelines_set_the_times_that_they_set_with_their_own_scheduler(shift):
    from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=shift)
    ours = EVODiffScheduler.from_config(theirs.config)
    sigmas = torch.linspace(1.0, 0.125, 8).tolist()
    (expected, _), (timesteps, n) = (retrieve_timesteps(s, sigmas=sigmas, mu=1.2) for s in (theirs, ours))
    assert n == 8
    assert torch.allclose(timesteps[1:], expected[1:], rtol=1e-5) and timesteps[0] == 999
    x, z, t = noise().float(), noise(range(3, 6)).float(), expected[3][None]
    assert torch.allclose(ours.scale_noise(x, t, z), theirs.scale_noise(x, t, z), atol=1e-5)


def test_evodiff_takes_plain_differences_on_flows():
    """The released rule's balanced ones follow kappa, which falls a hundredfold in the first step of a flow."""
    scheduler = EVODiffScheduler(prediction_type="flow_prediction")
    assert scheduler.solver == EVODiff(balance=False) and EVODiffScheduler().solver == EVODiff()
    assert EVODiffScheduler(prediction_type="flow_prediction", solver_fields={"balance": True}).solver == EVODiff()
    denoiser = OfKappa(mnist_tiny().denoiser(None).net, Flow())
    noise = {"seeds": range(6), "shape": (1, 32, 32), "grid": "time_uniform"}
    truth = evodiff.sample(denoiser, "dpmpp_2m", nfe=40, **noise).x
    plain, balanced = (
        (evodiff.sample(denoiser, solver, nfe=6, **noise).x - truth).square().mean().sqrt()
        for solver in (scheduler.solver, EVODiff())
    )
    assert plain < 0.3 and balanced > 1


def test_before_the_result_evodiff_takes_a_plain_step_unless_told():
    """In five leading steps the last one ends at kappa 0.6, where the released end would leave little of the state."""
    config = {"final_sigmas_type": "zero", "timestep_spacing": "leading"}
    told = EVODiffScheduler(**config, solver_fields={"final": "released"})
    outs, truth = [], loop(SolverScheduler("dpmpp_2m", spacing="logsnr", final_sigmas_type="zero"), noise(), 300)
    for scheduler in (EVODiffScheduler(**config), told):
        outs.append((loop(scheduler, noise(), 5) - truth).square().mean().sqrt())
    assert outs[0] < 0.5 * outs[1]


def test_the_end_is_chosen_anew_with_the_nodes():
    scheduler = EVODiffScheduler()
    for nodes, final in (({"sigmas": [9, 1, 0]}, "euler"), ({"num_inference_steps": 3}, "released")):
        scheduler.set_timesteps(**nodes)
        assert scheduler.solver == EVODiff(final=final)
    assert EVODiffScheduler(final_sigmas_type="zero").solver == EVODiff(final="euler")
    assert EVODiffScheduler(final_sigmas_type="zero", solver_fields={"final": "released"}).solver == EVODiff()


def test_used_again_it_gives_the_same():
    scheduler, x = EVODiffScheduler(), noise()
    first = loop(scheduler, x)
    loop(scheduler, noise(range(5, 8)), 5)
    assert torch.equal(loop(scheduler, x), first)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_stay_on_the_device_of_the_sample(name):
    """A tensor of another device anywhere in a step would raise."""
    scheduler = SolverScheduler(solver=name, thresholding=True, dynamic_thresholding_ratio=0.9)
    scheduler.set_timesteps(5, device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta")
    for i in range(5):
        x = scheduler.step(torch.empty_like(x), float(scheduler.process.timestep(scheduler._nodes.all[i].t)), x)[0]
    assert x.device.type == scheduler.timesteps.device.type == "meta"


def test_samples_do_not_depend_on_their_batch():
    scheduler = EVODiffScheduler(thresholding=True)
    together = loop(scheduler, noise())
    alone = torch.cat([loop(scheduler, noise([k])) for k in range(3)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_state_keeps_its_dtype_and_steps_are_computed_in_float32(dtype):
    scheduler, x = EVODiffScheduler(), noise().to(dtype)
    out = loop(scheduler, x)
    assert out.dtype == dtype
    scheduler.set_timesteps(8)
    t = scheduler.timesteps[0]
    output = network(scheduler)(x, t).to(dtype)
    scheduler.set_timesteps(8)
    coarse = scheduler.step(output, t, x).prev_sample
    scheduler.set_timesteps(8)
    fine = scheduler.step(output.float(), t, x.float()).prev_sample
    assert torch.equal(coarse, fine.to(dtype))


@pytest.mark.parametrize("shape", [(2, 9), (2, 3, 3, 1), (6, 3)])
def test_other_shapes_are_one_channel(shape):
    """Sound, video and tokens step as the same numbers in one channel of an image."""
    x = noise()
    outs = []
    for form in ((1, 18, 1), shape):
        scheduler = EVODiffScheduler(prediction_type="sample")
        scheduler.set_timesteps(6)
        y = x.reshape(3, *form)
        for t in scheduler.timesteps:
            node = scheduler.process.schedule.node(scheduler.process.t_of_timestep(float(t)))
            y = scheduler.step(MIXTURE(y.reshape_as(x), node).reshape(y.shape), t, y).prev_sample
        assert y.shape == (3, *form)
        outs.append(y.flatten())
    assert torch.allclose(*outs, atol=1e-12)


def test_a_learned_variance_is_left_out():
    scheduler, x = EVODiffScheduler(), noise()
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    plain = scheduler.step(network(scheduler)(x, t), t, x).prev_sample
    scheduler.set_timesteps(4)
    wide = torch.cat([network(scheduler)(x, t), torch.full_like(x, 7)], dim=1)
    assert torch.equal(scheduler.step(wide, t, x).prev_sample, plain)


def test_limits_on_the_data_prediction():
    x, D = noise(), 3 * noise(range(3, 6))

    def first(**config):
        scheduler = EVODiffScheduler(prediction_type="sample", **config)
        scheduler.set_timesteps(4)
        return scheduler.step(D, scheduler.timesteps[0], x).pred_original_sample

    assert torch.equal(first(), D)
    assert torch.equal(first(clip_sample=True, clip_sample_range=0.5), D.clamp(-0.5, 0.5))
    for largest in (1.0, 2.0, 100.0):
        ours = first(thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=largest)
        theirs = diffusers.DPMSolverMultistepScheduler(
            thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=largest
        )._threshold_sample(D)
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_noise_is_added_at_the_timestep_of_each_sample():
    scheduler = EVODiffScheduler()
    theirs = diffusers.DDPMScheduler()
    x, z, t = noise().float(), noise(range(3, 6)).float(), torch.tensor([0, 500, 999])
    assert torch.allclose(scheduler.add_noise(x, z, t), theirs.add_noise(x, z, t), atol=1e-4)
    node = SCHEDULE.node(0.3755)
    assert torch.allclose(scheduler.add_noise(x, z, torch.tensor([374.5])), node.alpha * x + node.sigma * z)


def test_starting_in_the_middle_is_a_run_of_its_own():
    """Image to image: the first step that is made has no history, whatever its place on the grid."""
    scheduler, x = SolverScheduler(solver="unipc_3", spacing="logsnr"), noise()
    outs = []
    for begin in (None, 5):
        scheduler.set_timesteps(9)
        if begin:
            scheduler.set_begin_index(begin)
        model, y = network(scheduler), x
        for t in scheduler.timesteps[5:]:
            y = scheduler.step(model(y, t), t, y, return_dict=False)[0]
        outs.append(y)
        assert (scheduler.begin_index, scheduler.step_index) == (5, 9)
    assert torch.equal(*outs)
    rest = TimeGrid(scheduler._nodes.all[5:], scheduler.process.schedule)
    assert torch.allclose(outs[0], integrate(scheduler.solver, MIXTURE, x, rest), rtol=0, atol=1e-6)


def test_steps_out_of_order_say_what_to_do():
    scheduler, x = EVODiffScheduler(), noise()
    with pytest.raises(SamplingError, match="call scheduler.set_timesteps"):
        scheduler.step(x, 0, x)
    loop(scheduler, x, 3)
    with pytest.raises(SamplingError, match="all 3 steps are done"):
        scheduler.step(x, 0, x)


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "evodiff.interop.diffusers")
    with pytest.raises(ConfigError, match=r"needs the package diffusers. Install it: pip install -e '\.\[diffusers\]'"):
        importlib.import_module("evodiff.interop.diffusers")
