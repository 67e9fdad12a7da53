"""`evodiff fetch`, `convert`, `models` and `doctor`."""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from evodiff.checkpoints import needs
from evodiff.checkpoints.fetch import Advance, fetch
from evodiff.checkpoints.integrity import differs_from_report
from evodiff.checkpoints.registry import KINDS, Entry, cache_folder, find, registry
from evodiff.errors import CheckpointError, ConfigError, EvodiffError


def fetch_main(argv: list[str]) -> int:
    """Bring files of the registry here."""
    parser = argparse.ArgumentParser(
        prog="evodiff fetch",
        description="Download files of the registry into the cache: verified, resumed, from mirrors in order.",
        epilog="EVODIFF_CACHE: another folder than checkpoints/cache. EVODIFF_OFFLINE=1: never use the network.",
    )
    parser.add_argument("name", nargs="*", help="a name of `evodiff models`; a model or a table: all that it needs")
    parser.add_argument("--table", action="append", default=[], help="all that a table needs")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="take this copy instead of downloading"
    )
    args = parser.parse_args(argv)
    names = [entry for name in args.name for entry in needs.of(name)]
    names += [entry for table in args.table for entry in needs.of_table(table)[0]]
    names = list(dict.fromkeys(names))
    if not args.name and not args.table:
        raise ConfigError("say what to fetch: `evodiff fetch NAME`; `evodiff models` lists the names.")
    if args.source and (len(args.name) != 1 or args.table):
        raise ConfigError("--from gives one file: name the one entry it is for.")
    if args.source:
        names = [find(args.name[0]).name]
    failed = []
    for name in names:
        try:
            with _progress(name) as advance:
                path = fetch(name, args.source, advance)
        except EvodiffError as e:  # one dead link does not stop the others
            if len(names) == 1:
                raise
            print(f"evodiff: {e}", file=sys.stderr)
            failed.append(name)
            continue
        remark = differs_from_report(find(name), path)
        if remark:
            print(f"evodiff: {remark}", file=sys.stderr)
        print(f"{name}: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if failed:
        raise CheckpointError(f"{len(failed)} of {len(names)} files could not be fetched: {', '.join(failed)}.")
    absent = {path for name in (*args.name, *args.table) for path in needs.by_hand(name) if not path.exists()}
    for path in sorted(absent):
        print(f"bring {path} here: docs/howto/offline.md tells of pipelines and prompts")
    if not names and not absent:
        print("nothing to fetch: it needs no file of the registry")
    return 0


def convert_main(argv: list[str]) -> int:
    """Turn a published checkpoint into safetensors."""
    parser = argparse.ArgumentParser(
        prog="evodiff convert",
        description="Turn a checkpoint of EDM, score_sde, DDIM or guided-diffusion into safetensors and JSON. "
        "It is read as data: nothing in it is executed.",
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "setting", nargs="*", metavar="key=value", help="arguments of the network that differ, or schedule.key=value"
    )
    parser.add_argument("--out", type=Path, help="file to write; in the cache if not given")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--like", metavar="NAME", help="the network is that of this entry of the registry")
    network.add_argument("--config", type=Path, metavar="JSON", help="file with the arguments of the network")
    parser.add_argument("--raw", action="store_true", help="the weights in training instead of their average (EMA)")
    args = parser.parse_intermixed_args(argv)
    from evodiff.checkpoints.checkpoint import convert, open_checkpoint
    from evodiff.checkpoints.description import Description, described_in

    if args.out and args.out.suffix != ".safetensors":
        raise ConfigError(f"--out {args.out}: the name must end in .safetensors.")
    description = None
    if args.config:
        description = described_in(args.config)
        if description is None:
            raise ConfigError(f"--config {args.config} is no JSON file with config, constructor_kwargs or init_kwargs.")
    if args.like:
        entry = find(args.like)
        if not entry.config:
            raise ConfigError(
                f"--like {args.like}: the registry has no configuration of it; its file describes itself."
            )
        description = Description(entry.architecture, entry.config, entry.schedule)
    checkpoint = open_checkpoint(convert(args.file, args.out, description, args.setting, ema=not args.raw))
    numbers = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    print(f"{checkpoint.path}: {checkpoint.architecture}, {len(checkpoint.tensors)} tensors, {numbers:,} numbers")
    print("schedule " + ", ".join(f"{key}={value}" for key, value in checkpoint.schedule.items()))
    print(f"source sha256 {checkpoint.sha256}")
    return 0


def models_main(argv: list[str]) -> int:
    """List the registry, or all that is known of some entries."""
    parser = argparse.ArgumentParser(
        prog="evodiff models", description="Which published files are here, and which are missing."
    )
    parser.add_argument("name", nargs="*", help="tell all that is known of these")
    parser.add_argument("--missing", action="store_true", help="only what is not here")
    args = parser.parse_args(argv)
    if args.name:
        for name in args.name:
            _tell(find(name))
        return 0
    entries = [e for e in registry().values() if not (args.missing and e.path.is_file())]
    width = max(len(entry.name) for entry in registry().values())
    print(f"cache: {cache_folder()}; mnist_tiny and the mixtures ship with the project and need no files")
    for kind in KINDS:
        print(f"\n{kind}")
        for entry in (e for e in entries if e.kind == kind):
            size = f"{entry.size / 1e6:7.0f} MB" if entry.size else " " * 10
            print(f"  {entry.name:<{width}}  {_state(entry):<9}{size}  {entry.licence}")
    print("\n`evodiff fetch NAME` brings one here; where it says by hand, `evodiff models NAME` tells how.")
    return 0


def doctor_main(argv: list[str]) -> int:
    """Check this installation; the exit code is 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="evodiff doctor", description="Check torch, device, disk, files and tables.")
    parser.add_argument("--quick", action="store_true", help="do not compute hashes")
    args = parser.parse_args(argv)
    from evodiff.checkpoints.doctor import examine

    wrong = 0
    for finding in examine(hashes=not args.quick):
        print(f"{finding.level:<5}  {finding.topic:<28}  {finding.text}", flush=True)
        wrong += finding.level == "wrong"
    print(f"{wrong} to mend" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def _state(entry: Entry) -> str:
    part = entry.path.with_name(f"{entry.file}.part")
    if entry.path.is_file():
        return "here"
    if part.is_file():
        return "begun"
    return "missing" if entry.urls else "by hand"


def _tell(entry: Entry) -> None:
    facts = {
        "kind": entry.kind,
        "state": _state(entry),
        "file": entry.path,
        "size": f"{entry.size:,} bytes{'' if entry.bytes else ', about'}" if entry.size else "not published",
        "sha256": entry.sha256 or (f"{entry.sha256_reported} (reported)" if entry.sha256_reported else ""),
        "md5": entry.md5,
        "licence": entry.licence,
        "paper": entry.paper and f"arXiv {entry.paper}",
        "architecture": entry.architecture,
        "needs": ", ".join(entry.needs),
    }
    print(entry.name)
    for key, value in facts.items():
        if value:
            print(f"  {key:<13}{value}")
    for url in entry.urls:
        print(f"  {'from':<13}{url}")
    print(f"  {'by hand':<13}{entry.by_hand}")


@contextmanager
def _progress(name: str) -> Iterator[Advance]:
    """A bar that begins with the first bytes: a file that is here already shows none."""
    from evodiff.progress import progress

    shown = 0
    with ExitStack() as stack:
        bar = None

        def advance(done: int, total: int | None) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = stack.enter_context(progress(name, math.ceil((total or 0) / 1e6), unit="MB"))
            bar(math.ceil(done / 1e6) - shown)
            shown = math.ceil(done / 1e6)

        yield advance
