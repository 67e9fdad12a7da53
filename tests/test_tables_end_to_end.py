"""Tables of papers from `evodiff fetch --from` to report.html, on reduced networks in the layouts of published files.

Their arguments are put in the place of the published ones in a copy of the manifest; their hashes are left out.
"""

import csv
import gzip
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from evodiff.checkpoints import needs
from evodiff.checkpoints import registry as registry_module
from evodiff.cli import main
from evodiff.config import compose
from evodiff.metrics import score as score_module
from evodiff.models.networks import build
from evodiff.tables.table import Table
from evodiff.verify.metrics import write_random_inception

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
SMALL_NET = {"in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [2]}
SMALL_NET |= {"image_size": 8, "channel_mult": [1, 1], "num_head_channels": 16, "use_scale_shift_norm": True}
ADM = {**SMALL_NET, "out_channels": 6, "num_classes": 4, "resblock_updown": True}
CLASSIFIER = {**SMALL_NET, "out_channels": 4, "resblock_updown": True, "pool": "attention"}
SCORE_SDE_NET = {"nf": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}


def published_config(name, model):
    """The published arguments with a smaller network."""
    config = registry_module.registry()[name].config
    return {**config, "model": {**config["model"], **model}, "data": {**config["data"], "image_size": 8}}


def weights(architecture, config):
    torch.manual_seed(0)
    return OrderedDict(build(architecture, config).state_dict())


def score_sde(path):
    config = published_config("cifar10_score_sde_deep", SCORE_SDE_NET)
    model = weights("score_sde", config)
    averages = [value for key, value in model.items() if key != "sigmas"]
    content = {"optimizer": {}, "model": OrderedDict((f"module.{k}", v) for k, v in model.items()), "step": 5}
    torch.save({**content, "ema": {"decay": 0.9999, "num_updates": 5, "shadow_params": averages}}, path)
    return config


def ddim(path):
    small = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4]}
    config = published_config("celeba64_ddim", small)
    model = weights("ddim", config)
    torch.save([{f"module.{k}": v for k, v in model.items()}, {"state": {}}, 3, 1000, model], path)
    return config


def adm(path):
    torch.save(weights("guided_diffusion", ADM), path)
    return ADM


def classifier(path):
    torch.save(weights("guided_diffusion_classifier", CLASSIFIER), path)
    return CLASSIFIER


def edm(path):
    path.write_bytes(gzip.decompress((GOLDEN / "edm_vp_constant.pkl.gz").read_bytes()))


def statistics(path):
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))


def pool_3(path):
    np.savez(path, pool_3=np.random.default_rng(0).standard_normal((100, 2048)).astype(np.float32))


TABLES = {
    "cifar10_edm": {"cifar10_edm_uncond_vp": edm, "cifar10_score_sde_reference": pool_3},
    "cifar10_score_sde": {"cifar10_score_sde_deep": score_sde, "cifar10_score_sde_reference": pool_3},
    "celeba64": {"celeba64_ddim": ddim, "celeba64_reference": statistics},
    "imagenet256_adm": {
        **{"imagenet256_adm": adm, "imagenet256_adm_classifier": classifier},
        **{"imagenet256_adm_reference": statistics},
    },
}
ROWS = ("EVODiff", "DDPM", "DPM-Solver++ 3M", "UniPC-2", "EDM Heun")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder for published files, and a manifest that describes what is put there."""
    monkeypatch.setenv("EVODIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVODIFF_OFFLINE", "1")
    score_module.reference_of.cache_clear()
    entries = yaml.safe_load(registry_module.MANIFEST.read_text())
    changed = tmp_path / "manifest.yaml"

    def put(name, make):
        path = tmp_path / "downloads" / entries[name]["file"]
        path.parent.mkdir(exist_ok=True)
        config = make(path)
        for key in ("sha256", "bytes", "fingerprint", "md5"):
            entries[name].pop(key, None)
        if config is not None:
            entries[name]["config"] = config
        changed.write_text(yaml.safe_dump(entries))
        return path

    yield put, lambda: monkeypatch.setattr(registry_module, "MANIFEST", changed)
    score_module.reference_of.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_table_from_fetch_to_report(name, mirror, results, capsys):
    put, use_manifest = mirror
    made = {**TABLES[name], "inception": write_random_inception}
    paths = {entry: put(entry, make) for entry, make in made.items()}
    use_manifest()
    assert set(needs.of_table(name)[0]) == set(made)  # nothing else is needed, apart from DPM-Solver-v3's statistics
    for entry, path in paths.items():
        assert main(["fetch", entry, "--from", str(path)]) == 0

    cfg = compose("table", [f"table={name}", "limit=64", "repeats=1"])
    cfg.table.rows = {row: content for row, content in cfg.table.rows.items() if row in ROWS}
    for content in cfg.table.rows.values():
        if "run" in content and "nfe" in content:
            content.nfe = [10]
    cfg.table.nfe = [10]
    cfg.table.base = [*cfg.table.base, "protocol.extractor_sha256=null", "batch=64"]
    table = Table.from_config(cfg)
    assert table.make() == 0, capsys.readouterr().err

    assert table.folder == results / "tables" / f"{name}-64-repeats1"
    lines = list(csv.DictReader((table.folder / "table.csv").open()))
    scored = [line for line in lines if line["metric"] == "fid@64"]
    assert [line["solver"] for line in scored] == list(table.rows)
    assert {line["state"] for line in scored} == {"proxy"}
    assert all(np.isfinite(float(line["value"])) for line in scored)
    assert any(line["paper"] for line in scored)
    record = next(iter(table.records.values()))
    assert record.images == 64 and record.nfe == 10 and len(record.weights) == len(made) - 2
    page = (table.folder / "report.html").read_text()
    told = "on fewer images than the whole table&#x27;s or the paper&#x27;s, not comparable"
    assert f'<span class="chip proxy" title="{told}">{len(scored)}' in page
    assert "evodiff run model=" in page and "data:image/png;base64," in page
    assert (table.folder / "trajectories.png").exists()
    before = {p: p.stat().st_mtime_ns for p in results.rglob("score.json")}
    assert table.make() == 0
    assert {p: p.stat().st_mtime_ns for p in results.rglob("score.json")} == before
