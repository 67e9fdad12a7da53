"""How fast a network computes: number formats, batch sizes, threads. Parts of `python scripts/bench.py`."""

import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from bench_models import edm_cifar10, tiny
from benchmark import seconds, spread
from torch import Tensor

from evodiff.cpu import SETTINGS, keep_freed_memory
from evodiff.device import finished
from evodiff.metrics.features import extractor
from evodiff.metrics.frechet import frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.models.pretrained import Pretrained
from evodiff.precision import PRECISIONS, prepared
from evodiff.runs.batch_size import automatic, synchronised_clock
from evodiff.runs.job import Job
from evodiff.sampling import generate

NFE = 10
BUSIEST = {"mnist_tiny": "mnist_tiny", "EDM CIFAR-10 size": "cifar10_edm"}
"""Cases of `batches`, and the models of which `evodiff status` takes their best rate."""


def formats(device: str, _: Any) -> dict[str, Any]:
    """Number formats, memory layout and compilation: images per second, memory, and what they do to the images."""
    gpu = device.startswith("cuda")
    images, batch = (10_000, 1000) if gpu else (500, 250)
    found: dict[str, Any] = {"images": images, "batch": batch, "nfe": NFE}
    exact: tuple[Tensor, Moments] | None = None
    ways = [(last, compiled, False) for compiled in (False, True) for last in (False, True)]
    ways += [(last, True, True) for last in (False, True)] if gpu else []
    for precision in PRECISIONS if gpu else ("fp32", "bf16"):
        for way in ways:
            model = prepared(tiny(device), precision, *way)
            rate, x, moments = made_with(model, images, batch, device)
            exact = exact or (x, moments)
            named = zip((", channels last", ", compiled", ", CUDA graphs"), way, strict=True)
            name = precision + "".join(text for text, used in named if used)
            found[name] = {
                "images/s": rate,
                "change of the images": ((x - exact[0]).norm() / exact[0].norm()).item(),
                "Fréchet distance to fp32": frechet_distance(moments, exact[1]),
                "peak GB": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
            }
            torch.compiler.reset()
    return found


def made_with(model: Pretrained, images: int, batch: int, device: str) -> tuple[float, Tensor, Moments]:
    """Images per second in the fastest batch, the states, and the moments of their features."""
    ready, grid = Job.compose([f"nfe={NFE}"]).run.plan(model)
    extract = extractor("mnist_classifier", device)
    moments, states, best = Moments.zeros(extract.dim), [], float("inf")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    for first in range(0, images, batch):
        finished(device)
        started = time.perf_counter()
        made = generate(model.denoiser(None), ready, grid, range(first, first + batch), model.shape, device=device)
        finished(device)
        best = min(best, time.perf_counter() - started)
        states.append(made.x.cpu())
        moments.add(extract(made.images).features)
    return batch / best, torch.cat(states), moments


def evaluate(model: Pretrained, device: str, n: int) -> None:
    """One evaluation of n images."""
    denoise = model.denoiser(None)
    with torch.no_grad():
        denoise(torch.zeros(n, *model.shape, device=device), denoise.schedule.node(1.0))


def batches(device: str, _: Any) -> dict[str, Any]:
    """Network evaluations per second by batch size, and the size that batch=auto finds."""
    found: dict[str, Any] = {}
    cases = {"mnist_tiny": (tiny, 512), "EDM CIFAR-10 size": (edm_cifar10, 1024 if device.startswith("cuda") else 16)}
    for name, (make, most) in cases.items():
        call = partial(evaluate, prepared(make(device)), device)
        sizes = [1 << i for i in range(most.bit_length())]
        found[name] = {str(n): n / min([seconds(device, call, n) for _ in range(6)][1:]) for n in sizes}
        found[name]["auto"] = automatic(call, most, device, synchronised_clock(device))
    return found


def memory_kept(_: str, __: Any) -> dict[str, Any]:
    """Network evaluations per second on the CPU with glibc's own handling of freed memory, and with the memory kept as
    runs do (evodiff/cpu.py), in turns, each in a process of its own."""
    found = {}
    for name, batch in (("mnist_tiny", 250), ("EDM CIFAR-10 size", 4)):
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(5):
            for keep, values in rates.items():
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    values.append(process.submit(rate, name, batch, keep).result())
        own, ours = spread(rates[False]), spread(rates[True])
        found[name] = {"batch": batch, "given back": own, "kept": ours | {"times": ours["median"] / own["median"]}}
    return found


def rate(name: str, batch: int, keep: bool) -> float:
    """Evaluations per second of this process."""
    if keep and not keep_freed_memory():
        raise SystemExit(
            f"this C library is not glibc, or the environment says what to do: unset {', '.join(SETTINGS)}"
        )
    model = prepared((tiny if name == "mnist_tiny" else edm_cifar10)())
    evaluate(model, "cpu", batch)
    return batch / min(seconds("cpu", evaluate, model, "cpu", batch) for _ in range(10))


def throughput(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What results/bench/throughput.json holds: by machine and model, evaluations per second in the best batch."""
    best: dict[str, dict[str, float]] = {}
    for kind, parts in found.items():
        if measured := parts.get("batches"):
            where = measured["machine"]
            name = where["device"] + (f", {where['threads']} threads" if kind == "cpu" else "")
            best[name] = {
                model: max(rate for size, rate in measured[case].items() if size != "auto")
                for case, model in BUSIEST.items()
            }
    return best


def threads(_: str, __: Any) -> dict[str, Any]:
    """Network evaluations per second on the CPU by number of threads."""
    allowed, found = torch.get_num_threads(), {}
    counts = [n for n in range(1, allowed + 1) if n == allowed or n & (n - 1) == 0]
    for name, make, batch in (("mnist_tiny", tiny, 250), ("EDM CIFAR-10 size", edm_cifar10, 4)):
        model = prepared(make())
        rates: dict[int, list[float]] = {n: [] for n in counts}
        for _ in range(5):
            for n in counts:
                torch.set_num_threads(n)
                rates[n].append(batch / seconds("cpu", evaluate, model, "cpu", batch))
        found[name] = {"batch": batch} | {f"{n} threads": spread(values[1:]) for n, values in rates.items()}
    torch.set_num_threads(allowed)
    return found
