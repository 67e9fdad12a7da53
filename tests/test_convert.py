"""Published checkpoints become safetensors."""

import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import ADM, CLASSIFIER, DDIM, SCORE_SDE, equal, official_edm_pickle, saved, weights
from safetensors.torch import save_file

from evodiff.checkpoints import checkpoint as module
from evodiff.checkpoints import load
from evodiff.checkpoints.checkpoint import convert
from evodiff.checkpoints.description import Description, described_in
from evodiff.checkpoints.pickles import read_edm, read_torch
from evodiff.cli import main
from evodiff.errors import CheckpointError, ConfigError, StoreError
from evodiff.models.edm import edm
from evodiff.models.guided_diffusion import guided_diffusion
from evodiff.models.loading import load_network
from evodiff.models.networks import build
from evodiff.models.score_sde import score_sde
from evodiff.schedule import Node

FAKES = Path(__file__).parents[2] / "shared" / "reference" / "fake_checkpoints"

pytestmark = pytest.mark.usefixtures("cache")


# --- the layouts --------------------------------------------------------------------------------------------


def test_a_pickle_written_by_the_official_classes(tmp_path):
    """Layout of NVlabs/edm, each weight one constant; its embedded source raises SystemExit if executed."""
    path = official_edm_pickle(tmp_path)
    assert b"raise SystemExit" in path.read_bytes()
    found = load(path)
    assert found.architecture == "edm" and found.config["class_name"] == "VPPrecond"
    assert found.config["channel_mult"] == [1, 2] and found.config["img_resolution"] == 16
    network = build("edm", found.config)
    network.load_state_dict(found.tensors, assign=True)
    assert list(read_edm(path)[2]) == list(network.state_dict())  # torch's order: parameters, buffers, children
    assert found.tensors["model.map_layer0.weight"].unique().tolist() == [1 / 64]
    assert found.tensors["model.map_layer0.bias"].unique().tolist() == [2 / 64]
    assert found.schedule == {"type": "EDM", "t_start": 80.0, "t_end": 0.002}


def score_sde_file(path, zipped):
    """As score_sde saves it: averages without names, a numpy scalar in the optimiser, frozen Fourier frequencies."""
    model = weights("score_sde", SCORE_SDE)
    trained = [v for k, v in model.items() if k not in ("sigmas", "all_modules.0.W")]
    content = {
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(2e-4) * np.minimum(1.0, 1.0)}]},
        "model": OrderedDict((f"module.{k}", v) for k, v in model.items()),
        "ema": {"decay": 0.999, "num_updates": 5, "shadow_params": [v + 1 for v in trained]},
        "step": 5,
    }
    return saved(path, content, zipped), model


def test_others_may_read_what_is_written_as_far_as_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        path = convert(official_edm_pickle(tmp_path), tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    assert [oct(p.stat().st_mode & 0o777) for p in (path, path.with_suffix(".json"))] == ["0o640"] * 2


@pytest.mark.parametrize("zipped", [True, False])
def test_score_sde_takes_the_nameless_averages(tmp_path, zipped):
    path, model = score_sde_file(tmp_path / "checkpoint_8.pth", zipped)
    found = load(convert(path, description=Description("score_sde", SCORE_SDE)))
    untrained = ("sigmas", "all_modules.0.W")
    assert equal(found.tensors, {k: v if k in untrained else v + 1 for k, v in model.items()})
    assert found.schedule == {"type": "EDM", "t_start": 50.0, "t_end": 0.01}
    raw = load(convert(path, tmp_path / "raw.safetensors", Description("score_sde", SCORE_SDE), ema=False))
    assert equal(raw.tensors, model)


def test_weights_kept_in_float64_compute_in_float32(tmp_path):
    double = {name: weight.double() for name, weight in weights("guided_diffusion", ADM).items()}
    file = convert(saved(tmp_path / "a.pt", double), description=Description("", ADM))
    model = guided_diffusion(str(file))
    x, node = torch.zeros(1, *model.shape), model.schedule.node(0.5)
    assert model.denoiser(torch.tensor([1]))(x, node).dtype == torch.float32


def test_a_network_and_its_classifier_of_one_name_are_two_files(tmp_path):
    """guided-diffusion's trainers call both model100000.pt."""
    names = {}
    for kind, config in (("guided_diffusion", ADM), ("guided_diffusion_classifier", CLASSIFIER)):
        (tmp_path / kind).mkdir()
        source = saved(tmp_path / kind / "model100000.pt", weights(kind, config))
        names[kind] = str(convert(source, source.with_suffix(".safetensors"), Description(kind, config)))
    files = guided_diffusion(*names.values()).files
    assert sorted(files) == ["classifier/model100000.safetensors", "model100000.safetensors"]


def test_the_name_of_a_schedule_is_none_of_an_edm_network(tmp_path):
    file = str(convert(official_edm_pickle(tmp_path)))
    with pytest.raises(ConfigError, match=r"schedule='edm' is no noise schedule; expected null, EDM's own"):
        edm(file, schedule="edm")


def test_networks_go_to_devices_without_float64(tmp_path, mps):
    """The noise levels of score_sde's files are in float64; there they become float32, and elsewhere they stay."""
    path, _ = score_sde_file(tmp_path / "checkpoint_8.pth", True)
    file = str(convert(path, description=Description("score_sde", SCORE_SDE)))
    net, _ = load_network(file, "score_sde", mps)
    assert net.sigmas.dtype == torch.float32
    exact, _ = load_network(file, "score_sde", "cpu")
    assert exact.sigmas.dtype == torch.float64
    assert torch.equal(net.sigmas, exact.sigmas.float())


def test_a_ve_network_with_positions_is_told_the_index_of_its_noise_level(tmp_path):
    """score_sde trains those on `num_scales` levels, the largest first; its Fourier networks get sigma itself."""
    config = {**SCORE_SDE, "model": {**SCORE_SDE["model"], "embedding_type": "positional"}}
    path = saved(tmp_path / "ve.pt", weights("score_sde", config))
    model = score_sde(str(convert(path, description=Description("score_sde", config))))
    denoiser = model.denoiser(None)
    told = []
    for sigma in denoiser.network.sigmas.tolist():
        _, own = denoiser.process.to_native(torch.zeros(1, *model.shape), denoiser.schedule.node(2 * sigma))
        assert own.sigma == pytest.approx(sigma)  # in images of 0 to 1
        told.append(denoiser.process.label(own))
    assert told == list(range(10))
    labels = denoiser.process.label
    assert labels(Node(1.0, 1.0, 60.0)) == 0 and labels(Node(1.0, 1.0, 0.005)) == 9


def test_score_sde_averages_of_another_network_are_refused(tmp_path):
    path, _ = score_sde_file(tmp_path / "checkpoint_8.pth", True)
    content = read_torch(path)
    content["ema"]["shadow_params"].pop()
    with pytest.raises(CheckpointError, match="EMA weights do not fit"):
        convert(saved(tmp_path / "cut.pth", content), description=Description("score_sde", SCORE_SDE))
    content["ema"]["shadow_params"].append("no tensor")
    with pytest.raises(CheckpointError, match="EMA weights do not fit"):
        convert(saved(tmp_path / "strange.pth", content), description=Description("score_sde", SCORE_SDE))
    with pytest.raises(CheckpointError, match="holds a dict of ema, model"):
        convert(saved(tmp_path / "numbers.pth", {"model": 3, "ema": 4}))


@pytest.mark.parametrize("layout", ["list", "plain", "parallel"])
def test_ddim_layouts(tmp_path, layout):
    model, ema = weights("ddim", DDIM), weights("ddim", DDIM, shift=1.0)
    parallel = {f"module.{k}": v for k, v in model.items()}
    content = {
        "list": [parallel, {"state": {}, "param_groups": []}, 3, 1000, ema],
        "plain": ema,
        "parallel": {f"module.{k}": v for k, v in ema.items()},
    }[layout]
    found = load(convert(saved(tmp_path / "ckpt.pth", content), description=Description("ddim", DDIM)))
    assert equal(found.tensors, ema)
    schedule = {"betas": "linear", "beta_start": 1e-4, "beta_end": 0.03, "num_timesteps": 500}
    assert found.schedule == {"type": "DiscreteVP", **schedule}


def test_a_ddim_list_without_averages_must_be_asked_for(tmp_path):
    model = weights("ddim", DDIM)
    path = saved(tmp_path / "ckpt.pth", [model, {}, 3, 1000])
    with pytest.raises(CheckpointError, match="no EMA weights"):
        convert(path, description=Description("ddim", DDIM))
    assert equal(load(convert(path, description=Description("ddim", DDIM), ema=False)).tensors, model)


def test_adm_with_arguments_from_a_json_beside_it(tmp_path):
    model = weights("guided_diffusion", ADM)
    path = saved(tmp_path / "mine-ema-0.9999.pt", OrderedDict((k, v.half()) for k, v in model.items()))
    (tmp_path / "mine.json").write_text(json.dumps({"constructor_kwargs": ADM}))
    found = load(path)
    assert found.config["num_head_channels"] == 16
    assert equal(found.tensors, {k: v.half().float() for k, v in model.items()})
    assert {v.dtype for v in found.tensors.values()} == {torch.float32}


def test_weights_are_mapped_not_copied(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this system")
    found = load(convert(saved(tmp_path / "a.pt", weights("guided_diffusion", ADM)), description=Description("", ADM)))
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(found.path) in line]
    where = found.tensors["out.2.weight"].data_ptr()
    assert any(int(low, 16) <= where < int(high, 16) for low, high in ranges)


def test_a_published_file_is_converted_once(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    (tmp_path / "a.json").write_text(json.dumps({"config": ADM}))
    first = load(path)
    monkeypatch.setattr(module, "read_weights", lambda *_: pytest.fail("converted a second time"))
    second = load(path)
    assert second.path == first.path and second.sha256 == first.sha256
    assert load(first.path).config == first.config  # a converted file says itself what it is


def test_a_file_that_changed_is_converted_again(tmp_path):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    (tmp_path / "a.json").write_text(json.dumps({"config": ADM}))
    before = load(path)
    saved(path, weights("guided_diffusion", ADM, shift=1.0))
    os.utime(path, ns=(1, 1))
    after = load(path)
    assert after.sha256 != before.sha256
    assert torch.equal(after.tensors["out.2.bias"], before.tensors["out.2.bias"] + 1)


# --- the command, and files of others ----------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    (tmp_path / "net.json").write_text(json.dumps({"constructor_kwargs": ADM | {"num_classes": 9}}))
    out = tmp_path / "b.safetensors"
    command = ["convert", str(path), "--config", str(tmp_path / "net.json"), "num_classes=4", "--out", str(out)]
    assert main(command) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["architecture"] == "guided_diffusion" and about["config"]["num_classes"] == 4
    said = capsys.readouterr().out
    assert about["source"]["sha256"] in said and "schedule type=DiscreteVP, betas=linear" in said
    with pytest.raises(SystemExit):
        main([*command, "--like", "cifar10_ddpm"])
    assert "not allowed with argument --config" in capsys.readouterr().err
    assert main(["convert", str(out)]) == 1
    assert "converted already" in capsys.readouterr().err
    assert main(["convert", str(path), "--out", str(tmp_path / "c.pt")]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent.pt")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_json_of_somebody_else_is_not_overwritten(tmp_path):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="would be overwritten"):
        convert(path, tmp_path / "notes.safetensors", Description("", ADM))
    assert notes.read_text() == '{"mine": 1}' and not (tmp_path / "notes.safetensors").exists()
    notes.write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match="notes.json is not a file .* would be overwritten"):
        convert(path, tmp_path / "notes.safetensors", Description("", ADM))


def test_weights_of_somebody_else_are_not_overwritten(tmp_path, capsys):
    model = weights("guided_diffusion", ADM)
    source, other = tmp_path / "a.safetensors", tmp_path / "other.safetensors"
    save_file(model, source)
    (tmp_path / "net.json").write_text(json.dumps({"constructor_kwargs": ADM}))
    for content in (source.read_bytes(), b"notes"):
        other.write_bytes(content)
        before = {p.name: p.read_bytes() for p in tmp_path.glob("*.*")}
        for out in (source, tmp_path / "." / "a.safetensors", other):
            command = ["convert", str(source), "--config", str(tmp_path / "net.json"), "--out", str(out)]
            assert main(command) == 1
            said = capsys.readouterr().err
            assert f"{out} is not a file of `evodiff convert` and would be overwritten" in said
        assert {p.name: p.read_bytes() for p in tmp_path.glob("*.*")} == before


def test_what_was_converted_is_overwritten_also_where_it_was_cut_short(tmp_path):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    out = convert(path, tmp_path / "out.safetensors", Description("", ADM))
    whole = out.read_bytes()
    for before in (whole, whole[:1000]):
        out.write_bytes(before)
        assert convert(path, out, Description("", ADM)).read_bytes() == whole


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_stops_leaves_nothing(tmp_path, cache, monkeypatch, error):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    (tmp_path / "a.json").write_text(json.dumps({"config": ADM}))

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", half)
        with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
            load(path)
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    assert load(path).architecture == "guided_diffusion"


# --- the reference files, where they are at hand ------------------------------------------------------------

NETWORK_INPUTS = {
    "edm": (("x", "sigma", "class_labels"), "D"),
    "score_sde": (("x", "labels"), "out"),
    "ddim": (("x", "t"), "eps"),
    "guided_diffusion": (("x", "t", "y"), "out"),
    "guided_diffusion_classifier": (("x", "t"), "logits"),
}


def fakes():
    return sorted(p for p in FAKES.glob("*") if p.suffix in (".pkl", ".pt", ".pth", ".ckpt"))


@pytest.mark.slow
@pytest.mark.skipif(not fakes(), reason="reference data not at hand")
@pytest.mark.parametrize("path", fakes(), ids=lambda p: p.name)
def test_reference_checkpoints_give_the_outputs_recorded_for_them(path):
    stem = path.name.replace(".nosrc", "").rsplit(".", 1)[0]
    expected = np.load(FAKES / f"{'ddim_fake' if stem.startswith('ddim') else stem}.expected.npz")
    found = load(path)
    network = build(found.architecture, found.config).eval()
    network.load_state_dict(found.tensors, assign=True)
    names, output = NETWORK_INPUTS[found.architecture]
    if found.architecture == "guided_diffusion" and found.config["num_classes"] is None:
        names = ("x", "t")
    inputs = [torch.from_numpy(expected[name]) for name in names if name in expected]
    with torch.no_grad():
        out = network(*inputs)
    wanted = torch.from_numpy(expected[output])
    assert (out - wanted).norm() <= 2e-5 * wanted.norm()
    if path.with_suffix(".json").exists():
        stated = described_in(path.with_suffix(".json"))
        assert stated and all(found.config[k] == v for k, v in stated.config.items())


def test_weights_under_two_names_become_two(tmp_path):
    model = weights("guided_diffusion", ADM)
    first, second = [name for name in model if name.endswith("in_layers.0.weight") and len(model[name]) == 32][:2]
    model[second] = model[first]
    found = load(convert(saved(tmp_path / "a.pt", model), description=Description("guided_diffusion", ADM)))
    assert equal(found.tensors, model)


def test_weights_in_eight_bits_are_widened(tmp_path):
    model = weights("guided_diffusion", ADM)
    narrow = {name: value.to(torch.float8_e5m2) for name, value in model.items()}
    found = load(convert(saved(tmp_path / "a.pt", narrow), description=Description("guided_diffusion", ADM)))
    assert equal(found.tensors, {name: value.float() for name, value in narrow.items()})


def test_weights_without_content_are_refused(tmp_path):
    model = {name: value.to("meta") for name, value in weights("guided_diffusion", ADM).items()}
    with pytest.raises(CheckpointError, match="is no dense tensor"):
        convert(saved(tmp_path / "a.pt", model), description=Description("guided_diffusion", ADM))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"type": "LinearVP"}, "type=LinearVP has no betas, as this network needs; use DiscreteVP"),
        ({"type": ["DiscreteVP"]}, "type=.'DiscreteVP'. does not exist; possible: EDM"),
        (["DiscreteVP"], "is no mapping; expected `type`"),
    ],
)
def test_schedules_that_a_network_cannot_have_are_refused(tmp_path, schedule, message):
    path = saved(tmp_path / "adm.pt", weights("guided_diffusion", ADM))
    path.with_suffix(".json").write_text(json.dumps({"config": ADM, "schedule": schedule}))
    with pytest.raises(ConfigError, match=message):
        guided_diffusion(str(path))


def test_a_schedule_beside_a_file_may_leave_out_its_defaults(tmp_path):
    path = saved(tmp_path / "adm.pt", weights("guided_diffusion", ADM))
    path.with_suffix(".json").write_text(json.dumps({"config": ADM, "schedule": {"type": "DiscreteVP"}}))
    assert len(guided_diffusion(str(path)).schedule.log_alphas) == 1000
