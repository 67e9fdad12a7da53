"""`evodiff score path=...` and `evodiff stats build|inspect|convert|diff`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from evodiff.device import device_for
from evodiff.errors import ConfigError, MetricError
from evodiff.files import sha256
from evodiff.metrics.build import build_reference
from evodiff.metrics.datasets import DATASETS, SIDES, dataset_batches
from evodiff.metrics.features import extractor
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.images import count_images, lossy, read_images
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import Protocol, protocol
from evodiff.metrics.reference import Reference
from evodiff.metrics.score import METRICS, Scorer, extractor_of, files_used, reference_path, score_moments, sum_of
from evodiff.paths import CHECKPOINTS

USAGE = """evodiff score path=DIR|ZIP|NPZ protocol=NAME [key=value ...] [--json]

path       a folder or zip of images, an npz of images, a run of this project, or the moments of earlier calls (several
           with a comma between them)
protocol   a name in configs/protocol; protocol.FIELD=VALUE changes a field, and with it the hash
reference  real images, or statistics of them, instead of the protocol's: DIR|ZIP|NPZ
metrics    of %s; with commas, default fid
weights    file of the extractor, instead of the registry's
moments    NPZ to write the moments to, for adding up with others
device     auto: the GPU if there is one
batch      images that the extractor sees at once, default 64

evodiff score [key=value ...]   without a path, the images of a run of this project: keys as in `evodiff run --help`"""


ROUNDING = 1e-6
"""Of the mean square of features, what rounding explains of the squared distance between statistics."""


def score_path_main(argv: list[str]) -> int:
    """Score images from anywhere as this project's own are scored."""
    if "-h" in argv or "--help" in argv:
        print(USAGE % ", ".join(METRICS))
        return 0
    options = _options([a for a in argv if a != "--json"])
    chosen = _protocol(options)
    paths = [Path(p) for p in options["path"].split(",")]
    asked = options["metrics"].strip("[]").replace(" ", "").split(",")
    kept = npz_name(Path(options["moments"])) if "moments" in options else None
    for path in paths:
        if not path.exists():
            raise ConfigError(f"path={path} does not exist; give a folder of images, a zip of images or an npz")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(f"path={options['path']} names a file twice, whose images would count twice; name each once")
    if kept is not None and kept.resolve() in {path.resolve() for path in paths}:
        raise ConfigError(f"moments={kept} is one of the files that are read: give the sum another name")
    weights = Path(options["weights"]) if "weights" in options else None
    real = None
    if "reference" in options:
        chosen, real = _beside(Path(options["reference"]), chosen, options, weights)
    about: dict[str, Any] = {"path": options["path"], "protocol": chosen.describe()}
    if all(_is_moments(p) for p in paths):
        if asked != ["fid"]:
            raise ConfigError(f"metrics={','.join(asked)}: moments give fid alone. Score the images themselves.")
        moments = sum_of(map(Moments.load, paths))
        _check_side(moments, chosen)
        metrics = score_moments([moments], chosen, real)
        about["files"] = {} if real else {"reference": sha256(reference_path(chosen))}
        if kept is not None:
            moments.save(kept)
    elif len(paths) > 1:
        raise ConfigError("several paths can only be moments; score images from one path at a time")
    else:
        scorer = Scorer(chosen, options["device"], asked, weights, real)
        if (n := count_images(paths[0])) is not None:
            scorer.check_count(n)
        for images in read_images(paths[0], scorer.extract.channels, chosen.rounding, int(options["batch"])):
            scorer.add(images)
            _check_side(scorer.moments, chosen)
        if kept is not None:
            scorer.moments.save(kept)
        metrics = scorer.result()
        files = {"extractor": scorer.extract.sha256} if real else files_used(chosen, options["device"], weights)
        about |= {"files": files, "lossy": lossy(paths[0])}
    if "--json" in argv:
        print(json.dumps({**about, "metrics": metrics}, indent=1))
        return 0
    for name, value in metrics.items():
        print(f"{name:<24} {value:.6g}" + (f"   proxy: the protocol asks for {chosen.n}" * chosen.is_proxy(name)))
    told = "; some images come from lossy files" * bool(about.get("lossy"))
    beside = f"{real.gaussian.n} images" if real else chosen.reference
    print(f"protocol {chosen.name} {chosen.hash}, beside {chosen.dataset} ({beside}){told}")
    return 0


def _check_side(moments: Moments, protocol: Protocol) -> None:
    """Raise MetricError for images from anywhere that are not of the size of the protocol's data set, which published
    statistics do not say. Those of a run are what its network gives."""
    size, side = moments.image_size, SIDES.get(protocol.dataset)
    if size and side and size != [side, side]:
        raise MetricError(
            f"the images are {size[0]}x{size[1]}, but those of {protocol.dataset} are {side}x{side}: choose another "
            f"protocol.dataset, or score images of that size"
        )


def _options(argv: list[str]) -> dict[str, str]:
    options = {"device": "auto", "metrics": "fid", "batch": "64"}
    known = {*options, "path", "protocol", "reference", "weights", "moments"}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or (key not in known and not key.startswith("protocol.")):
            raise ConfigError(f"cannot read {argument!r}; there are {', '.join(sorted(known))}, --json")
        options[key] = value
    if not options.get("path") or not options.get("protocol"):
        raise ConfigError("give both path=DIR|ZIP|NPZ and protocol=NAME")
    if not options["batch"].isdecimal() or int(options["batch"]) < 1:
        raise ConfigError(f"batch={options['batch']}: expected a number of images, at least 1")
    return {**options, "device": device_for(options["device"])}


def _protocol(options: dict[str, str]) -> Protocol:
    given = [f"{key}={value}" for key, value in options.items() if key.startswith("protocol.")]
    try:
        changes = OmegaConf.from_dotlist([change.removeprefix("protocol.") for change in given])
        OmegaConf.resolve(changes)
    except (OmegaConfBaseException, YAMLError) as e:
        raise ConfigError(f"{' '.join(given)} cannot be read: {' '.join(str(e).split())}") from e
    chosen = protocol(options["protocol"], **{str(k): v for k, v in changes.items()})
    if "weights" in options:
        if not Path(options["weights"]).is_file():
            raise ConfigError(f"weights={options['weights']} is not there")
        digest = sha256(Path(options["weights"]))
        if not digest.startswith(chosen.extractor_sha256 or digest):  # other weights are another protocol, by its hash
            chosen = replace(chosen, extractor_sha256=digest)
    return chosen


def _beside(
    path: Path, chosen: Protocol, options: dict[str, str], weights: Path | None
) -> tuple[Protocol, Reference | None]:
    """The protocol with the real images at `path` for its reference, and their statistics if these are no file."""
    if any(key.startswith(("protocol.reference", "protocol.dataset")) for key in options):
        raise ConfigError("reference= stands for protocol.reference and protocol.dataset: leave these out")
    if not path.exists():
        raise ConfigError(f"reference={path} does not exist; give images (a folder, zip or npz) or statistics of them")
    if path.is_file() and path.suffix.lower() != ".zip" and not _has(path, "images", "samples", "arr_0"):
        return replace(chosen, dataset=str(path), reference=str(path.resolve()), reference_sha256=sha256(path)), None
    chosen = replace(chosen, dataset=str(path), reference=str(path), reference_sha256=None)
    extract = extractor_of(chosen, options["device"], weights)
    images = read_images(path, extract.channels, chosen.rounding, int(options["batch"]))
    return chosen, build_reference(images, extract, chosen)


def _is_moments(path: Path) -> bool:
    return _has(path, "outer")


def _has(path: Path, *names: str) -> bool:
    """Whether it is an npz with an array of one of these names."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path) as file:
            return any(name in file for name in names)
    except Exception:  # whatever else it is, the reader of images says so
        return False


def stats_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="evodiff stats",
        description="Statistics of real images, to which scores refer",
        epilog="`evodiff stats ems` makes those of a model, for DPM-Solver-v3; `evodiff stats ems --help`.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make them of real images")
    build.add_argument("dataset", help=f"mnist, {', '.join(DATASETS)}, or a folder, zip or npz of images")
    build.add_argument("--protocol", help="whose extractor and resize to use (default for mnist: mnist)")
    build.add_argument(
        "--out", type=Path, help="default: checkpoints/<protocol>_reference/<dataset>.npz, if that is not there yet"
    )
    build.add_argument("--weights", type=Path, help="file of the extractor, instead of the registry's")
    build.add_argument("--root", type=Path, default=CHECKPOINTS / "cache" / "datasets", help="of torchvision's data")
    build.add_argument("--no-features", action="store_true", help="leave out what kid and pr need: for many images")
    build.add_argument("--limit", type=int, help="only the first images of a named data set")
    build.add_argument("--device", default="auto", help="default: the GPU if there is one")
    build.add_argument("--batch", type=int, default=64)
    build.set_defaults(run=_build)
    inspect = commands.add_parser("inspect", help="say what a file holds, and check it")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)
    convert = commands.add_parser("convert", help="EDM, pytorch-fid, TF-GAN, ADM or torch-fidelity file to our format")
    convert.add_argument("file", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument("--count", type=int, help="number of images behind mu and sigma, if known")
    convert.add_argument("--dataset", help="name of the data set, for the provenance")
    convert.set_defaults(run=_convert)
    diff = commands.add_parser("diff", help="compare two files; exit 1 if they differ by more than rounding")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    diff.set_defaults(run=_diff)
    args = parser.parse_args(argv)
    result: int = args.run(args)
    return result


def _build(args: argparse.Namespace) -> int:
    name = args.protocol or ("mnist" if args.dataset == "mnist" else None)
    if name is None:
        raise ConfigError("say with --protocol whose extractor and resize the statistics are for")
    chosen = protocol(name)
    for option in ("limit", "batch"):
        if (number := getattr(args, option)) is not None and number < 1:
            raise ConfigError(f"--{option} {number} is impossible: expected at least 1.")
    if not args.dataset:
        raise ConfigError(f"name the images: mnist, {', '.join(DATASETS)}, or a folder, zip or npz")
    if args.out is None and args.limit is not None:
        raise ConfigError("--limit makes statistics for a trial: say with --out where they go")
    out = npz_name(args.out or _place(args.dataset, chosen))
    extract = extractor(chosen.extractor, device_for(args.device), chosen.resize, chosen.scaling, args.weights)
    batches, about = dataset_batches(args.dataset, args.root, extract.channels, args.batch, args.limit, chosen.rounding)
    reference = build_reference(batches, extract, chosen, features=not args.no_features, **about)
    reference.save(out)
    print(f"{out}\nsha256 {sha256(out)}")
    _describe(reference)
    return 0


def _place(dataset: str, chosen: Protocol) -> Path:
    """Where the statistics go, if nothing is there and it is no other data set's. Raises ConfigError."""
    path = Path(dataset).resolve()
    named = {"mnist": chosen.metric, **{name: name for name in DATASETS}}
    name = named.get(dataset, path.stem if path.is_file() else path.name)
    out = CHECKPOINTS / f"{chosen.name}_reference" / f"{name}.npz"
    if dataset not in named and name in named.values():
        raise ConfigError(f"{out} is the place of another data set: say with --out where the statistics of {path} go")
    if out.exists():
        raise ConfigError(f"{out} is there already: say with --out where these go (the same name replaces it)")
    return out


def _inspect(args: argparse.Namespace) -> int:
    reference = Reference.load(args.file)
    if args.json:
        print(json.dumps({"sha256": sha256(args.file), **_facts(reference)}, indent=1))
    else:
        print(f"{args.file}\nsha256 {sha256(args.file)}")
        _describe(reference)
    return 0


def _facts(reference: Reference) -> dict[str, Any]:
    eigenvalues = torch.linalg.eigvalsh(reference.gaussian.cov)
    return {
        "count": reference.gaussian.n,
        "dim": reference.dim,
        "spatial_dim": len(reference.spatial.mean) if reference.spatial else None,
        "features": None if reference.features is None else list(reference.features.shape),
        "trace": reference.gaussian.cov.trace().item(),
        "eigenvalues": [eigenvalues[0].item(), eigenvalues[-1].item()],
        **reference.provenance,
    }


def _describe(reference: Reference) -> None:
    for key, value in _facts(reference).items():
        print(f"{key:<20} {'unknown' if value is None else value}")


def npz_name(path: Path) -> Path:
    """Raises ConfigError for another ending, for NumPy would add it to the name."""
    if path.suffix != ".npz":
        raise ConfigError(f"{path} must have a name that ends in .npz")
    return path


def _convert(args: argparse.Namespace) -> int:
    npz_name(args.out)
    reference = Reference.load(args.file)
    n = args.count if args.count is not None else reference.gaussian.n
    if reference.features is not None and n != len(reference.features):
        raise ConfigError(f"{args.file} holds the features of {len(reference.features)} images, not of {n}")
    if args.count is not None and args.count < (least := _least_images(reference.gaussian)):
        raise ConfigError(f"--count {n} is impossible: the covariance in {args.file} is of at least {least} images")
    about = {**reference.provenance, "source_sha256": sha256(args.file)}
    if args.dataset:
        about["dataset"] = args.dataset
    converted = replace(reference, gaussian=replace(reference.gaussian, n=n), provenance=about)
    converted.save(args.out)
    print(f"{args.out}\nsha256 {sha256(args.out)}")
    return 0


def _least_images(gaussian: Gaussian) -> int:
    """One more than the rank of the covariance, without eigenvalues as small as float32 makes by rounding."""
    eigenvalues = torch.linalg.eigvalsh(gaussian.cov)
    return max(2, 1 + int((eigenvalues > 1e-6 * eigenvalues[-1]).sum()))


def _diff(args: argparse.Namespace) -> int:
    a, b = Reference.load(args.a), Reference.load(args.b)
    facts = [{**r.provenance, "count": r.gaussian.n, "dim": r.dim} for r in (a, b)]
    for key in sorted(facts[0].keys() | facts[1].keys()):
        values = [f.get(key) for f in facts]
        if values[0] != values[1]:
            print(f"{key:<20} {values[0]}  |  {values[1]}")
    differ = _differ("", a.gaussian, b.gaussian)
    for name in ("spatial", "features"):
        parts = [getattr(r, name) for r in (a, b)]
        if all(part is not None for part in parts):
            differ |= _differ("spatial ", *parts) if name == "spatial" else _features_differ(*parts)
        elif any(part is not None for part in parts):
            print(f"{name:<20} only in {args.b if parts[0] is None else args.a}")
    return int(differ)


def _differ(of: str, a: Gaussian, b: Gaussian) -> bool:
    distance = frechet_distance(a, b)
    print(f"{of + 'mean':<20} max difference {(a.mean - b.mean).abs().max().item():.3e}")
    print(f"{of + 'covariance':<20} max difference {(a.cov - b.cov).abs().max().item():.3e}")
    print(f"{of + 'fréchet distance':<20} {distance:.6g}")
    return distance > ROUNDING * max(g.cov.trace().item() + g.mean.square().sum().item() for g in (a, b))


def _features_differ(a: Tensor, b: Tensor) -> bool:
    """Image by image: kid and pr take them in their order."""
    if a.shape != b.shape:
        print(f"{'features':<20} {list(a.shape)}  |  {list(b.shape)}")
        return True
    a, b = a.double(), b.double()
    print(f"{'features':<20} max difference {(a - b).abs().max().item():.3e}")
    return not (a - b).square().sum() <= ROUNDING * a.square().sum()  # nor of nan
