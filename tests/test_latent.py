"""Latent models through diffusers, on tiny random pipelines built here."""

import dataclasses

import pipelines
import pytest
import torch

import evodiff
from evodiff.config import build, compose
from evodiff.errors import ConfigError
from evodiff.grid import LogSNR, grid_for
from evodiff.guidance import ClassifierFree, Unguided
from evodiff.models.latent import from_parts, latent, read_prompts
from evodiff.precision import products
from evodiff.runs.job import Job
from evodiff.sampling import generate
from evodiff.solvers.dpmpp import DPMSolverPP


def test_prompts_are_the_lines_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert read_prompts(str(path)) == ["a cat", "a dog"]
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(str(path))
    with pytest.raises(ConfigError, match=r"absent\.txt cannot be read"):
        read_prompts(str(tmp_path / "absent.txt"))


@pytest.mark.parametrize("threshold", ["clip", "dynamic"])
def test_latents_are_not_clipped_to_the_range_of_images(threshold):
    model = dataclasses.replace(build(compose("run", ["model=mixture"]).model), decode=lambda z: z)
    run = Job.compose(["model=mixture", f"threshold={threshold}", "nfe=4"]).run
    for sample in (lambda: run.plan(model), lambda: evodiff.sample(model, nfe=4, seeds=[0], threshold=threshold)):
        with pytest.raises(ConfigError, match=f"threshold={threshold} keeps images .* and this model samples latents"):
            sample()


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[diffusers\]'"):
        latent("anything")


@pytest.fixture
def unconditional(tmp_path):
    return pipelines.unconditional(tmp_path)


@pytest.fixture
def text_conditional(tmp_path):
    return pipelines.text_conditional(tmp_path)


def sample(model, guidance, labels):
    denoise = guidance(model, labels)
    solver = DPMSolverPP(order=2)
    grid = grid_for(4, solver, LogSNR(), denoise.schedule)
    return generate(denoise, solver, grid, range(2), model.shape, decode=model.decode)


def test_an_unconditional_pipeline_samples_latents_and_decodes_images(unconditional):
    model = latent(str(unconditional))
    assert (model.shape, model.num_classes) == ((3, 8, 8), 0)
    assert model.files and all(len(digest) == 64 for digest in model.files.values())
    # half-log-SNR of latent diffusion's schedule at both ends
    schedule = model.denoiser(None).schedule
    assert schedule.node(schedule.t_start).lam == pytest.approx(-4.4287, abs=1e-3)
    assert schedule.node(schedule.t_end).lam == pytest.approx(3.2504, abs=1e-3)
    out = sample(model, Unguided(), None)
    assert (out.x.shape, out.images.shape, out.nfe) == ((2, 3, 8, 8), (2, 3, 16, 16), 4)
    alone = model.decode(out.x[1:].float())
    assert torch.allclose(model.decode(out.x.float())[1:], alone, atol=1e-6)
    with pytest.raises(ConfigError, match=r"unconditional: remove model\.prompts"):
        (unconditional / "p.txt").write_text("a cat")
        latent(str(unconditional), prompts=str(unconditional / "p.txt"))


def test_latents_are_decoded_at_the_scale_they_were_trained_at(unconditional):
    from diffusers import VQModel

    decoder = VQModel.from_pretrained(unconditional / "vqvae").eval()
    z = torch.randn(2, 3, 8, 8)
    for scaling, divisor in ((1.0, 1.0), (0.5, 0.5), (None, decoder.config.scaling_factor)):
        model = latent(str(unconditional), scaling=scaling)
        with torch.no_grad():
            expected = decoder.decode(z / divisor).sample
        assert torch.allclose(model.decode(z), expected, atol=1e-5)
    # LSUN-Bedroom's were not scaled, and diffusers' default for its decoder is Stable Diffusion's
    assert decoder.config.scaling_factor == 0.18215
    assert compose("run", ["model=lsun_bedroom_ldm"]).model.scaling == 1.0


def test_our_denoiser_is_the_pipelines_noise_prediction(unconditional):
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(unconditional / "unet").eval()
    denoise = latent(str(unconditional)).denoiser(None)
    node = denoise.schedule.node(0.5)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = (x - node.sigma * unet(x, 499.0).sample) / node.alpha
    assert torch.allclose(denoise(x, node), expected, atol=1e-5)


def test_prompts_are_labels_and_guide(text_conditional):
    model = latent(str(text_conditional / "sd"), prompts=str(text_conditional / "prompts.txt"))
    assert (model.shape, model.num_classes) == ((4, 8, 8), 2)
    assert "prompts.txt" in model.files
    labels, x = torch.tensor([1, 0]), torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    node = model.denoiser(None).schedule.node(0.5)
    conditional, plain = model.denoiser(labels)(x, node), model.denoiser(None)(x, node)
    assert not torch.allclose(conditional[0], conditional[1])
    assert torch.allclose(plain[0], plain[1], atol=1e-6)
    guided = ClassifierFree(7.5)(model, labels)(x, node)
    assert torch.allclose(guided, plain + 7.5 * (conditional - plain), atol=1e-4)
    out = sample(model, ClassifierFree(7.5), labels)
    assert (out.images.shape, out.nfe) == ((2, 3, 16, 16), 4)


def test_a_text_model_without_prompts_says_so(text_conditional):
    with pytest.raises(ConfigError, match=r"conditioned on text: give model\.prompts"):
        latent(str(text_conditional / "sd"))
    with pytest.raises(ConfigError, match=r"absent cannot be read by diffusers"):
        latent(str(text_conditional / "absent"))


def parts(folder):
    from diffusers import LDMPipeline

    pipe = LDMPipeline.from_pretrained(folder)
    return pipe.unet, pipe.vqvae, pipe.scheduler


def test_pipelines_that_need_something_else_say_so(unconditional):
    import diffusers

    unet, decoder, scheduler = parts(unconditional)
    for other in (diffusers.EDMEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(ConfigError, match=f"scheduler, {type(other).__name__}, has no betas"):
            from_parts(unet, decoder, other)
    unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(ConfigError, match="U-Net has addition_embed_type=text_time: it needs more"):
        from_parts(unet, decoder, scheduler)
    unet.register_to_config(addition_embed_type=None, in_channels=9)
    with pytest.raises(ConfigError, match="U-Net has 9 channels in and 3 out: it needs more"):
        from_parts(unet, decoder, scheduler)


def test_a_schedule_that_ends_in_noise_alone_begins_just_below_it(unconditional):
    import diffusers

    unet, decoder, _ = parts(unconditional)
    schedule = from_parts(unet, decoder, diffusers.DDIMScheduler(rescale_betas_zero_snr=True)).schedule
    last, before = (schedule.node(t).alpha for t in (1.0, 0.999))
    assert 0 < before < 1e-3 and last == pytest.approx(before / 2)


def test_decoders_compute_in_float32_whatever_the_run_does():
    told = []

    def decode(z):
        told.append(torch.get_float32_matmul_precision())
        return z

    model = dataclasses.replace(build(compose("run", ["model=mixture"]).model), decode=decode)
    with products("bf16"):
        sample(model, Unguided(), None)
        assert torch.get_float32_matmul_precision() == "high"
    assert told == ["highest"]
