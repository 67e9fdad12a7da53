"""The gain that matches contrast is found, and not on the seeds it is reported on."""

from dataclasses import replace
from types import SimpleNamespace

import contrast_matched as script
import numpy as np
import pytest
import torch

from evodiff.data import mnist_digits
from evodiff.errors import ConfigError, StoreError
from evodiff.metrics.contrast import Matched, contrast_matched, outward, read_matched, write_matched
from evodiff.metrics.protocol import protocol
from evodiff.store import SampleStore
from evodiff.tables.table import Table

MNIST = protocol("mnist")


def store_with(folder, arrays, n=400):
    store = SampleStore(folder, {"nfe": 1}, range(n), 150)
    for seeds in store.missing():
        part = {name: array[seeds.start : seeds.stop] for name, array in arrays.items()}
        store.write(seeds, part, nfe=1, seconds=0.0, weights={})
    return store


@pytest.fixture(scope="module")
def states():
    images = mnist_digits()[0]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:400]]
    return (images.float() / 127.5 - 1).numpy()


@pytest.mark.parametrize("flatter", [1.0, 0.8])
def test_digits_made_flat_get_their_contrast_back(tmp_path, states, flatter):
    found = contrast_matched(store_with(tmp_path, {"x": flatter * states}), MNIST, gains=(0.9, 1.0, 1.25))
    assert found.gain == {1.0: 1.0, 0.8: 1.25}[flatter]
    assert found.images == 200
    if flatter == 1.0:
        assert found.matched == found.plain
    else:
        whole = contrast_matched(store_with(tmp_path / "whole", {"x": states}), MNIST, gains=(1.0,))
        assert found.matched == pytest.approx(whole.plain, rel=1e-2)
        assert found.plain > 1.5 * found.matched


def test_a_gain_at_the_end_of_the_range_is_not_the_best_of_any_size(tmp_path, states):
    found = contrast_matched(store_with(tmp_path, {"x": 0.6 * states}), MNIST, gains=(0.9, 1.1, 1.3))
    assert found.gain == 1.3
    assert found.free_gain == pytest.approx(1 / 0.6, rel=0.1)
    assert found.free < 0.7 * found.matched


@pytest.mark.parametrize(("best", "found"), [(1.1, 1.1), (1.3, 1.3), (2.0, 2.0), (0.5, 0.5)])
def test_the_search_goes_outward_from_the_end_it_lies_at(best, found):
    def distance(gain):
        return abs(gain - best)

    gains = (0.9, 1.0, 1.1, 1.2, 1.3)
    assert outward(min(gains, key=distance), gains, distance) == pytest.approx(found, rel=0.05)


def test_it_is_tuned_on_the_first_half_and_reported_on_the_second(tmp_path, states):
    """The halves want different gains: the choice is the first half's, the numbers are the second's."""
    mixed = np.concatenate([0.8 * states[:200], states[200:]])
    found = contrast_matched(store_with(tmp_path, {"x": mixed}), MNIST, gains=(1.0, 1.25))
    assert found.gain == 1.25
    assert found.plain < found.matched


def test_without_states_it_says_what_to_do(tmp_path):
    images = torch.zeros(400, 1, 32, 32, dtype=torch.uint8).numpy()
    with pytest.raises(StoreError, match="was written without x"):
        contrast_matched(store_with(tmp_path, {"images": images}), MNIST)
    with pytest.raises(ConfigError, match="has 3 images"):
        contrast_matched(store_with(tmp_path / "few", {"x": np.zeros((3, 1, 32, 32))}, 3), MNIST)


def test_matched_cells_come_back_by_the_key_of_their_run(tmp_path):
    path, cell = tmp_path / "matched.csv", Matched(200, 48.51234567890123, 1.3, 14.9, 1.365, 14.7)
    assert read_matched(path, MNIST) == {}
    write_matched(path, {("UniPC-3", 10, "abc"): cell}, MNIST)
    assert read_matched(path, MNIST) == {"abc": cell}
    assert read_matched(path, replace(MNIST, n=10)) == read_matched(path, None) == {}
    assert path.read_text().splitlines() == [
        "solver,nfe,images,plain,gain,matched,free_gain,free,run,protocol",
        "UniPC-3,10,200,48.51234567890123,1.3,14.9,1.365,14.7,abc,fba137ad",
    ]


def test_cells_that_another_process_adds_stay(results, monkeypatch):
    table, path = Table.of_file("demo"), results / "tables/demo/matched.csv"
    ours, theirs = (table.keys[row, 5, 0] for row in ("DDIM", "EVODiff"))
    cell = Matched(500, 3.0, 1.1, 2.0, 1.1, 2.0)

    def meanwhile(*_):
        write_matched(path, {("EVODiff", 5, theirs): cell}, MNIST)
        return cell

    monkeypatch.setattr(script, "store_of", lambda job: SimpleNamespace(missing=list, shards=[]))
    monkeypatch.setattr(script, "contrast_matched", meanwhile)
    table.jobs["DDIM", 5, 0].run.folder.mkdir(parents=True)
    script.main(["demo", "5"])
    assert read_matched(path, MNIST) == {ours: cell, theirs: cell}


def test_runs_without_states_are_left_out_and_the_others_scored(results, monkeypatch, capsys):
    """Cells of another protocol are not among those that stay."""
    table, path = Table.of_file("demo"), results / "tables/demo/matched.csv"
    cell = Matched(500, 3.0, 1.1, 2.0, 1.1, 2.0)
    with_states, without = (table.keys[row, 5, 0] for row in ("EVODiff", "DDIM"))
    write_matched(path, {("EVODiff", 5, with_states): replace(cell, plain=9.0)}, replace(MNIST, n=10))

    def store_of(job):
        holds = ("images",) if job.run.key() == without else ("images", "x")
        return SimpleNamespace(missing=list, shards=[SimpleNamespace(holds=holds)])

    monkeypatch.setattr(script, "store_of", store_of)
    monkeypatch.setattr(script, "contrast_matched", lambda *_: cell)
    for row in ("DDIM", "EVODiff"):
        table.jobs[row, 5, 0].run.folder.mkdir(parents=True)
    script.main(["demo", "5"])
    assert read_matched(path, MNIST) == {with_states: cell}
    assert "4 runs are left out" in capsys.readouterr().out


def test_the_script_says_what_it_left_out(results, capsys):
    script.main(["demo", "5", "10"])
    told = capsys.readouterr().out
    assert "10 runs are left out" in told and "no cell of this protocol is in" in told
    assert not (results / "tables").exists()
    with pytest.raises(ConfigError, match="Did you mean demo"):
        script.main(["demos"])
    with pytest.raises(ConfigError, match="table demo has no NFE 7. Possible: 5, "):
        script.main(["demo", "7"])
    with pytest.raises(ConfigError, match="table smoke has protocol=none, so its images have no distance"):
        script.main(["smoke"])
