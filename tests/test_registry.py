"""The manifest is well formed and its networks are the published ones; the commands say what is here and what to do."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from evodiff.checkpoints import doctor, load, needs, registry, require
from evodiff.checkpoints.description import fingerprint
from evodiff.checkpoints.registry import find
from evodiff.cli import main
from evodiff.errors import ConfigError
from evodiff.models.networks import build
from evodiff.paths import CONFIGS

PUBLISHED = Path(__file__).parents[2] / "shared" / "reference" / "manifests"
ENTRIES = registry.registry()
DESCRIBED = [entry for entry in ENTRIES.values() if entry.config]
# names of the published key lists
ORIGINS = {
    "cifar10_score_sde": "score_sde_cifar10_ddpmpp_continuous",
    "cifar10_score_sde_deep": "score_sde_cifar10_ddpmpp_deep_continuous",
    "cifar10_score_sde_ve": "score_sde_cifar10_ncsnpp_continuous_ve",
    "celeba64_ddim": "ddim_celeba64",
    "cifar10_ddpm": "ddim_cifar10",
    "lsun_bedroom_ddpm": "ddim_lsun_bedroom",
    "lsun_church_ddpm": "ddim_lsun_church",
    "imagenet256_adm": "adm_imagenet256_cond",
    "imagenet256_adm_uncond": "adm_imagenet256_uncond",
    "imagenet256_adm_classifier": "adm_imagenet256_classifier",
    "lsun_bedroom_adm": "adm_lsun_bedroom256",
    "imagenet128_adm": "adm_imagenet128_cond",
    "imagenet128_adm_classifier": "adm_imagenet128_classifier",
    "imagenet64_adm": "adm_imagenet64_cond",
    "imagenet64_adm_classifier": "adm_imagenet64_classifier",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def place(name, content=b"data"):
    path = find(name).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_every_entry_can_be_had_and_says_its_licence(entry):
    assert entry.urls or entry.page
    assert all(url.startswith(("https://", "drive:")) for url in (*entry.urls, *filter(None, [entry.page])))
    assert entry.licence and Path(entry.file).name == entry.file
    assert all(set(digest) <= set("0123456789abcdef") for digest in (entry.sha256, entry.sha256_reported, entry.md5))
    assert len(entry.sha256) in (0, *range(8, 65)) and len(entry.md5) in (0, 32)
    assert all(needed in ENTRIES for needed in entry.needs)
    assert bool(entry.config) == bool(entry.fingerprint)
    if entry.architecture and entry.architecture != "edm":  # EDM pickles describe themselves
        assert entry.config and bool(entry.schedule) == entry.architecture.startswith("guided_diffusion")


def test_files_known_by_their_name_have_names_of_their_own():
    by_weights = {}
    for entry in DESCRIBED:
        by_weights.setdefault(entry.fingerprint, []).append(entry.file)
    assert all(len(files) == len(set(files)) for files in by_weights.values())


@pytest.mark.parametrize("entry", DESCRIBED, ids=lambda entry: entry.name)
def test_every_configuration_builds_the_network_of_its_fingerprint(entry):
    with torch.device("meta"):
        network = build(entry.architecture, entry.config)
    assert fingerprint(network.state_dict()) == entry.fingerprint


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="reference data not at hand")
@pytest.mark.parametrize("entry", DESCRIBED, ids=lambda entry: entry.name)
def test_every_fingerprint_is_that_of_the_published_key_list(entry):
    published = json.loads((PUBLISHED / f"{ORIGINS[entry.name]}.json").read_text())
    shapes = {key: torch.empty(shape, device="meta") for key, shape in published["state_dict"]}
    assert fingerprint(shapes) == entry.fingerprint

    def within(ours, theirs):
        if isinstance(ours, dict):
            return all(key in theirs and within(value, theirs[key]) for key, value in ours.items())
        return ours == theirs

    assert within(entry.config, published["constructor_kwargs"])


def test_require_says_how_to_get_a_file(cache):
    with pytest.raises(
        ConfigError, match=r"inception \(extractor\) is not here.*`evodiff fetch inception`.*--from PATH"
    ):
        require("inception")
    path = place("inception")
    assert require("inception") == path and cache in path.parents


def test_an_unknown_name_gets_the_nearest():
    for ask in (require, load):
        with pytest.raises(ConfigError, match="Did you mean celeba64_ddim"):
            ask("celeba_ddim")
    with pytest.raises(ConfigError, match="does not exist"):
        load("weights/absent.pt")
    with pytest.raises(ConfigError, match="no network that can be loaded"):
        place("celeba64_reference")
        load("celeba64_reference")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {kind: model, file: x, licence: MIT, urll: []}", "a: urll is no field"),
        ("a: {kind: thing, file: x, licence: MIT}", "kind=thing is none of"),
        ("a: {kind: [", "cannot be read"),
        ("- a", "is no mapping of names to entries"),
        ("a:", "a: None is no mapping of fields"),
        ("a: {kind: model, file: x}", "a: licence is missing"),
        ("a: {kind: model, licence: MIT}", "a: file is missing"),
        ("a: {kind: model, file: x, licence: MIT, name: b}", "a: name is no field"),
        ("a: {kind: model, file: x, licence: MIT, urls: 'https://a.b/x'}", "urls='https://a.b/x' is not a list"),
        ("a: {kind: model, file: x, licence: MIT, needs: [1]}", "needs=.1. is not a list"),
        ("a: {kind: model, file: x, licence: MIT, mb: many}", "mb='many' is not a number"),
        ("a: {kind: model, file: x, licence: MIT, sha256: 12345678}", "sha256=12345678 is not text, in quotes"),
        ("a: {kind: model, file: ../../../x, licence: MIT}", "a: ../../../x is no name that a file can have"),
        ("a: {kind: model, file: .., licence: MIT}", "a: .. is no name that a file can have"),
        ("b/a: {kind: model, file: x, licence: MIT}", "b/a: b/a is no name that a file can have"),
    ],
)
def test_a_manifest_that_is_not_well_formed(tmp_path, monkeypatch, text, said):
    (tmp_path / "manifest.yaml").write_text(text)
    monkeypatch.setattr(registry, "MANIFEST", tmp_path / "manifest.yaml")
    with pytest.raises(ConfigError, match=said):
        registry.registry()


def test_the_list_of_models(capsys):
    place("inception")
    find("celeba64_ddim").path.parent.mkdir(parents=True)
    find("celeba64_ddim").path.with_name("ckpt.pth.part").touch()
    assert main(["models"]) == 0
    states = {
        line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")
    }
    assert states.keys() == ENTRIES.keys()
    assert states["inception"] == "here" and states["celeba64_ddim"] == "begun"
    assert states["imagenet256_adm"] == "missing" and states["cifar10_score_sde"] == "by"  # by hand
    assert main(["models", "--missing"]) == 0
    assert "inception " not in capsys.readouterr().out
    assert main(["models", "imagenet256_adm_uncond"]) == 0
    out = capsys.readouterr().out
    assert "2,211,383,297 bytes" in out and "a37c32fffd316cd4" in out and "256x256_diffusion_uncond.pt" in out
    assert main(["models", "imagenet256"]) == 1
    assert "Did you mean imagenet256_adm" in capsys.readouterr().err


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A table of two models and two protocols."""
    files = {
        "run": {"defaults": ["_self_", {"model": "small"}, {"protocol": "none"}, {"guidance": "none"}]},
        "model/small": {"_target_": "evodiff.models.small"},
        "model/inception": {"_target_": "evodiff.models.large", "classifier": "celeba64_ddim"},
        "model/large": {"_target_": "evodiff.models.large", "checkpoint": "imagenet256_adm_uncond"},
        "guidance/classifier": {"_target_": "x", "classifier": {"weights": "imagenet256_adm_classifier"}},
        "protocol/none": {},
        "protocol/fid": {
            "extractor": "inception",
            "dataset": "cifar10",
            "references": {
                "cifar10": "cifar10_edm_reference",
                "imagenet256": "imagenet256_adm_reference",
                "mine": "mine/a.npz",
            },
        },
        "table/guided": {
            "base": ["model=large", "protocol=fid", "protocol.dataset=imagenet256"],
            "rows": {"plain": ["solver=ddim"], "guided": ["guidance=classifier"]},
        },
        "table/mine": {"base": ["protocol=fid"], "rows": {"a": ["protocol.dataset=mine"]}},
        "table/free": {"base": ["model=small"], "rows": {"a": []}},
        "table/latent": {"base": ["model=small", "model.pipeline=checkpoints/pipes"], "rows": {"a": []}},
    }
    for name, content in files.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    for module in (needs, doctor):
        monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")


GUIDED = ["imagenet256_adm_classifier", "imagenet256_adm_reference", "imagenet256_adm_uncond", "inception"]


def test_what_a_table_needs(configs, capsys):
    assert needs.of_table("guided") == (GUIDED, [])
    assert needs.of("guided") == GUIDED
    assert needs.of("large") == ["imagenet256_adm_uncond"]
    assert needs.of("inception") == ["celeba64_ddim", "inception"]  # a name of the registry and of a model
    entries, made = needs.of_table("mine")
    assert entries == ["inception"] and [path.name for path in made] == ["a.npz"]
    assert needs.of_table("free") == ([], [])
    assert needs.by_hand("mine") == []
    assert [path.name for path in needs.by_hand("latent")] == ["pipes"]
    assert main(["fetch", "--table", "latent"]) == 0
    assert "pipes here: docs/howto/offline.md" in capsys.readouterr().out
    assert main(["fetch", "inception", "--table", "guided", "--from", "x"]) == 1
    assert "--from gives one file" in capsys.readouterr().err
    assert needs.of("lsun_bedroom_ldm_original") == ["lsun_bedroom_ldm_original", "vq_f4_original"]
    with pytest.raises(ConfigError, match="there is no table gided; possible: free, guided, latent, mine"):
        needs.of_table("gided")


def test_a_table_that_is_no_yaml_is_named_with_its_line(configs, capsys):
    (needs.CONFIGS / "table" / "broken.yaml").write_text("title: a\nbase: [model=mixture\nnfe: [5]\n")
    with pytest.raises(ConfigError, match=r'cannot be read: .*/table/broken.yaml", line 3'):
        needs.of("broken")
    assert main(["doctor", "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if 'table/broken.yaml", line 3' in line and "table broken" in line]
    assert [line for line in lines if "table free" in line]  # and the others are still told


@pytest.mark.parametrize("text", ["rows:\n a: {at: []}", "- a", "rows: [a]", "rows: {a: {run: [], at: [5]}}"])
def test_a_table_that_is_none_is_named(configs, capsys, text):
    (needs.CONFIGS / "table" / "zz.yaml").write_text(text)
    assert main(["fetch", "--table", "zz"]) == 1
    said = capsys.readouterr().err
    assert "table zz cannot be read" in said and "Mend configs/table/zz.yaml" in said and said.count("\n") == 1
    assert main(["doctor", "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("wrong") and "table zz" in line]
    assert [line for line in lines if "table free" in line]


def test_the_doctor_names_a_protocol_that_is_a_list(configs, capsys):
    (needs.CONFIGS / "protocol" / "zz.yaml").write_text("- inception")
    assert main(["doctor", "--quick"]) == 1
    assert "protocol/zz.yaml is no mapping of settings" in capsys.readouterr().out


def test_the_doctor_names_a_cache_that_is_no_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("EVODIFF_CACHE", str(cache))
        assert main(["doctor", "--quick"]) == 1
        assert f"{tmp_path / 'file'} is no folder. Set EVODIFF_CACHE" in capsys.readouterr().out


def test_the_doctor_notes_a_file_of_another_size_where_no_hash_tells(capsys):
    place("imagenet256_adm", b"random")
    assert main(["doctor"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line[7:].startswith("imagenet256_adm ")]
    assert line.startswith("note") and "it has 0.0 MB, and the published file some 2,216 MB" in line


def test_the_doctor_says_what_to_do_for_each_table(configs, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    place("inception")
    assert main(["doctor", "--quick"]) == 0
    said = {line[7:35].strip(): line for line in capsys.readouterr().out.splitlines()}
    lacking = [name for name in GUIDED if name != "inception"]
    assert f"`evodiff fetch {' '.join(lacking)}` (4.4 GB)" in said["table guided"]
    assert "`evodiff stats build`" in said["table mine"] and "a.npz" in said["table mine"]
    assert said["table free"].startswith("ok") and "make table-free" in said["table free"]
    for topic in ("torch", "torchvision", "cache", "inception"):
        assert said[topic].startswith("ok"), said[topic]


def test_the_doctor_finds_what_is_damaged(capsys):
    path = place("inception", b"not the file whose sha256 begins with 6726825d")
    place("imagenet256_adm_uncond", b"cut short")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"expected 6726825d. Delete {path} and run `evodiff fetch inception`." in out
    assert "it has 9 bytes, expected 2,211,383,297" in out
    assert out.splitlines()[-1] == "2 to mend"


def test_the_doctor_finds_shipped_files_that_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKPOINTS", tmp_path)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "mnist_tiny" in out and "fd_mnist.npz is not the file that mnist.yaml was made with" in out


def test_the_doctor_passes_over_a_protocol_that_states_no_hash(tmp_path, monkeypatch, capsys):
    shutil.copytree(doctor.CONFIGS, tmp_path / "configs")
    mnist = tmp_path / "configs/protocol/mnist.yaml"
    mnist.write_text(re.sub(r"(extractor_sha256): \w+", r"\1: null", mnist.read_text()))
    monkeypatch.setattr(doctor, "CONFIGS", tmp_path / "configs")
    assert [finding.level for finding in doctor._shipped() if finding.topic == "mnist"] == ["ok"]


def test_the_doctor_without_network_and_with_a_broken_download(monkeypatch, capsys):
    monkeypatch.setenv("EVODIFF_OFFLINE", "1")
    part = find("celeba64_ddim").path.with_name("ckpt.pth.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * 3_000_000)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "EVODIFF_OFFLINE is set" in out
    assert "a download broke off after 3 MB. `evodiff fetch celeba64_ddim` goes on from there." in out


def test_fetch_asks_for_what_it_needs(capsys):
    for argv, said in [
        ([], "say what to fetch"),
        (["inception", "celeba64_ddim", "--from", "x"], "--from gives one file"),
        (["--table", "nothing"], "there is no table nothing"),
        (["nothing"], "not in the registry"),
    ]:
        assert main(["fetch", *argv]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_every_model_needs_can_be_told(path):
    assert all(entry in ENTRIES for entry in needs.of(path.stem))


@pytest.mark.parametrize("path", sorted((CONFIGS / "protocol").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_reference_of_a_protocol_is_in_the_registry_or_a_file_to_make(path):
    protocol = yaml.safe_load(path.read_text()) or {}
    for reference in protocol.get("references", {}).values():
        assert reference in ENTRIES or reference.endswith(".npz")
