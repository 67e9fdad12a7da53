"""Reading published pickles as data: nothing that a file names is imported or called.

Every global a file may refer to is replaced by a stand-in of this module; any other is refused by its name. Tensors are
checked to lie inside the bytes that the file holds.
"""

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import CheckpointError

TORCH_ZIP = b"PK\x03\x04"
TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""How torch.save files begin: since torch 1.6, and before."""
LONGEST_ARGUMENTS = 1_000_000
"""Values and characters in what a constructor was given; published networks have a few dozen."""


def kind(path: Path) -> str:
    """`safetensors`, `torch` or `pickle`, from the first bytes. Raises CheckpointError for what is known to be no
    PyTorch file: flax msgpack, a web page, a Git LFS pointer, an empty file; and for one that cannot be read."""
    try:
        with path.open("rb") as f:
            head = f.read(512)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}.") from e
    if not head:
        raise CheckpointError(f"{path} is empty. Fetch or copy it again.")
    if head.startswith((TORCH_ZIP, TORCH_LEGACY)):
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return "safetensors"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(
            f"{path} is a web page, not weights: the link showed a page (sign-in, quota, virus scan) instead of the "
            "file. Download it in a browser and give it with `evodiff fetch NAME --from PATH`."
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file it points to. Run `git lfs pull` beside it.")
    is_map = 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)
    if is_map and any(b"\xa0" < head[i : i + 1] < b"\xc0" or head[i] == 0xD9 for i in (1, 3, 5)):
        raise CheckpointError(
            f"{path} is a JAX checkpoint (flax msgpack), which PyTorch cannot read; the PyTorch file of the same name "
            "begins with the letters PK. See `evodiff models cifar10_score_sde_deep` for its source."
        )
    return "pickle"


def read_torch(file: Path | BinaryIO) -> Any:
    """What torch.save wrote, in either format; tensors of a zip file are mapped, not copied. Raises CheckpointError."""
    name = file if isinstance(file, Path) else "a storage inside the file"
    is_zip = _check_zip(file)
    try:
        with torch.serialization.safe_globals(_NUMPY_STAND_INS):
            return torch.load(file, "cpu", weights_only=True, mmap=is_zip and isinstance(file, Path))
    except Exception as e:  # damaged files end in exceptions of every kind
        raise CheckpointError(_reason(name, e)) from e


def read_edm(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Class name, constructor arguments and state_dict of the EMA network in a pickle of NVlabs/edm.

    The source code embedded in such a file is never looked at. Raises CheckpointError.
    """
    content = read_pickle(path)
    network = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(network, _Object) or not isinstance(network.state.get("_init_kwargs"), dict):
        raise CheckpointError(f"{path} is a pickle, but not one of NVlabs/edm: it holds no network under `ema`.")
    try:
        _check_length(network.state["_init_kwargs"])
        arguments = json.loads(json.dumps(network.state["_init_kwargs"]))
        return network.name, arguments, dict(_tensors(path, network, "", set()))
    except (TypeError, ValueError, RecursionError) as e:
        raise CheckpointError(_reason(path, e)) from e


def read_pickle(path: Path) -> Any:
    """A plain pickle whose globals are those of NVlabs/edm files. Raises CheckpointError for any other, naming it."""
    try:
        with path.open("rb") as f:
            return _EDMUnpickler(f, path).load()
    except CheckpointError:
        raise
    except Exception as e:
        raise CheckpointError(_reason(path, e)) from e


def forbidden(path: Path | str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: it refers to {name}, which weights have no need of. Nothing in it was executed. "
        "Get the file from its authors (`evodiff models` names the sources)."
    )


def _check_length(arguments: Any) -> None:
    """Raise ValueError where lists in lists, each used twice, would unfold to more than memory holds."""
    waiting, length = [arguments], 0
    while waiting:
        value = waiting.pop()
        inner: Any = value if isinstance(value, str | list | tuple) else ()
        if isinstance(value, Mapping):
            inner = [*value.keys(), *value.values()]
        length += len(inner)
        if length > LONGEST_ARGUMENTS:
            raise ValueError(f"the arguments of its constructor have more than {LONGEST_ARGUMENTS:,} values")
        waiting.extend(() if isinstance(value, str) else inner)


class _Object:
    """An object of the file: the name of its class and its attributes."""

    def __init__(self, name: Any, state: Any = None):
        if not isinstance(name, str):
            raise TypeError("an object whose class has no name")
        self.name = name
        self.state: dict[str, Any] = state if isinstance(state, dict) else {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Dtype:
    """Stands for numpy.dtype, for numbers only."""

    def __init__(self, code: Any, *_: Any):
        self.code, self.order = code if isinstance(code, str) else "", "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "<"


def _scalar(dtype: _Dtype, data: bytes) -> int | float | bool:
    """Stands for numpy's multiarray.scalar: a Python number from its bytes."""
    if not re.fullmatch(r"[biuf][1248]", dtype.code):
        raise ValueError(f"a numpy scalar of type {dtype.code}")
    return np.frombuffer(data, np.dtype(dtype.order + dtype.code))[0].item()


_NUMPY_STAND_INS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_Dtype, "numpy.dtype"),
]


class _EDMUnpickler(pickle.Unpickler):
    """Looks no global up. Stand-ins are made anew for each file, because a file may set attributes on them."""

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file)
        self.path, size, held = path, path.stat().st_size, 0

        class ModuleDict(_Object):
            def __init__(self) -> None:
                super().__init__("ModuleDict")

        class Dtype(_Dtype):
            pass

        class Dict(OrderedDict[Any, Any]):
            def __init__(self) -> None:  # items come one by one, as they lie in the file: no list is copied
                super().__init__()

        def storage(data: bytes) -> torch.storage.TypedStorage:
            nonlocal held
            held += len(data)
            if held > size:
                raise CheckpointError(f"{path} is refused: its {size:,} bytes claim to hold {held:,} bytes of weights.")
            loaded = read_torch(io.BytesIO(data))
            if not isinstance(loaded, torch.storage.TypedStorage):
                raise TypeError("a storage that holds something else")
            return loaded

        def tensor(storage: torch.storage.TypedStorage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
            flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)  # type: ignore[call-overload]
            return flat.as_strided(size, stride, offset)  # raises where it would reach beyond the storage

        self.stand_ins: dict[str, Callable[..., Any]] = {
            "torch_utils.persistence._reconstruct_persistent_obj": lambda meta: _Object(
                meta["class_name"], meta["state"]
            ),
            "torch.nn.modules.container.ModuleDict": ModuleDict,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch.storage._load_from_bytes": storage,
            "collections.OrderedDict": Dict,
            "dnnlib.util.EasyDict": Dict,
            "numpy.dtype": Dtype,
            "numpy.core.multiarray.scalar": lambda dtype, data: _scalar(dtype, data),
            "numpy._core.multiarray.scalar": lambda dtype, data: _scalar(dtype, data),
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.stand_ins[f"{module}.{name}"]
        except KeyError:
            raise forbidden(self.path, f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to something outside the file")


def _tensors(path: Path, module: _Object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The state_dict of a module in torch's order: parameters, buffers, children.

    A module that is in two places is refused: references of that kind could make a small file endless.
    """
    if id(module) in seen:
        raise CheckpointError(f"{path} is refused: its {prefix or module.name} is in two places of the network.")
    seen.add(id(module))
    transient = module.state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for key, value in _items(path, module, group):
            if isinstance(value, Tensor) and not (group == "_buffers" and key in transient):
                yield prefix + key, value
            elif value is not None and not isinstance(value, Tensor):
                raise CheckpointError(f"{path}: {prefix}{key} is no tensor. The file is damaged; fetch it again.")
    for key, child in _items(path, module, "_modules"):
        if isinstance(child, _Object):
            yield from _tensors(path, child, f"{prefix}{key}.", seen)


def _items(path: Path, module: _Object, group: str) -> list[tuple[str, Any]]:
    value = module.state.get(group)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: the {module.name} in it has no {group}. The file is damaged; fetch it again.")
    return [(str(k), v) for k, v in value.items()]


def _check_zip(file: Path | BinaryIO) -> bool:
    """Whether this is a zip file; raises CheckpointError for one that unpacks to more than it holds."""
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as f:
        size = f.seek(0, io.SEEK_END)
        f.seek(0)
        is_zip = f.read(len(TORCH_ZIP)) == TORCH_ZIP
        try:
            infos = zipfile.ZipFile(f).infolist() if is_zip else []
        except (zipfile.BadZipFile, OSError, ValueError) as e:
            raise CheckpointError(_reason(file, e)) from e
        f.seek(0)
    if not is_zip:
        return False
    unpacked = sum(info.file_size for info in infos)
    if unpacked > size or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise CheckpointError(
            f"{file} is refused: its {size:,} bytes unpack to {unpacked:,}, but torch.save never compresses. "
            "Nothing in it was executed."
        )
    if not any(info.filename.endswith("data.pkl") for info in infos):
        raise CheckpointError(f"{file} is a zip archive, but no PyTorch file. Unpack it and give the file inside.")
    return True


def _reason(name: object, error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return str(forbidden(str(name), found[1].strip(".")))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[-1 if isinstance(error, pickle.UnpicklingError) else 0]}" if lines else ""
    what = (said or type(error).__name__)[:200]
    return f"{name} cannot be read ({what}). It is cut short, damaged, or no file of weights."
