"""Differences between runs of the same seeds."""

from dataclasses import replace
from types import SimpleNamespace

import paired as script
import pytest
import torch

from evodiff.data import mnist_digits
from evodiff.errors import ConfigError
from evodiff.metrics import score as scoring
from evodiff.metrics.paired import Paired, paired, read_paired, scored, write_paired
from evodiff.metrics.protocol import protocol
from evodiff.metrics.score import score
from evodiff.store import SampleStore
from evodiff.tables.table import Table

MNIST = protocol("mnist")


def run_of(folder, images):
    store = SampleStore(folder, {"nfe": 1}, range(len(images)), 150)
    for seeds in store.missing():
        store.write(seeds, {"images": images[seeds.start : seeds.stop].numpy()}, nfe=1, seconds=0.0, weights={})
    return store


def test_a_difference_of_paired_images_is_surer_than_one_of_others(tmp_path):
    digits = mnist_digits()[0]
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))]
    ours, others = digits[:400], digits[400:800]
    paler, others_paler = (images // 2 for images in (ours, others))
    runs = {
        name: scored(run_of(tmp_path / name, images), MNIST)
        for name, images in {"ours": ours, "paler": paler, "others paler": others_paler}.items()
    }
    same, other = (paired(runs[name], runs["ours"]) for name in ("paler", "others paler"))
    (fd,) = score([paler], MNIST).values()
    (fd_ours,) = score([ours], MNIST).values()
    assert same.difference == pytest.approx(fd - fd_ours, rel=1e-6)
    assert same.standard_error < other.standard_error
    assert paired(runs["ours"], runs["ours"]) == Paired(0.0, 0.0)


def test_differences_come_back_by_the_keys_of_their_runs(tmp_path):
    path, found = tmp_path / "paired.csv", {("a", "b"): Paired(-1.2345678901, 0.05)}
    assert read_paired(path, MNIST) == {}
    write_paired(path, found, MNIST)
    assert read_paired(path, MNIST) == found
    assert read_paired(path, replace(MNIST, n=10)) == {}


def test_differences_of_another_protocol_or_reference_are_found_anew(tmp_path, monkeypatch):
    """Where the protocol does not say which file the reference is, its content counts; before the column there was
    none of either, and no such line is taken."""
    monkeypatch.setattr(scoring, "CHECKPOINTS", tmp_path)
    path, found = tmp_path / "paired.csv", {("a", "b"): Paired(1.0, 0.1)}
    anyone = replace(MNIST, reference="r.npz", reference_sha256=None)
    (tmp_path / "r.npz").write_bytes(b"one")
    write_paired(path, found, anyone)
    assert read_paired(path, anyone) == found
    (tmp_path / "r.npz").write_bytes(b"another")
    assert read_paired(path, anyone) == read_paired(path, MNIST) == {}
    path.write_text("run,other,difference,standard_error\na,b,1.0,0.1\n")
    assert read_paired(path, MNIST) == {}


def test_pairs_that_another_process_adds_stay(results, monkeypatch):
    theirs = {("theirs", "other"): Paired(1.0, 0.1)}

    def meanwhile(*_):
        write_paired(results / "tables/demo/paired.csv", theirs, MNIST)
        return Paired(2.0, 0.2)

    monkeypatch.setattr(script, "store_of", lambda job: SimpleNamespace(missing=list, shards=[]))
    monkeypatch.setattr(script, "scored", lambda *_: None)
    monkeypatch.setattr(script, "paired", meanwhile)
    table = Table.of_file("demo")
    for row in ("DDIM", "EVODiff"):
        table.jobs[row, 5, 0].run.folder.mkdir(parents=True)
    script.main(["demo", "DDIM", "5"])
    ours = (table.keys["EVODiff", 5, 0], table.keys["DDIM", 5, 0])
    assert read_paired(results / "tables/demo/paired.csv", MNIST) == {**theirs, ours: Paired(2.0, 0.2)}


def test_the_script_says_what_it_left_out(results, capsys):
    script.main(["demo", "DDIM", "5"])
    told = capsys.readouterr().out
    assert "4 pairs are left out" in told and "no pair of this protocol is in" in told
    assert not (results / "tables").exists()
    with pytest.raises(ConfigError, match="table demo has no row 'DDIMs'. Possible: DDIM, "):
        script.main(["demo", "DDIMs"])
    with pytest.raises(ConfigError, match="row DDIM of table demo has no NFE 7. Possible: 5, "):
        script.main(["demo", "DDIM", "7"])
    with pytest.raises(ConfigError, match="table smoke has protocol=none, so its images have no distance"):
        script.main(["smoke", "DDIM"])


def test_runs_that_keep_no_images_are_left_out(results, monkeypatch, capsys):
    shards = [SimpleNamespace(holds=("features",))]
    monkeypatch.setattr(script, "store_of", lambda job: SimpleNamespace(missing=list, shards=shards))
    for row in ("DDIM", "EVODiff"):
        Table.of_file("demo").jobs[row, 5, 0].run.folder.mkdir(parents=True)
    script.main(["demo", "DDIM", "5"])
    assert "4 pairs are left out" in capsys.readouterr().out
