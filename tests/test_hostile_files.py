"""Nothing in a checkpoint is executed, and none can take all the memory."""

import io
import os
import pickle
import sys
import zipfile

import pytest
import torch
from checkpoint_files import ADM, official_edm_pickle, saved, weights

from evodiff.checkpoints import load
from evodiff.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("cache")


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
    assert load(official_edm_pickle(tmp_path)).tensors["model.map_layer0.weight"].unique().tolist() == [1 / 64]


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


def test_arguments_that_unfold_without_end_are_refused(tmp_path):
    lists = [0]
    for _ in range(21):
        lists = [lists, lists]
    state = {"_init_kwargs": {"a": lists}, "_parameters": {}, "_buffers": {}, "_modules": {}}
    path = edm_pickle(tmp_path / "a.pkl", persistent("EDMPrecond", state))
    assert path.stat().st_size < 1000
    with pytest.raises(CheckpointError, match="arguments of its constructor have more than 1,000,000 values"):
        load(path)
    named = persistent(lists, {})
    with pytest.raises(CheckpointError, match="class has no name"):
        load(edm_pickle(tmp_path / "b.pkl", named))


def test_bytes_that_are_unpacked_again_and_again_are_refused(tmp_path):
    file = io.BytesIO()
    torch.save(torch.zeros(1000).storage(), file, _use_new_zipfile_serialization=False)
    storage = called("torch.storage._load_from_bytes", file.getvalue())[2:-1]
    arguments = pickle.TUPLE1 + pickle.BINPUT + b"\x62" + pickle.REDUCE
    # the function under memo 0x61 and its arguments under 0x62, then both from there
    first = storage.replace(pickle.MARK, pickle.BINPUT + b"\x61", 1)[: -len(b"tR")] + arguments
    again = (pickle.BINGET + b"\x61" + pickle.BINGET + b"\x62" + pickle.REDUCE + pickle.APPEND) * 3
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.PROTO + b"\x03]" + first + pickle.APPEND + again + pickle.STOP)
    with pytest.raises(CheckpointError, match=r"refused: its [\d,]+ bytes claim to hold [\d,]+ bytes of weights"):
        load(path)


@pytest.mark.parametrize("name", ["collections.OrderedDict", "dnnlib.util.EasyDict"])
def test_no_dictionary_is_made_from_a_list_that_can_be_given_again_and_again(tmp_path, name):
    path = tmp_path / "a.pkl"
    path.write_bytes(called(name, [("a", 1)]))
    with pytest.raises(CheckpointError, match="TypeError"):
        load(path)
