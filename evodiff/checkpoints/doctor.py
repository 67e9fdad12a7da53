"""What works on this machine, what is damaged, and what each table still needs."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evodiff.checkpoints import needs
from evodiff.checkpoints.integrity import check, odd_size
from evodiff.checkpoints.registry import Entry, cache_folder, find, offline, registry
from evodiff.errors import EvodiffError
from evodiff.files import read_yaml, sha256
from evodiff.paths import CHECKPOINTS, CONFIGS

OPTIONAL = {"wandb": "dashboards", "diffusers": "latent models"}


@dataclass(frozen=True)
class Finding:
    """`level` is ok, note (nothing is broken, something is absent) or wrong (to be mended before it can be used)."""

    level: str
    topic: str
    text: str


def examine(hashes: bool = True) -> Iterator[Finding]:
    """All findings, the machine first. Without `hashes` files are compared by size only."""
    yield from _machine()
    yield from _disk()
    yield from _shipped()
    yield from _files(hashes)
    yield from _tables()


def _machine() -> Iterator[Finding]:
    try:
        import torch
    except Exception as e:  # a broken installation fails in many ways
        yield Finding("wrong", "torch", f"cannot be imported ({e}). Run `make setup`.")
        return
    yield Finding("ok", "python", platform.python_version())
    yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    try:
        from evodiff.compat import import_torchvision

        yield Finding("ok", "torchvision", str(import_torchvision().__version__))
    except Exception as e:
        yield Finding("wrong", "torchvision", f"cannot be imported ({e}): FID needs it. Run `make setup`.")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            name = torch.cuda.get_device_name(i)
            yield Finding("ok", f"cuda:{i}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif torch.version.cuda:
        yield Finding("note", "device", f"cpu: this torch is for CUDA {torch.version.cuda}, but sees no GPU or driver.")
    elif torch.backends.mps.is_available():
        yield Finding("ok", "device", "mps (its states are float32: dtype=float32)")
    else:
        yield Finding("note", "device", "cpu: enough for mnist_tiny; the published models take hours per table.")
    for package, use in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield Finding("note", package, f"absent, only needed for {use}: `pip install -e '.[{package}]'`.")


def _disk() -> Iterator[Finding]:
    folder = cache_folder()
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder}, {free / 1e9:.1f} GB free" + (", EVODIFF_CACHE" if os.environ.get("EVODIFF_CACHE") else "")
    if not there.is_dir():
        yield Finding("wrong", "cache", f"{there} is no folder. Set EVODIFF_CACHE to a folder.")
    elif not os.access(there, os.W_OK):
        yield Finding("wrong", "cache", f"{text}: cannot be written. Set EVODIFF_CACHE to another folder.")
    else:
        yield Finding(
            "note" if free < 5e9 else "ok", "cache", text + (": the larger models need more." if free < 5e9 else "")
        )
    if offline():
        yield Finding(
            "note", "network", "EVODIFF_OFFLINE is set: nothing is downloaded; use `evodiff fetch NAME --from PATH`."
        )


def _shipped() -> Iterator[Finding]:
    """The files that come with the project, as far as a protocol states their hashes, and its network."""
    weights = CHECKPOINTS / "mnist_tiny" / "ema.safetensors"
    if not weights.is_file():
        text = (
            f"{weights} is missing. Restore it (`git checkout {weights}`) or run `python scripts/train.py mnist_tiny`."
        )
        yield Finding("wrong", "mnist_tiny", text)
    for path in sorted((CONFIGS / "protocol").glob("*.yaml")):
        protocol = read_yaml(path) or {}
        if not isinstance(protocol, dict):
            yield Finding("wrong", path.stem, f"{path} is no mapping of settings. Mend it.")
            continue
        classifiers = sorted((CHECKPOINTS / str(protocol.get("extractor"))).glob("*.safetensors"))
        reference = [CHECKPOINTS / str(protocol["reference"])] if protocol.get("reference") else []
        stated = [(file, protocol.get("reference_sha256")) for file in reference]
        stated += [(file, protocol.get("extractor_sha256")) for file in classifiers]
        digests = [(file, str(digest)) for file, digest in stated if digest is not None]
        wrong = [file for file, digest in digests if not file.is_file() or not sha256(file).startswith(digest)]
        for file in wrong:
            text = f"{file} is not the file that {path.name} was made with. Restore it: `git checkout {file}`."
            yield Finding("wrong", path.stem, text)
        if digests and not wrong:
            yield Finding("ok", path.stem, "the shipped files of this protocol are whole")


def _files(hashes: bool) -> Iterator[Finding]:
    here = [entry for entry in registry().values() if entry.path.is_file()]
    for entry in here:
        wrong = check(entry, entry.path, hashes)
        again = f"Delete {entry.path} and run `evodiff fetch {entry.name}`."
        if wrong:
            yield Finding("wrong", entry.name, f"{wrong}. {again}")
        elif odd := odd_size(entry, entry.path.stat().st_size):
            yield Finding("note", entry.name, f"{odd}. {again.removesuffix('.')}, unless it is meant so.")
        else:
            yield Finding("ok", entry.name, f"{entry.path.stat().st_size / 1e6:.0f} MB")
    for entry in registry().values():
        done = _begun(entry)
        if done:
            text = f"a download broke off after {done / 1e6:.0f} MB. `evodiff fetch {entry.name}` goes on from there."
            yield Finding("note", entry.name, text)
    if not here:
        yield Finding("note", "files", "nothing is fetched yet; mnist_tiny and the mixtures ship with the project.")


def _begun(entry: Entry) -> int:
    part = entry.path.with_name(f"{entry.file}.part")
    return part.stat().st_size if part.is_file() and not entry.path.is_file() else 0


def _tables() -> Iterator[Finding]:
    for name in needs.tables():
        try:
            entries, made = needs.of_table(name)
            by_hand = needs.by_hand(name)
        except EvodiffError as e:
            yield Finding("wrong", f"table {name}", str(e))
            continue
        lacking = [find(entry) for entry in entries if not find(entry).path.is_file()]
        todo = _todo(lacking, [path for path in (*made, *by_hand) if not path.exists()])
        here = f"its files are here: `make table-{name}`; `evodiff status {name}` tells what it takes"
        yield Finding("note" if todo else "ok", f"table {name}", todo or here)


def _todo(lacking: list[Entry], absent: list[Path]) -> str:
    told = []
    if lacking:
        size = sum(entry.size or 0 for entry in lacking)
        known = f" ({size / 1e9:.1f} GB)" if size else ""
        automatic = [entry.name for entry in lacking if entry.urls]
        if automatic:
            told.append(f"`evodiff fetch {' '.join(automatic)}`{known}")
        told += [entry.by_hand for entry in lacking if not entry.urls]
    told += [f"make {p} with `evodiff stats build`" if p.suffix == ".npz" else f"bring {p} here" for p in absent]
    return "; ".join(told)
