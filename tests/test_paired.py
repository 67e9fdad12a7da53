"""Differences between runs of the same seeds."""

from types import SimpleNamespace

import paired as script
import pytest
import torch

from evodiff.data import mnist_digits
from evodiff.errors import ConfigError
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
    assert read_paired(path) == {}
    write_paired(path, found)
    assert read_paired(path) == found


def test_pairs_that_another_process_adds_stay(results, monkeypatch):
    theirs = {("theirs", "other"): Paired(1.0, 0.1)}

    def meanwhile(*_):
        write_paired(results / "tables/demo/paired.csv", theirs)
        return Paired(2.0, 0.2)

    monkeypatch.setattr(script, "store_of", lambda job: SimpleNamespace(missing=list))
    monkeypatch.setattr(script, "scored", lambda *_: None)
    monkeypatch.setattr(script, "paired", meanwhile)
    table = Table.of_file("demo")
    for row in ("DDIM", "EVODiff"):
        table.jobs[row, 5, 0].run.folder.mkdir(parents=True)
    script.main(["demo", "DDIM", "5"])
    ours = (table.keys["EVODiff", 5, 0], table.keys["DDIM", 5, 0])
    assert read_paired(results / "tables/demo/paired.csv") == {**theirs, ours: Paired(2.0, 0.2)}


def test_the_script_says_what_it_left_out(results, capsys):
    script.main(["demo", "DDIM", "5"])
    assert "4 pairs are left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="table demo has no row 'DDIMs'. Possible: DDIM, "):
        script.main(["demo", "DDIMs"])
