"""The schedulers inside diffusers' pipelines, tiny and random: the images of `evodiff run`, from the same noise."""

import pipelines
import pytest
import torch

import evodiff
from evodiff.grid import LogSNR
from evodiff.guidance import ClassifierFree
from evodiff.models.latent import latent
from evodiff.noise import SeededNoise
from evodiff.runs.job import Job, store_of
from evodiff.runs.sample import sample_run
from evodiff.sampling import to_uint8
from evodiff.schedule import DiscreteVP
from evodiff.solvers.evodiff import EVODiff

diffusers = pytest.importorskip("diffusers")
from evodiff.interop.diffusers import EVODiffScheduler, SolverScheduler  # noqa: E402

SEEDS = range(4)


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("name", "nfe"), [("evodiff", 6), ("unipc_3", 9), ("sde_dpmpp_2", 5)])
def test_a_pixel_pipeline_makes_our_images(unet, name, nfe, clip):
    theirs = diffusers.DDPMScheduler(clip_sample=clip)
    scheduler = SolverScheduler.from_config(theirs.config, solver=name, spacing="logsnr")
    pipe = diffusers.DDPMPipeline(unet, theirs)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    images = pipe(len(SEEDS), generators(), num_inference_steps=nfe, output_type="pt").images

    model = evodiff.wrap(
        lambda x, t: unet(x, t).sample, shape=(3, 8, 8), predicts="eps", schedule=DiscreteVP.linear(), check=False
    )
    threshold = "clip" if clip else "none"
    with torch.no_grad():
        ours = evodiff.sample(model, name, nfe, SEEDS, grid=LogSNR(), threshold=threshold, dtype=torch.float32)
    assert images.std() > 0.1
    assert torch.allclose(images, (ours.x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return pipelines.text_conditional(tmp_path_factory.mktemp("pipelines"))


def load(folder, **config):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    pipe.scheduler = EVODiffScheduler.from_config(pipe.scheduler.config, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts():
    labels = SeededNoise(SEEDS).labels(2).tolist()
    return [("a cat", "a dog")[label] for label in labels]


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
def test_stable_diffusion_makes_the_images_of_evodiff_run(stable_diffusion, results, final):
    pipe = load(stable_diffusion, final_sigmas_type=final, spacing="time_uniform")
    common = {"prompt": prompts(), "guidance_scale": 7.5, "num_inference_steps": 7}
    latents = pipe(**common, generator=generators(), output_type="latent").images
    images = pipe(**common, generator=generators(), output_type="pt").images

    texts = str(stable_diffusion / "prompts.txt")
    end = "euler" if final == "zero" else "released"
    ours = evodiff.sample(
        latent(str(stable_diffusion / "sd"), texts),
        EVODiff(final=end),
        nfe=7,
        seeds=SEEDS,
        grid="time_uniform",
        guidance=ClassifierFree(7.5),
        denoise_final=final == "zero",
        dtype=torch.float32,
    )
    assert torch.allclose(latents, ours.x, rtol=0, atol=1e-5 * latents.abs().max())
    job = Job.compose(
        ["model=sd15", f"model.pipeline={stable_diffusion / 'sd'}", f"model.prompts={texts}", "solver=evodiff", "nfe=7"]
        + ["grid=time_uniform", "guidance=classifier_free", f"denoise_final={str(final == 'zero').lower()}"]
        + [f"solver.final={end}"]
        + ["seeds=0-3", "protocol=none", "metrics=[]", "reference_run=null", "device=cpu"]
    )
    assert sample_run(job)
    run = torch.from_numpy(store_of(job).first(4))
    difference = (to_uint8(images * 2 - 1).int() - run.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3  # the run's state is float64


def test_a_pipeline_with_our_scheduler_is_saved_and_loaded(stable_diffusion, tmp_path):
    pipe = load(stable_diffusion, spacing="karras")
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is EVODiffScheduler and again.scheduler.config["spacing"] == "karras"
    common = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
    before, after = (p(**common, generator=torch.Generator().manual_seed(0)).images for p in (pipe, again))
    assert torch.equal(before, after)


def test_a_pipeline_takes_timesteps_and_sigmas(stable_diffusion):
    pipe = load(stable_diffusion)
    common = {"prompt": "a cat", "output_type": "latent"}
    plain = pipe(**common, num_inference_steps=5, generator=torch.Generator().manual_seed(0)).images
    timesteps, sigmas = pipe.scheduler.timesteps.tolist(), pipe.scheduler.sigmas.tolist()
    for nodes in ({"timesteps": timesteps}, {"sigmas": sigmas}):
        again = pipe(**common, **nodes, generator=torch.Generator().manual_seed(0)).images
        assert torch.allclose(again, plain, atol=1e-4)


def test_image_to_image_begins_in_the_middle(stable_diffusion):
    pipe = load(stable_diffusion)
    to_image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    to_image.set_progress_bar_config(disable=True)
    calls = []
    to_image.unet.register_forward_pre_hook(lambda module, args: calls.append(float(args[1])))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = to_image("a dog", image, strength=0.5, num_inference_steps=8, output_type="pt").images
    assert torch.isfinite(out).all() and out.shape == (1, 3, 16, 16)
    assert calls == pipe.scheduler.timesteps[4:].tolist()
