"""What network a checkpoint belongs to, and what noise that was trained on."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_files import ADM, CLASSIFIER, DDIM, SCORE_SDE, saved, weights

from evodiff.checkpoints import load
from evodiff.checkpoints.checkpoint import convert
from evodiff.checkpoints.description import Description, fingerprint
from evodiff.checkpoints.layouts import read_weights
from evodiff.checkpoints.registry import find
from evodiff.errors import CheckpointError, ConfigError
from evodiff.models.ddim import ddim
from evodiff.models.guided_diffusion import guided_diffusion
from evodiff.models.loading import load_network
from evodiff.models.networks import build

FAKES = Path(__file__).parents[2] / "shared" / "reference" / "fake_checkpoints"

pytestmark = pytest.mark.usefixtures("cache")


def test_arguments_that_do_not_fit_are_refused_with_the_first_weight(tmp_path, cache):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    with pytest.raises(CheckpointError, match=r"label_emb\.weight is \[4, 128\], \[5, 128\] is expected"):
        convert(path, description=Description("", ADM), overrides=["num_classes=5"])
    with pytest.raises(ConfigError, match="no guided_diffusion network can be built from its arguments"):
        convert(path, description=Description("", ADM), overrides=["model_channels=many"])
    with pytest.raises(ConfigError, match="does not know num_clases"):
        convert(path, description=Description("", ADM), overrides=["num_clases=4"])
    with pytest.raises(CheckpointError, match="weights of guided_diffusion, not of ddim"):
        convert(path, description=Description("ddim", DDIM))
    with pytest.raises(ConfigError, match="not all arguments of a network can be told from its weights"):
        convert(path)
    assert not cache.exists() or not list(cache.rglob("*.safetensors"))


def test_weights_with_the_shapes_of_a_published_network_are_recognised(tmp_path, monkeypatch):
    from evodiff.checkpoints import registry

    model = weights("guided_diffusion", ADM)
    manifest = tmp_path / "manifest.yaml"
    entry = {"kind": "model", "file": "x.pt", "licence": "MIT", "architecture": "guided_diffusion", "config": ADM}
    entry["schedule"] = {"type": "DiscreteVP", "betas": "cosine", "num_timesteps": 7}
    entry["fingerprint"] = fingerprint(model)
    manifest.write_text(json.dumps({"published": entry}))
    monkeypatch.setattr(registry, "MANIFEST", manifest)
    found = load(saved(tmp_path / "another-name.pt", model))
    assert found.config == ADM and found.schedule["betas"] == "cosine"
    # a file of the constructor's arguments, as guided-diffusion has them, says nothing of the schedule
    (tmp_path / "another-name.json").write_text(json.dumps({"constructor_kwargs": ADM}))
    assert load(saved(tmp_path / "another-name.pt", model)).schedule["num_timesteps"] == 7
    assert fingerprint(model) != fingerprint(weights("guided_diffusion", ADM | {"num_classes": 5}))


def schedule_after(path, description, *overrides):
    return load(convert(path, path.with_suffix(".safetensors"), description, overrides)).schedule


def test_what_the_asker_says_of_the_noise_is_heard(tmp_path):
    """In the official names where the configuration has them, and else as schedule.key=value."""
    ddim = saved(tmp_path / "ddim.ckpt", weights("ddim", DDIM))
    changed = ["diffusion.beta_end=0.05", "diffusion.num_diffusion_timesteps=100"]
    found = schedule_after(ddim, Description("ddim", DDIM), *changed)
    assert (found["beta_end"], found["num_timesteps"]) == (0.05, 100)
    linear = {"type": "DiscreteVP", "betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_timesteps": 500}
    with pytest.raises(ConfigError, match=r"changes the schedule, which is given apart; .* schedule\.key=value"):
        schedule_after(ddim, Description("ddim", DDIM, linear), "diffusion.beta_end=0.05")
    adm = saved(tmp_path / "adm.pt", weights("guided_diffusion", ADM))
    given = Description("guided_diffusion", ADM, linear)
    assert schedule_after(adm, given, "schedule.beta_end=0.03") == linear | {"beta_end": 0.03}
    cosine = {"type": "DiscreteVP", "betas": "cosine", "num_timesteps": 500}
    assert schedule_after(adm, given, "schedule.betas=cosine") == cosine
    assert schedule_after(adm, given, "schedule.type=LinearVP") == {"type": "LinearVP"}
    with pytest.raises(ConfigError, match="betas=quad does not exist; possible: linear, cosine, scaled_linear"):
        schedule_after(adm, given, "schedule.betas=quad")


def test_entries_whose_arguments_tell_the_noise_state_it_once(tmp_path):
    """Else `--like NAME model.beta_max=10` would change the one and sample with the other."""
    for name in ("cifar10_ddpm", "cifar10_score_sde", "cifar10_score_sde_ve"):
        assert not find(name).schedule
    assert find("imagenet64_adm").schedule["betas"] == "cosine"


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        ({"class_name": "EDMPrecond"}, (80.0, 0.002)),
        ({"class_name": "EDMPrecond", "sigma_min": 0.01, "sigma_max": 50}, (50.0, 0.01)),
        ({"class_name": "VPPrecond"}, (80.0, 0.002)),
        # sigma(t)^2 = exp(0.5 beta_d t^2 + beta_min t) - 1, at t = 1 and t = epsilon_t
        (
            {"class_name": "VPPrecond", "beta_d": 10, "epsilon_t": 0.01},
            (math.expm1(5.1) ** 0.5, math.expm1(0.0015) ** 0.5),
        ),
        ({"class_name": "VEPrecond"}, (80.0, 0.02)),
        ({"class_name": "VEPrecond", "sigma_min": 0.05, "sigma_max": 20}, (20.0, 0.05)),
    ],
)
def test_an_edm_network_is_sampled_between_the_noise_levels_it_has(tmp_path, arguments, limits):
    network = {"img_resolution": 8, "img_channels": 1, "model_channels": 16, "channel_mult": [1], "num_blocks": 1}
    config = {**network, "attn_resolutions": [], "model_type": "SongUNet", **arguments}
    path = saved(tmp_path / "edm.pt", weights("edm", config))
    found = schedule_after(path, Description("edm", config))
    assert (found["t_start"], found["t_end"]) == pytest.approx(limits, rel=1e-4)  # the network has them in float32


@pytest.mark.parametrize(
    ("architecture", "config", "change", "only"),
    [
        ("score_sde", SCORE_SDE, {"model": {**SCORE_SDE["model"], "nonlinearity": "relu"}}, "nonlinearity=swish"),
        ("score_sde", SCORE_SDE, {"model": {**SCORE_SDE["model"], "conv_size": 7}}, "conv_size=3"),
        ("guided_diffusion", ADM, {"dims": 1}, "dims=2"),
    ],
)
def test_networks_that_compute_otherwise_are_refused(architecture, config, change, only):
    with pytest.raises(ConfigError, match=f"of this network differs; only {only} is known here"):
        build(architecture, {**config, **change})


def adm_pair(folder, classifier=CLASSIFIER, schedule=None):
    folder.mkdir()
    files = []
    for kind, config in (("guided_diffusion", ADM), ("guided_diffusion_classifier", classifier)):
        of = Description(kind, config, schedule if "classifier" in kind else None)
        files.append(str(convert(saved(folder / f"{kind}.pt", weights(kind, config)), description=of)))
    return files


def test_a_classifier_of_other_images_classes_or_noise_is_refused(tmp_path):
    assert guided_diffusion(*adm_pair(tmp_path / "fits")).classifier is not None
    cosine = {"type": "DiscreteVP", "betas": "cosine", "num_timesteps": 1000}
    for fact, pair in {
        "image_size is 16, the network's 8": adm_pair(tmp_path / "a", CLASSIFIER | {"image_size": 16}),
        "classes is 3, the network's 4": adm_pair(tmp_path / "b", CLASSIFIER | {"out_channels": 3}),
        "schedule is .*cosine.*, the network's .*linear": adm_pair(tmp_path / "c", schedule=cosine),
    }.items():
        with pytest.raises(ConfigError, match=f"is none for this network: its {fact}"):
            guided_diffusion(*pair)


def test_ddims_network_is_asked_at_the_times_it_was_trained_on(tmp_path):
    """eps from D(x; t_i) is the network's own answer to x in its own scale at the label i."""
    file = str(convert(saved(tmp_path / "ckpt.pth", weights("ddim", DDIM)), description=Description("ddim", DDIM)))
    net, _ = load_network(file, "ddim", "cpu")
    for schedule in ("own", "edm"):
        model = ddim(file, schedule=schedule)
        denoiser = model.denoiser(None)
        for i in (0, 250, 499):
            own = ddim(file).schedule.node((i + 1) / 500)
            node = model.schedule.node(own.t if schedule == "own" else own.kappa)
            x_0_and_noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(i))
            native = own.alpha * x_0_and_noise
            x = node.alpha * x_0_and_noise
            eps = (x - node.alpha * denoiser(x, node)) / node.sigma
            torch.testing.assert_close(eps, net(native, torch.tensor([float(i)])), rtol=1e-3, atol=2e-3)


def test_weights_that_trainers_do_not_average_are_remarked_on(tmp_path, capsys):
    for name, remark in (("model010000.pt", True), ("ema_0.9999_010000.pt", False)):
        path = saved(tmp_path / name, weights("guided_diffusion", ADM))
        out = convert(path, tmp_path / f"{remark}.safetensors", Description("", ADM))
        assert ("there may be an ema_RATE_010000.pt" in capsys.readouterr().err) == remark
        assert json.loads(out.with_suffix(".json").read_text())["weights"] == "only"


def test_a_file_that_cannot_be_read_is_told(tmp_path, monkeypatch, capsys):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read: Permission denied"):
        read_weights(path)
