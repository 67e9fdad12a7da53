"""Time and memory of the metrics, beside pytorch-fid's and torch-fidelity's on the same inputs:
`python scripts/bench_metrics.py` writes results/bench/metrics.json and .md.

Times are the best of several calls in one process. Memory peaks are those of a process of its own, less what it held
before the measured call.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import Findings, forget_peak, machine, memory, on
from torch import Tensor

from evodiff.compat import import_torchvision
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.inception_score import inception_score
from evodiff.metrics.kid import kid
from evodiff.metrics.moments import Moments
from evodiff.metrics.precision_recall import precision_recall
from evodiff.metrics.score import Rows
from evodiff.paths import results_folder
from evodiff.verify.metrics import write_random_inception

DIM, CLASSES = 2048, 1008


def main(parts: list[str], n: int) -> None:
    """Measure the named parts, each into the record as soon as it is there; the others stay as they were recorded."""
    findings = Findings(results_folder() / "bench", "metrics", _markdown)
    for part in parts:
        name, measure = PARTS[part]
        findings.add(name, {"machine": machine("cpu"), **measure(n)})
    print(findings.md.read_text())


def _best(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Wall and processor seconds of the fastest of several calls: whatever else the machine does only adds to them."""
    walls, processor = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        value = call()
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    found = {"seconds": min(walls), "cpu_seconds": min(processor)}
    return {**found, "value": value} if isinstance(value, float) else found


def _features(n: int, seed: int) -> Tensor:
    """Like Inception's: not negative, correlated, with eigenvalues over several orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -3, DIM)[:, None]
    out = torch.empty(n, DIM)
    for start in range(0, n, 4096):
        part = torch.randn(min(4096, n - start), DIM, generator=random)
        out[start : start + 4096] = (part @ mix / 10 + 0.3).relu_()
    return out


def _frechet(n: int) -> dict[str, Any]:
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
        "ours, reference factored before": (lambda: frechet_distance(fake, real), 10),
        "ours, nothing prepared": (ours_cold, 10),
        "torch-fidelity": (torch_fidelity, 4),
        "pytorch-fid": (pytorch_fid, 4),
    }
    return {name: _best(call, repeats) for name, (call, repeats) in rows.items()}


def _extraction(n: int, batch: int = 32) -> dict[str, Any]:
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


def _jobs(n: int) -> dict[str, Any]:
    """Seconds and peak memory of each job, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"n": n}
    for name in JOBS:
        with context.Pool(1) as pool:
            found[name] = pool.apply(_measure, (name, n))
    return found


def _measure(name: str, n: int) -> dict[str, float]:
    call = JOBS[name](n)
    forget_peak()
    held = memory("VmRSS")
    found = _best(call, 1)
    peak = memory("VmHWM")
    return {**found, "peak_gb": peak, "above_inputs_gb": peak - held}


PARTS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "frechet": ("frechet_distance", _frechet),
    "extraction": ("extraction", _extraction),
    "features": ("features", _jobs),
}


def _markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Metrics: time and memory",
        "",
        "`make bench-metrics`. Where other work competes (load above the number of",
    ]
    lines += ["threads), processor seconds tell more than wall seconds.", ""]
    if rows := dict(found.get("frechet_distance", {})):
        lines += [f"## Fréchet distance of {DIM} dimensions", "", on(rows.pop("machine")), ""]
        lines += ["| | seconds | processor seconds | times ours (processor) | value |", "|---|---:|---:|---:|---:|"]
        base = rows["ours, reference factored before"]
        for name, row in rows.items():
            times = " / ".join(f"{row[k] / base[k]:.1f}" for k in ("seconds", "cpu_seconds"))
            lines.append(f"| {name} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {times} | {row['value']:.9g} |")
        lines.append("")
    if rows := dict(found.get("extraction", {})):
        lines += ["## Inception features of 32x32 images, images a second", "", on(rows.pop("machine")), ""]
        lines += ["| | by the clock | per processor second |", "|---|---:|---:|"]
        lines += [f"| {name} | {rate['wall']:.1f} | {rate['cpu']:.1f} |" for name, rate in rows.items()]
        lines.append("")
    if rows := dict(found.get("features", {})):
        lines += [f"## {rows['n']:,} features of {DIM} dimensions", "", on(rows["machine"]), ""]
        lines += ["| | seconds | processor seconds | peak of the process, GB | above its inputs, GB |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for name in JOBS:
            row = rows[name]
            memory = f"{row['peak_gb']:.2f} | {row['above_inputs_gb']:.2f}"
            lines.append(f"| {name} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {memory} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("-n", type=int, default=50_000, help="features in the part `features`")
    args = parser.parse_args()
    main(args.parts or list(PARTS), args.n)
