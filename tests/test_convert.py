"""Published checkpoints become safetensors; nothing in them is executed; what cannot be read is refused by name."""

import gzip
import io
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evodiff.checkpoints import checkpoint as module
from evodiff.checkpoints import load
from evodiff.checkpoints.checkpoint import convert
from evodiff.checkpoints.description import Description, described_in, fingerprint
from evodiff.checkpoints.pickles import read_edm, read_torch
from evodiff.cli import main
from evodiff.errors import CheckpointError, ConfigError, StoreError
from evodiff.models.networks import build

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
FAKES = Path(__file__).parents[2] / "shared" / "reference" / "fake_checkpoints"

ADM = {
    **{"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1},
    **{"attention_resolutions": [2], "channel_mult": [1, 1], "num_classes": 4, "num_head_channels": 16},
    **{"use_scale_shift_norm": True, "resblock_updown": True},
}
DDIM = {
    "model": {
        **{"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4]},
        **{"dropout": 0.1, "resamp_with_conv": True},
    },
    "data": {"image_size": 8, "channels": 3},
    "diffusion": {"beta_start": 1e-4, "beta_end": 0.03, "num_diffusion_timesteps": 500},
}
SCORE_SDE = {
    "model": {
        **{"name": "ncsnpp", "nf": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.1},
        **{
            "resamp_with_conv": True,
            "conditional": True,
            "fir": True,
            "fir_kernel": [1, 3, 3, 1],
            "skip_rescale": True,
        },
        **{"resblock_type": "biggan", "progressive": "none", "progressive_input": "residual", "scale_by_sigma": True},
        **{"progressive_combine": "sum", "embedding_type": "fourier", "fourier_scale": 16, "init_scale": 0.0},
        **{"sigma_min": 0.01, "sigma_max": 50, "num_scales": 10},
    },
    "data": {"image_size": 8, "num_channels": 3, "centered": False},
    "training": {"sde": "vesde"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(architecture, config, shift=0.0):
    torch.manual_seed(0)
    return OrderedDict((k, v + shift) for k, v in build(architecture, config).state_dict().items())


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def saved(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


# --- the layouts --------------------------------------------------------------------------------------------


def test_a_pickle_written_by_the_official_classes(tmp_path):
    """Layout of NVlabs/edm, each weight one constant; its embedded source raises SystemExit if executed."""
    path = tmp_path / "baseline.pkl"
    path.write_bytes(gzip.decompress((GOLDEN / "edm_vp_constant.pkl.gz").read_bytes()))
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


@pytest.mark.parametrize("zipped", [True, False])
def test_score_sde_takes_the_nameless_averages(tmp_path, zipped):
    path, model = score_sde_file(tmp_path / "checkpoint_8.pth", zipped)
    found = load(convert(path, description=Description("score_sde", SCORE_SDE)))
    untrained = ("sigmas", "all_modules.0.W")
    assert equal(found.tensors, {k: v if k in untrained else v + 1 for k, v in model.items()})
    assert found.schedule == {"type": "EDM", "t_start": 50.0, "t_end": 0.01}
    raw = load(convert(path, tmp_path / "raw.safetensors", Description("score_sde", SCORE_SDE), ema=False))
    assert equal(raw.tensors, model)


def test_score_sde_averages_of_another_network_are_refused(tmp_path):
    path, _ = score_sde_file(tmp_path / "checkpoint_8.pth", True)
    content = read_torch(path)
    content["ema"]["shadow_params"].pop()
    with pytest.raises(CheckpointError, match="EMA weights do not fit"):
        convert(saved(tmp_path / "cut.pth", content), description=Description("score_sde", SCORE_SDE))


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


# --- what the network is ------------------------------------------------------------------------------------


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
    assert fingerprint(model) != fingerprint(weights("guided_diffusion", ADM | {"num_classes": 5}))


def test_the_command(tmp_path, capsys):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM))
    (tmp_path / "net.json").write_text(json.dumps({"constructor_kwargs": ADM | {"num_classes": 9}}))
    out = tmp_path / "b.safetensors"
    command = ["convert", str(path), "--config", str(tmp_path / "net.json"), "num_classes=4", "--out", str(out)]
    assert main(command) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["architecture"] == "guided_diffusion" and about["config"]["num_classes"] == 4
    assert about["source"]["sha256"] in capsys.readouterr().out
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


# --- hostile files ------------------------------------------------------------------------------------------


class Reduce:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """(payload, its forbidden global, a check that nothing was executed) for each way to run code from a pickle."""
    mark = tmp_path / "executed"
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "imported_by_pickle.py").write_text(
        f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Weights: pass\n"
    )

    def make(how):
        if how == "os.system":
            payload, name = Reduce(os.system, f"touch {mark}"), f"{os.system.__module__}.system"
        elif how == "builtins.eval":
            payload, name = Reduce(eval, f"open({str(mark)!r}, 'w')"), "eval"
        else:
            import imported_by_pickle

            payload, name = imported_by_pickle.Weights(), "imported_by_pickle.Weights"
            mark.unlink()
        return payload, name

    yield make
    assert not mark.exists()
    sys.modules.pop("imported_by_pickle", None)


WAYS = ["os.system", "builtins.eval", "a class that imports"]


def forget():
    sys.modules.pop("imported_by_pickle", None)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles(tmp_path, hostile, how, protocol):
    payload, name = hostile(how)
    if protocol == 0 and how == "a class that imports":
        name = "copy_reg._reconstructor"  # comes before the class there
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"ema": payload}, protocol))
    forget()
    with pytest.raises(CheckpointError, match=rf"refers to \S*{name}"):
        load(path)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_torch_files(tmp_path, hostile, how, zipped):
    payload, name = hostile(how)
    path = saved(tmp_path / "weights.pt", {**weights("guided_diffusion", ADM), "x": payload}, zipped)
    forget()
    with pytest.raises(CheckpointError, match=rf"refers to \S*{name}"):
        load(path)


class Pickled(bytes):
    """A pickle that is to stand inside another."""


def called(name, *args):
    """A pickle of `name(*args)`, of a function that need not exist here."""
    module_name, _, function = name.rpartition(".")
    body = b"".join((arg if isinstance(arg, Pickled) else pickle.dumps(arg, 3))[2:-1] for arg in args)
    return Pickled(
        pickle.PROTO + b"\x03" + pickle.GLOBAL + f"{module_name}\n{function}\n".encode() + b"(" + body + b"tR."
    )


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("container", ["pickle", "torch", "torch legacy"])
def test_hostile_pickles_inside_a_storage(tmp_path, hostile, how, container):
    payload, name = hostile(how)
    inner = io.BytesIO()
    if container == "pickle":
        pickle.dump(payload, inner, 2)
    else:
        torch.save(payload, inner, _use_new_zipfile_serialization=container == "torch")
    path = tmp_path / "weights.pkl"
    path.write_bytes(called("torch.storage._load_from_bytes", inner.getvalue()))
    forget()
    with pytest.raises(CheckpointError, match=rf"refers to \S*{name}"):
        load(path)


@pytest.mark.parametrize(
    "name",
    ["os.system", "posix.system", "builtins.getattr", "torch.load", "numpy.load", "torch_utils.persistence.exec"],
)
def test_no_other_global_is_known(tmp_path, name):
    path = tmp_path / "weights.pkl"
    path.write_bytes(called(name, "touch executed"))
    with pytest.raises(CheckpointError, match=f"refused: it refers to {name}, "):
        load(path)


def test_the_source_inside_an_edm_pickle_is_not_looked_at(tmp_path):
    source = f"open({str(tmp_path / 'executed')!r}, 'w')"
    meta = {
        "type": "class",
        "version": 6,
        "module_src": source,
        "class_name": "EDMPrecond",
        "state": {"_init_kwargs": {}},
    }
    path = tmp_path / "weights.pkl"
    path.write_bytes(called("torch_utils.persistence._reconstruct_persistent_obj", meta))
    with pytest.raises(CheckpointError, match="not one of NVlabs/edm"):
        load(path)
    assert not (tmp_path / "executed").exists()


def test_a_file_cannot_change_the_stand_ins(tmp_path):
    """BUILD sets attributes on what a global stands for: they must be gone with the file."""
    path = tmp_path / "weights.pkl"
    head = pickle.PROTO + b"\x02" + pickle.GLOBAL + b"torch.nn.modules.container\nModuleDict\n"
    path.write_bytes(head + pickle.dumps((None, {"__setstate__": 1}), 2)[2:-1] + pickle.BUILD + b".")
    with pytest.raises(CheckpointError):
        load(path)
    test_a_pickle_written_by_the_official_classes(tmp_path)


def edm_pickle(path, network):
    """A pickle of NVlabs/edm with this object under `ema`."""
    header = b"}" + pickle.BINUNICODE + b"\x03\x00\x00\x00ema"
    path.write_bytes(pickle.PROTO + b"\x03" + header + network[2:-1] + b"s.")
    return path


def persistent(name, state):
    """A persistent object whose `state` is a pickle, or plain data."""
    body = state if isinstance(state, Pickled) else Pickled(pickle.dumps(state, 3))
    meta = pickle.MARK + pickle.dumps("class_name", 3)[2:-1] + pickle.dumps(name, 3)[2:-1]
    meta = b"}" + meta + pickle.dumps("state", 3)[2:-1] + body[2:-1] + b"u"
    return called("torch_utils.persistence._reconstruct_persistent_obj", Pickled(b"\x80\x03" + meta + b"."))


def test_modules_that_refer_to_each_other_are_not_followed_forever(tmp_path):
    empty = {"_init_kwargs": {}, "_parameters": {}, "_buffers": {}}
    twice = persistent("B", {**empty, "_modules": {}})
    # {"a": B, "b": the same B}: put under memo 99, then taken from there
    children = b"}(" + pickle.dumps("a", 3)[2:-1] + twice[2:-1] + b"q\x63" + pickle.dumps("b", 3)[2:-1] + b"h\x63u"
    state = pickle.dumps(empty, 3)[2:-1] + b"(" + pickle.dumps("_modules", 3)[2:-1] + children + b"u"
    with pytest.raises(CheckpointError, match="in two places"):
        load(edm_pickle(tmp_path / "a.pkl", persistent("A", Pickled(b"\x80\x03" + state + b"."))))


@pytest.mark.parametrize("arguments", [{"a": b"bytes"}, {"a": [{1, 2}]}])
def test_arguments_that_are_no_plain_values_are_refused(tmp_path, arguments):
    state = {"_init_kwargs": arguments, "_parameters": {}, "_buffers": {}, "_modules": {}}
    with pytest.raises(CheckpointError, match=r"cannot be read|refers to"):
        load(edm_pickle(tmp_path / "a.pkl", persistent("EDMPrecond", state)))


def test_zip_bombs_are_refused_before_they_unpack(tmp_path):
    path = saved(tmp_path / "a.pt", {"out.2.bias": torch.zeros(3_000_000)})
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"refused: its [\d,]+ bytes unpack to 12,"):
        load(bomb)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    model = weights("guided_diffusion", ADM)
    path = saved(tmp_path / "a.pt", {**model, "x": torch.zeros(1).expand(10**9)})
    with pytest.raises(CheckpointError, match=r"claim to hold 4,\d+,\d+,\d+ bytes"):
        load(path)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    """Inside a pickle; torch itself would enlarge the storage by memory of unknown content."""
    file = io.BytesIO()
    torch.save(torch.zeros(4).storage(), file, _use_new_zipfile_serialization=False)
    storage = called("torch.storage._load_from_bytes", file.getvalue())
    path = tmp_path / "weights.pkl"
    path.write_bytes(called("torch._utils._rebuild_tensor_v2", storage, 0, (4,), (1,), False, None))
    with pytest.raises(CheckpointError, match="not one of NVlabs/edm"):  # the tensor itself is right
        load(path)
    path.write_bytes(called("torch._utils._rebuild_tensor_v2", storage, 0, (5,), (1,), False, None))
    with pytest.raises(CheckpointError, match="RuntimeError"):
        load(path)


# --- files that are no checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x86\xa4step\x01\xa9optimizer\x81\xa6target\xc0", "JAX checkpoint.*begins with the letters PK"),
        (b"\xde\x00\x10\xa4step\x01", "JAX checkpoint"),
        (b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"", "is empty"),
        (b"\x00" * 100, "cannot be read"),
        (b"PK\x03\x04" + b"\x00" * 100, "cannot be read"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),
        (pickle.dumps({"weights": [1.0]}), "not one of NVlabs/edm"),
        (pickle.dumps("text"), "not one of NVlabs/edm"),
    ],
)
def test_other_files_are_explained(tmp_path, content, said):
    path = tmp_path / "checkpoint_8.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_files_that_were_cut_short(tmp_path, zipped, part):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM), zipped)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="cut short"):
        load(path)


def test_safetensors_that_were_cut_short(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(weights("guided_diffusion", ADM), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short"):
        load(path)


def test_safetensors_of_another_version_are_refused(tmp_path):
    for about in ("{}", '{"format": "evodiff-checkpoint-0"}', "[1]", "{"):
        path = tmp_path / "a.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata={"evodiff": about})
        with pytest.raises(CheckpointError, match=r"not written by this version|cannot be read"):
            load(path)


def test_safetensors_of_others_are_converted(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(weights("guided_diffusion", ADM), path)
    (tmp_path / "a.json").write_text(json.dumps({"config": ADM}))
    assert equal(load(path).tensors, weights("guided_diffusion", ADM))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}, "epoch": 1}, "Lightning checkpoint"),
        ({"layer.weight": torch.zeros(2)}, "unknown network"),
        ({"epoch": 3}, "holds a dict of epoch"),
        ([], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
    ],
)
def test_other_torch_files_are_explained(tmp_path, content, said):
    with pytest.raises(CheckpointError, match=said):
        load(saved(tmp_path / "a.pt", content))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = weights("guided_diffusion", ADM)
    model["out.2.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"out\.2\.bias holds NaN"):
        load(saved(tmp_path / "a.pt", model))


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
