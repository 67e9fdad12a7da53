"""The store: whole files, one run per folder, nothing lost, nothing doubled."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from evodiff.errors import StoreError
from evodiff.files import whole_file
from evodiff.runs.record import Record
from evodiff.store import SampleStore

RUN = {"solver": {"name": "ddim"}, "nfe": 5}


def store_at(folder, run=RUN, seeds=range(10), shard=4):
    return SampleStore(folder, run, seeds, shard)


def content(seeds):
    images = np.stack([np.full((1, 2, 2), seed, np.uint8) for seed in seeds])
    return {"images": images, "x": images / 255.0}


def write(store, seeds, weights=None):
    store.write(seeds, content(seeds), nfe=5, seconds=1.0, weights=weights or {})


def fill(store):
    for seeds in store.missing():
        write(store, seeds)


def test_missing_then_written_then_read_in_order(tmp_path):
    store = store_at(tmp_path)
    assert store.missing() == [range(0, 4), range(4, 8), range(8, 10)]
    for seeds in reversed(store.missing()):
        write(store, seeds)
    assert store.missing() == []
    seeds, images = (np.concatenate(parts) for parts in zip(*store.batches("seeds", "images"), strict=True))
    assert seeds.tolist() == list(range(10))
    assert images[:, 0, 0, 0].tolist() == list(range(10))


def test_a_shard_holds_what_was_given_and_the_seeds(tmp_path, monkeypatch):
    savez = np.savez

    def of_numpy_2_0(file, **arrays):  # which has no options beside them
        assert "allow_pickle" not in arrays
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", of_numpy_2_0)
    write(store_at(tmp_path), range(0, 4))
    with np.load(tmp_path / "shard-000000.npz") as shard:
        assert set(shard) == {"seeds", "images", "x"}


def test_an_incomplete_run_cannot_be_read(tmp_path):
    store = store_at(tmp_path)
    write(store, range(4, 8))
    with pytest.raises(StoreError, match=r"lacks 6 of 10 images \(first: seed 0\)"):
        next(store.batches("images"))


def test_shards_of_another_size_count_and_leave_the_rest_missing(tmp_path):
    write(store_at(tmp_path), range(4, 8))
    assert store_at(tmp_path, shard=5).missing() == [range(0, 4), range(8, 10)]
    assert store_at(tmp_path, shard=3).missing() == [range(0, 3), range(3, 4), range(8, 9), range(9, 10)]
    assert store_at(tmp_path, shard=100).missing() == [range(0, 4), range(8, 10)]


def spans(store):
    return [(s.first, s.last) for s in store.shards]


def test_a_shard_takes_the_place_of_those_within_it(tmp_path):
    store = store_at(tmp_path)
    fill(store)
    write(store, range(0, 8))
    assert spans(store) == [(0, 7), (8, 9)]
    (seeds,) = zip(*store.batches("seeds"), strict=True)
    assert np.concatenate(seeds).tolist() == list(range(10))


@pytest.mark.parametrize("later", [range(2, 4), range(2, 6)])
def test_a_shard_takes_the_place_of_none_that_has_seeds_it_lacks(tmp_path, later):
    """Two processes that cut the seeds in different places, and finish one after the other."""
    mine, theirs = store_at(tmp_path), store_at(tmp_path, shard=2)
    with mine.claim(range(0, 4)) as a, theirs.claim(range(2, 4)) as b:
        assert a and b
        write(mine, range(0, 4))
        write(theirs, later)
    assert spans(mine) == [(0, 3)]
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-000000.npz"]
    fill(theirs)
    (seeds,) = zip(*mine.batches("seeds"), strict=True)
    assert np.concatenate(seeds).tolist() == list(range(10))


@pytest.mark.parametrize("trouble", ["damaged", "lacking"])
def test_a_shard_takes_the_place_of_one_that_cannot_be_used(tmp_path, trouble):
    write(store_at(tmp_path), range(0, 4))
    if trouble == "damaged":
        (tmp_path / "shard-000000.npz").write_bytes(b"")
    store = SampleStore(tmp_path, RUN, range(10), 2, needs=["features"] if trouble == "lacking" else [])
    write(store, range(2, 4))
    assert spans(store) == [(2, 3)]


def test_a_shard_that_lacks_an_array_stays_until_what_takes_its_place_is_whole(tmp_path):
    """A job that asks for the states as well, cuts the seeds finer, and is killed, costs no images."""
    images = {"images": content(range(2, 8))["images"]}
    store_at(tmp_path).write(range(2, 8), images, nfe=5, seconds=1.0, weights={})
    write(store_at(tmp_path), range(8, 10))
    store = SampleStore(tmp_path, RUN, range(10), 2, needs=["x"])
    assert store.missing() == [range(0, 2), range(2, 8)]
    write(store, range(0, 2))
    with pytest.raises(StoreError, match=r"has its images, but 1 of 3 shards not the x .* reference_run=null"):
        next(store.batches("images"))
    assert store_at(tmp_path).missing() == []
    write(store, range(2, 8))
    assert store.missing() == []


def test_a_range_that_another_cut_has_begun_is_not_handed_out_whole(tmp_path):
    mine = store_at(tmp_path)
    write(store_at(tmp_path, shard=2), range(2, 4))
    with mine.claim(range(0, 4)) as whole:
        assert not whole
    with mine.claim(range(0, 2)) as rest:
        assert rest


def test_what_a_shard_does_not_hold_is_named(tmp_path):
    store = store_at(tmp_path)
    write(store, range(0, 4))
    arrays = {"features": np.zeros((4, 2)), "preview": content(range(4, 6))["images"]}
    store.write(range(4, 8), arrays, nfe=5, seconds=1.0, weights={}, made_by="abc")
    fill(store)
    with pytest.raises(StoreError, match=r"shard-000004.npz .* without images and x"):
        list(store.batches("seeds", "images", "x"))
    assert store.first(100)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert [shard.made_by for shard in store.shards] == [None, "abc", None]


@pytest.mark.parametrize("damage", ["truncate", "foreign", "delete"])
def test_a_damaged_shard_is_named_and_counts_as_missing(tmp_path, damage):
    store = store_at(tmp_path)
    fill(store)
    path = tmp_path / "shard-000004.npz"
    if damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "foreign":
        path.write_bytes((tmp_path / "shard-000000.npz").read_bytes())
    else:
        path.unlink()
    assert store.missing() == [range(4, 8)]
    assert store.damaged() == ["shard-000004.npz"]
    with pytest.raises(StoreError, match=r"shard-000004\.npz"):
        list(store.batches("images"))
    fill(store)
    assert len(list(store.batches("images"))) == 3


def test_files_the_manifest_does_not_list_do_not_count(tmp_path):
    store = store_at(tmp_path)
    write(store, range(0, 4))
    (tmp_path / "shard-000004.npz").write_bytes((tmp_path / "shard-000000.npz").read_bytes())
    assert store.missing() == [range(4, 8), range(8, 10)]


def test_another_runs_folder_is_refused(tmp_path):
    fill(store_at(tmp_path))
    with pytest.raises(StoreError, match="holds another run: nfe differ"):
        store_at(tmp_path, run=RUN | {"nfe": 6})


def test_shards_without_a_manifest_are_refused(tmp_path):
    np.savez(tmp_path / "shard-000000.npz", images=np.zeros(1))
    with pytest.raises(StoreError, match="has no manifest.json"):
        store_at(tmp_path)


def test_a_broken_manifest_is_refused(tmp_path):
    fill(store_at(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        store_at(tmp_path)


@pytest.mark.parametrize("content", ['{"run": null}', '{"run": {}, "weights": null}'])
def test_a_manifest_of_other_types_is_refused(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match="cannot be read"):
        store_at(tmp_path)


def test_a_folder_in_the_place_of_a_shard_is_no_shard(tmp_path):
    fill(store_at(tmp_path))
    (tmp_path / "shard-000000.npz").unlink()
    (tmp_path / "shard-000000.npz").mkdir()
    assert store_at(tmp_path).damaged() == ["shard-000000.npz"]


@pytest.mark.parametrize("wrong", [{"metrics": None}, {"asked": None}, {"files": 3}, {"protocol": ["mnist"]}])
def test_a_record_of_other_types_is_refused(wrong, tmp_path):
    empty = {name: {} for name in ("run", "metrics", "weights", "shards")}
    numbers = dict.fromkeys(("nfe", "network_passes", "images", "seconds"), 1)
    content = {"key": "k", "protocol": None, "reference_run": None, "device": "", **empty, **numbers}
    path = tmp_path / "score.json"
    path.write_text(json.dumps(content))
    assert Record.read(path).key == "k"
    path.write_text(json.dumps({**content, **wrong}))
    with pytest.raises(StoreError, match="cannot be read as a record"):
        Record.read(path)


@pytest.mark.parametrize("change", [{"note": "mine"}, {"first": None}, {"holds": None}])
def test_a_manifest_with_other_fields_is_refused(change, tmp_path):
    fill(store_at(tmp_path))
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["shards"][0] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match="cannot be read"):
        store_at(tmp_path)


def test_other_weights_are_refused(tmp_path):
    store = store_at(tmp_path)
    write(store, range(0, 4), weights={"net.safetensors": "aa"})
    with pytest.raises(StoreError, match="sampled with other files"):
        write(store, range(4, 8), weights={"net.safetensors": "bb"})
    assert store.missing() == [range(4, 8), range(8, 10)]


def test_a_file_more_is_refused_too(tmp_path):
    store = store_at(tmp_path)
    write(store, range(0, 4), weights={"a": "1"})
    store.check_files({"a": "1"})
    store.check_files({"a": "1", "times.json": "2"}, unnoted=["times.json"])
    for files in ({"a": "1", "b": "2"}, {}):
        with pytest.raises(StoreError, match="sampled with other files"):
            store.check_files(files, unnoted=["times.json"])


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    write(store, range(0, 4))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(StoreError, match="No space left on device"):
        write(store, range(4, 8))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_range_is_handed_to_one_process_at_a_time(tmp_path):
    with store_at(tmp_path).claim(range(0, 4)) as mine:
        assert mine
        seen = []

        def other():
            with store_at(tmp_path).claim(range(0, 4)) as theirs:
                seen.append(theirs)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen == [False]
        write(store_at(tmp_path), range(0, 4))
    with store_at(tmp_path).claim(range(0, 4)) as again:
        assert not again, "it is finished"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, code):
    """A file in the place of a lock would stay for ever when its machine dies, and all others would wait for it."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    store = store_at(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match=rf"without locks \(flock: {os.strerror(code)}\).* -o flock"):
        write(store, range(0, 4))
    with pytest.raises(StoreError, match="without locks"), store.claim(range(0, 4)):
        pass


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from evodiff.runs.record import Record
from evodiff.store import SampleStore
import evodiff.store as module

step = sys.argv[2]
if step == "before-rename":
    os.replace = lambda *a: os._exit(9)
if step == "before-manifest":
    module.sha256 = lambda path: os._exit(9)
images = np.zeros((4, 1, 2, 2), np.uint8)
store = SampleStore(Path(sys.argv[1]), {"solver": {"name": "ddim"}, "nfe": 5}, range(10), 4)
store.write(range(4, 8), {"images": images}, nfe=5, seconds=1.0, weights={})
"""


@pytest.mark.parametrize("step", ["before-rename", "before-manifest"])
def test_killed_while_writing_nothing_is_listed(tmp_path, step):
    store = store_at(tmp_path)
    write(store, range(0, 4))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), step])
    assert done.returncode == 9
    assert store.missing() == [range(4, 8), range(8, 10)]
    fill(store)
    images = np.concatenate([images for (images,) in store.batches("images")])
    assert images[:, 0, 0, 0].tolist() == list(range(10))


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, True), (errno.EACCES, False)])
def test_only_a_full_disk_is_to_be_cleared(tmp_path, number, advice):
    with pytest.raises(StoreError) as refused, whole_file(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert ("make room" in str(refused.value)) == advice


def test_a_file_in_the_place_of_the_folder_is_one_error(tmp_path):
    (tmp_path / "afile").write_text("")
    with pytest.raises(StoreError, match="cannot write .*afile"), whole_file(tmp_path / "afile" / "runs" / "a"):
        pass


def test_two_writers_of_one_file_do_not_meet_on_the_way(tmp_path):
    """Also where both have one process number, on two machines."""
    path = tmp_path / "run.yaml"
    with whole_file(path) as mine:
        mine.write_text("mine")
        with whole_file(path) as other:
            other.write_text("other")
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_two_files_are_not_parsed_at_once(tmp_path, monkeypatch):
    """CPython may answer with a SystemError (its issue 106905): one store is read while another one is, for errors."""
    stores = [store_at(tmp_path / name) for name in "ab"]
    for store in stores:
        fill(store)
    load, inside, both = np.load, threading.Semaphore(1), threading.Event()

    def one_by_one(path):
        if not inside.acquire(blocking=False):
            both.set()
            return load(path)
        both.wait(0.1)  # time for the other one to come in
        inside.release()
        return load(path)

    monkeypatch.setattr(np, "load", one_by_one)
    for _ in zip(*(store.batches("images") for store in stores), strict=True):
        pass
    assert not both.is_set()
