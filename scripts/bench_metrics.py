"""Time and memory of the metrics, beside pytorch-fid's and torch-fidelity's on the same inputs:
`python scripts/bench_metrics.py [--quick]` writes results/bench/metrics.json and .md.

Times are the best of several calls in one process. Memory peaks are those of a process of its own, less what it held
before the measured call.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evodiff.compat import import_torchvision
from evodiff.files import whole_file
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.inception_score import inception_score
from evodiff.metrics.kid import kid
from evodiff.metrics.moments import Moments
from evodiff.metrics.precision_recall import precision_recall
from evodiff.metrics.score import Rows
from evodiff.paths import RESULTS
from evodiff.verify.metrics import write_random_inception

DIM, CLASSES = 2048, 1008


def main(quick: bool) -> None:
    n = 5_000 if quick else 50_000
    found = {
        "machine": {
            "cpu": _cpu(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "frechet_distance": _frechet(),
        "extraction": _extraction(),
        "features": {"n": n, **{name: _apart(name, n) for name in JOBS}},
    }
    folder = RESULTS / "bench"
    with whole_file(folder / "metrics.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    with whole_file(folder / "metrics.md") as path:
        path.write_text(_markdown(found))
    print((folder / "metrics.md").read_text())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _best(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Wall and processor seconds of the fastest of several calls: whatever else the machine does only adds to them."""
    walls, processor = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    return {"seconds": min(walls), "cpu_seconds": min(processor)}


def _features(n: int, seed: int) -> Tensor:
    """Like Inception's: not negative, correlated, with eigenvalues over several orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -3, DIM)[:, None]
    out = torch.empty(n, DIM)
    for start in range(0, n, 4096):
        part = torch.randn(min(4096, n - start), DIM, generator=random)
        out[start : start + 4096] = (part @ mix / 10 + 0.3).relu_()
    return out


def _frechet() -> dict[str, Any]:
    import_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    fake, real = (Gaussian.of(Moments.of(_features(5000, seed))) for seed in (1, 2))
    arrays = [{"mu": g.mean.numpy(), "sigma": g.cov.numpy()} for g in (fake, real)]

    def ours_cold() -> float:
        return frechet_distance(fake, Gaussian(real.mean, real.cov, real.n))

    def pytorch_fid() -> float:
        return float(calculate_frechet_distance(*(a[k] for a in arrays for k in ("mu", "sigma"))))

    def torch_fidelity() -> float:
        return float(fid_statistics_to_metric(*arrays, verbose=False)["frechet_inception_distance"])

    frechet_distance(fake, real)
    rows = {
        "ours, reference factored before": (lambda: frechet_distance(fake, real), 5),
        "ours, nothing prepared": (ours_cold, 5),
        "torch-fidelity": (torch_fidelity, 2),
        "pytorch-fid": (pytorch_fid, 2),
    }
    return {name: {**_best(call, repeats), "value": call()} for name, (call, repeats) in rows.items()}


def _extraction(batch: int = 32) -> dict[str, dict[str, float]]:
    """Images per second through Inception, 32x32, without reading files."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from evodiff.metrics.features import extractor

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "inception.pth"
        write_random_inception(weights)
        ours = extractor("inception", "cpu", "tensorflow", "128", weights)
        theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights))
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        for call in (ours, theirs):
            call(images)
        calls = {"ours": lambda: ours(images), "torch-fidelity": lambda: theirs(images)}
        best = {name: _best(call, 5) for name, call in calls.items()}
    return {name: {"wall": batch / t["seconds"], "cpu": batch / t["cpu_seconds"]} for name, t in best.items()}


def _kid(n: int) -> Callable[[], Any]:
    fake, real = _features(n, 1), _features(n, 2)
    return lambda: kid(fake, real)


def _precision_recall(n: int) -> Callable[[], Any]:
    fake, real = _features(n, 1), _features(n, 2)
    return lambda: precision_recall(fake, real)


def _streaming(n: int) -> Callable[[], Any]:
    """FID and Inception Score of n images that arrive in batches of 100; moments, features and logits kept."""
    reference = Gaussian.of(Moments.of(_features(5000, 2)))
    batch, logits = _features(100, 1), torch.randn(100, CLASSES)

    def run() -> None:
        moments, features, answers = Moments.zeros(DIM), Rows(n), Rows(n)
        for _ in range(n // 100):
            moments.add(batch)
            features.add(batch)
            answers.add(logits)
        frechet_distance(moments, reference)
        inception_score(answers.tensor)

    return run


JOBS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "KID, 100 subsets of 1,000": _kid,
    "precision, recall, density, coverage": _precision_recall,
    "streaming FID + Inception Score": _streaming,
}


def _apart(name: str, n: int) -> dict[str, float]:
    """Seconds and peak memory of one job in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (name, n))


def _measure(name: str, n: int) -> dict[str, float]:
    call = JOBS[name](n)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held = _memory("VmRSS")
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM")
    return {"seconds": seconds, "peak_gb": peak, "above_inputs_gb": peak - held}


def _memory(field: str) -> float:
    """GB, from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9


def _markdown(found: dict[str, Any]) -> str:
    machine, distances, images = found["machine"], found["frechet_distance"], found["extraction"]
    base = distances["ours, nothing prepared"]
    lines = [
        "# Metrics: time and memory",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; `make bench-metrics`. The load, "
        f"this and other work, was {machine['load']:.1f}: where others compete, processor seconds tell more.",
        "",
        f"## Fréchet distance of {DIM} dimensions",
        "",
        "| | seconds | processor seconds | times ours, nothing prepared | value |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in distances.items():
        times = " / ".join(f"{row[k] / base[k]:.1f}" for k in ("seconds", "cpu_seconds"))
        lines.append(f"| {name} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {times} | {row['value']:.9g} |")
    lines += ["", "## Inception features, images a second", "", "| | wall | processor |", "|---|---:|---:|"]
    lines += [f"| {name} | {rate['wall']:.1f} | {rate['cpu']:.1f} |" for name, rate in images.items()]
    lines += [
        "",
        f"## {found['features']['n']:,} features of {DIM} dimensions",
        "",
        "| | seconds | peak memory of the process, GB | above its inputs, GB |",
        "|---|---:|---:|---:|",
    ]
    for name in JOBS:
        row = found["features"][name]
        lines.append(f"| {name} | {row['seconds']:.1f} | {row['peak_gb']:.2f} | {row['above_inputs_gb']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5,000 features instead of 50,000")
    main(parser.parse_args().quick)
