"""What the pipeline costs beside the network, and what number formats bring: `python scripts/bench.py [PART ...]
[--device cuda] [--official PATH]` writes results/bench/pipeline.json and .md.

Every figure is a ratio of times taken in turns in one run, or stands beside what it is compared with: medians over
repeats, with quartiles. The networks of EDM's CIFAR-10 size and of ADM's ImageNet-256 size have random weights.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_models import adm256, edm_cifar10, tiny
from bench_network import NFE, batches, formats, memory_kept, threads, throughput
from benchmark import Findings, forget_peak, machine, memory, on, seconds, spread
from torch import Tensor

from evodiff.device import finished
from evodiff.files import whole_file
from evodiff.guidance import Classifier
from evodiff.metrics.score import score
from evodiff.models.pretrained import Pretrained
from evodiff.paths import results_folder
from evodiff.precision import prepared
from evodiff.runs.job import Job, store_of
from evodiff.runs.run import DTYPES
from evodiff.runs.sample import sample_run
from evodiff.runs.score import score_run
from evodiff.sampling import generate
from evodiff.tables.throughput import measured_file

MAIN = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc_3", "evodiff")


class Stopwatch:
    """A denoiser that adds up the time spent in it."""

    def __init__(self, denoiser: Any, device: str):
        self.denoiser, self.schedule, self.device = denoiser, denoiser.schedule, device
        self.inside = 0.0
        self.events: list[tuple[Any, Any]] = []

    def __call__(self, x: Tensor, node: Any) -> Tensor:
        if self.device.startswith("cuda"):  # events on the stream: nothing waits
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            out = self.denoiser(x, node)
            last.record()
            self.events.append((first, last))
            return out
        started = time.perf_counter()
        out = self.denoiser(x, node)
        self.inside += time.perf_counter() - started
        return out

    def total(self) -> float:
        finished(self.device)
        return self.inside + sum(a.elapsed_time(b) / 1000 for a, b in self.events)


def overhead(device: str, _: Any) -> dict[str, Any]:
    """Time outside the network, relative to the time in it, of everything from seeds to uint8 images; the state is in
    float64 unless it says otherwise."""
    gpu, solvers = device.startswith("cuda"), (*MAIN, "evodiff dtype=float32")
    sizes: dict[str, tuple[Callable[[str], Pretrained], int, int, int, tuple[str, ...]]] = {
        "mnist_tiny": (tiny, 500 if gpu else 100, NFE, 5, solvers),
        "EDM CIFAR-10 size": (edm_cifar10, 256 if gpu else 4, NFE if gpu else 5, 5 if gpu else 3, solvers),
        "ADM ImageNet-256 size, guided": (adm256, 8 if gpu else 1, NFE if gpu else 2, 3 if gpu else 2, MAIN[1::3]),
    }
    found: dict[str, Any] = {}
    for name, (make, batch, nfe, repeats, solvers) in sizes.items():
        model = prepared(make(device))
        shares: dict[str, list[float]] = {solver: [] for solver in solvers}
        labels = torch.arange(batch, device=device) if model.num_classes else None
        for repeat in range(repeats + gpu):
            for solver in solvers:
                run = Job.compose([*f"solver={solver}".split(), f"nfe={nfe}", "device=cpu"]).run
                ready, grid = run.plan(model)
                denoiser = Classifier(2.0)(model, labels) if labels is not None else model.denoiser(None)
                watch = Stopwatch(denoiser, device)
                how = {"device": device, "dtype": DTYPES[run.dtype]}
                taken = seconds(device, generate, watch, ready, grid, range(batch), model.shape, **how)
                if repeat >= gpu:  # on a GPU the first time chooses kernels
                    shares[solver].append(taken / watch.total() - 1)
        found[name] = {"batch": batch, "nfe": nfe} | {solver: spread(values) for solver, values in shares.items()}
    return found


def run_of(model: dict[str, Any], *overrides: str) -> Job:
    """A job on a model that has no file in configs/model."""
    job = Job.compose([f"nfe={NFE}", "reference_run=null", *overrides])
    return replace(job, run=replace(job.run, model=model))


MNIST = {"name": "mnist_tiny", "_target_": "evodiff.models.mnist.mnist_tiny"}
CIFAR = {"name": "edm_cifar10_size", "_target_": "bench_models.edm_cifar10"}


@contextmanager
def thrown_away() -> Iterator[None]:
    """Runs go to a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, EVODIFF_RESULTS=folder):
        yield


def whole_run(job: Job) -> None:
    """From nothing to shards, and to a score where there is a protocol."""
    with thrown_away():
        assert sample_run(job)
        if job.protocol:
            score_run(job)


def official_loop(official: tuple[Any, Any], model: Pretrained, images: int, batch: int, job: Job) -> None:
    """The official sampler in the usual loop: float64 state, float32 network, an npz a batch; and the score, if any."""
    code, utils = official
    network, made = model.networks[0], []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for seeds in (range(first, min(first + batch, images)) for first in range(0, images, batch)):
            latents = torch.stack([torch.randn(model.shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
            schedule = utils.NoiseScheduleEDM()
            wrapped = utils.model_wrapper(lambda x, t, label: network(x, t).to(torch.float64), schedule)
            options = {"steps": NFE, "t_start": 80.0, "t_end": 0.002, "order": 2, "skip_type": "logSNR"}
            x = code.EVODiff_edm(schedule).sample(wrapped, 80.0 * latents.to(job.device).double(), **options)
            pixels = (x * 127.5 + 127.5).clip(0, 255).round().to(torch.uint8).cpu()
            np.savez_compressed(Path(folder) / f"{seeds.start}.npz", samples=pixels.numpy())
            made.append(pixels)
        if job.protocol:
            score(made, job.protocol, job.device)


def pipeline(device: str, checkout: Path | None) -> dict[str, Any]:
    """Images per second from seeds to files (and to the score), beside the official sampler in the usual loop on the
    same network: float64 state, float32 network, no compilation; a batch of noise, sampling, uint8, an npz a batch."""
    if checkout is None:
        return {"missing": "no checkout of the official code was given (--official PATH)"}
    sys.path.insert(0, str(next(checkout.rglob("samplers/evodiff.py")).parent.parent))
    official = importlib.import_module("samplers.evodiff"), importlib.import_module("samplers.utils")
    gpu = device.startswith("cuda")
    cases: dict[str, tuple[dict[str, Any], int, int, list[str]]] = {
        "mnist_tiny, with its score": (MNIST, 20_000 if gpu else 1000, 500, ["protocol=mnist", "metrics=[fid]"]),
        "EDM CIFAR-10 size": (CIFAR, 4096 if gpu else 8, 256 if gpu else 8, ["protocol=none"]),
    }
    faster = {"ours, bf16, compiled": ["precision=bf16", "channels_last=true", "compile=true"]} if gpu else {}
    ways: dict[str, list[str]] = {"ours, fp32": [], "ours, fp32, channels last": ["channels_last=true"], **faster}
    found: dict[str, Any] = {}
    for name, (config, images, batch, extra) in cases.items():
        rates: dict[str, list[float]] = {"official-style loop": [], **{way: [] for way in ways}}
        model = tiny(device) if config is MNIST else edm_cifar10(device)
        given = [f"seeds=0-{images - 1}", f"batch={batch}", f"device={device}", *extra]
        jobs = {way: run_of(config, *given, *options) for way, options in ways.items()}
        for repeat in range(3 + gpu):
            taken = [seconds(device, official_loop, official, model, images, batch, jobs["ours, fp32"])]
            taken += [seconds(device, whole_run, job) for job in jobs.values()]
            if repeat >= gpu:
                for values, value in zip(rates.values(), taken, strict=True):
                    values.append(images / value)
        base = spread(rates["official-style loop"])["median"]
        found[name] = {"images": images, "batch": batch} | {
            way: spread(values) | {"times": spread(values)["median"] / base} for way, values in rates.items()
        }
    return found


def overlap(device: str, _: Any) -> dict[str, Any]:
    """A run that writes its shards, beside the same sampling that writes nothing; and a score that reads them, beside
    the same features of images in memory."""
    images = 20_000 if device.startswith("cuda") else 1000
    given = [f"seeds=0-{images - 1}", "shard=200", "batch=200", f"device={device}", "metrics=[fid]"]
    job = run_of(MNIST, *given, "protocol=none")
    model = prepared(tiny(device))
    ready, grid = job.run.plan(model)

    def sampling() -> None:
        for first in range(0, images, 200):
            generate(model.denoiser(None), ready, grid, range(first, first + 200), model.shape, device=device)

    written = [seconds(device, whole_run, job) / seconds(device, sampling) for _ in range(4)]
    found: dict[str, Any] = {"images": images, "shard": 200, "run / sampling alone": spread(written[1:])}

    job = run_of(MNIST, *given, "protocol=mnist")
    assert job.protocol
    read = []
    with thrown_away():
        sample_run(job)
        pixels = [torch.from_numpy(part) for (part,) in store_of(job).batches("images")]
        for _ in range(4):
            read.append(seconds(device, score_run, job) / seconds(device, score, pixels, job.protocol, device))
            (job.run.folder / "score.json").unlink()
    return found | {"score of files / of images in memory": spread(read[1:])}


def start(device: str, _: Any) -> dict[str, Any]:
    """Seconds from nothing, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"EVODIFF_RESULTS": folder, "PATH": str(Path(sys.executable).parent)}
        commands = {
            "import evodiff": ["-c", "import evodiff"],
            "evodiff --help": ["-m", "evodiff.cli", "--help"],
            "first image of mnist_tiny": ["-m", "evodiff.cli", "sample", "seeds=0", f"device={device}"],
            "python -c 'import torch', beside them": ["-c", "import torch"],
        }
        found: dict[str, Any] = {}
        for name, command in commands.items():
            taken = []
            for repeat in range(4):
                seed = [f"seeds={repeat}"] if "sample" in command else []
                arguments = [sys.executable, *command, *seed]
                taken.append(
                    seconds("cpu", subprocess.run, arguments, check=True, capture_output=True, env=environment)
                )
            found[name] = spread(taken[1:])
    return found


def large(device: str, _: Any) -> dict[str, Any]:
    """Runs of the exact mixture through sampling and scoring: peak memory by number of images, files, images/s."""
    found: dict[str, Any] = {}
    for images in (5_000, 50_000):
        out = subprocess.run(
            [sys.executable, __file__, "--one-large-run", str(images), "--device", device],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found[f"{images} images"] = json.loads(out.stdout.splitlines()[-1])
    return found


def one_large_run(images: int, device: str) -> dict[str, Any]:
    with thrown_away():
        job = Job.compose(["model=mixture", "model.shape=[3,32,32]", f"nfe={NFE}", f"seeds=0-{images - 1}",
                           "protocol=none", "metrics=[contrast]", f"device={device}"])  # fmt: skip
        held = memory("VmRSS")
        forget_peak()
        taken = seconds(device, sample_run, job) + seconds(device, score_run, job)
        files = [path for path in job.run.folder.iterdir() if path.is_file()]
        return {
            "images/s": images / taken,
            "peak GB": memory("VmHWM"),
            "above the start GB": memory("VmHWM") - held,
            "files": len(files),
            "MB": sum(path.stat().st_size for path in files) / 1e6,
        }


PARTS: dict[str, Callable[[str, Path | None], dict[str, Any]]] = {
    "overhead": overhead,
    "pipeline": pipeline,
    "formats": formats,
    "batches": batches,
    "overlap": overlap,
    "threads": threads,
    "memory": memory_kept,
    "start": start,
    "large": large,
}


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# The pipeline: what it costs beside the network",
        "",
        "`make bench`. " + " ".join(__doc__.split("\n\n")[1].split()),
        "",
    ]
    if not any(device.startswith("cuda") for device in found):
        lines += [
            "**No figure of a GPU is recorded here yet.** Missing are: the time outside the network on a GPU; images "
            "per second beside the official-style loop there, in fp32 and in bf16; and what tf32, fp16, compilation "
            "and CUDA graphs bring. `python scripts/bench.py --device cuda --official PATH` takes them.",
            "",
        ]
    for device, parts in found.items():
        for part, content in parts.items():
            lines += [
                f"## {device}: {part}",
                "",
                " ".join((PARTS[part].__doc__ or "").split()),
                "",
                on(content["machine"]),
                "",
            ]
            lines += ["| | |", "|---|---|"]
            for name, value in content.items():
                if name != "machine":
                    lines.append(f"| {name} | {shown(value)} |")
            lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    match value:
        case {"median": median, "quartiles": [low, high], **rest}:
            more = "".join(f", {name} {shown(number)}" for name, number in rest.items())
            return f"{shown(median)} ({shown(low)} to {shown(high)}){more}"
        case dict():
            return "; ".join(f"{name}: {shown(inner)}" for name, inner in value.items() if inner is not None)
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        case _:
            return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--official", type=Path, help="a checkout of github.com/ShiguiLi/EVODiff, only read")
    parser.add_argument("--one-large-run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_large_run:
        print(json.dumps(one_large_run(args.one_large_run, args.device)))
        return
    if unknown := sorted(set(args.parts) - PARTS.keys()):
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    findings = Findings(results_folder() / "bench", "pipeline", markdown)
    kind = args.device.split(":")[0]
    for part in args.parts or PARTS:
        measured = {"machine": machine(args.device), **PARTS[part](args.device, args.official)}
        findings.add(kind, findings.found.get(kind, {}) | {part: measured})
        print(f"{part}: done", file=sys.stderr)
    path = measured_file()
    known = json.loads(path.read_text()) if path.exists() else {}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(known | throughput(findings.found), indent=1) + "\n")
    print(findings.md.read_text())


if __name__ == "__main__":
    main()
