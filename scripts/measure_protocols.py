"""What the rules of a protocol do to the number: measured on real and generated digits, written to
results/bench/protocols.json and into docs/protocols.md. `python scripts/measure_protocols.py`: minutes on one core.
"""

import json
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evodiff.data import mnist_digits
from evodiff.files import whole_file
from evodiff.grid import LogSNR, grid_for
from evodiff.metrics.features import extractor
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import protocol
from evodiff.metrics.resize import KERNELS, resize
from evodiff.metrics.score import reference_of
from evodiff.metrics.uncertainty import frechet_infinity, influence, standard_error
from evodiff.models.mnist import mnist_tiny
from evodiff.paths import ROOT, results_folder
from evodiff.sampling import generate, to_uint8
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.verify.metrics import relative, write_random_inception

N, NFE = 5000, 12
SIZES = (100, 200, 500, 1000, 2000, 5000)
DOCS = ROOT / "docs" / "protocols.md"
START, END = "<!-- measured by scripts/measure_protocols.py -->", "<!-- end of measured -->"


def main() -> None:
    real, _ = mnist_digits()
    states = sampled()
    found = {
        "protocol": protocol("mnist").describe(),
        "samples": {
            "model": dict(mnist_tiny().files),
            "solver": "DPM-Solver++ (2M)",
            "nfe": NFE,
            "seeds": [0, N - 1],
        },
        "noise_floor": reference_of(protocol("mnist")).provenance["noise_floor"],
        "rounding": rounding(states),
        "resize": resizing(real),
        "resize_inception": resizing_inception(real),
        "jpeg": jpeg(real),
        "batch": batch_size(states),
        "arithmetic": arithmetic(states),
        "n": number_of_images(states),
    }
    with whole_file(results_folder() / "bench" / "protocols.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    text = DOCS.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    with whole_file(DOCS) as path:
        path.write_text(f"{before}{START}\n{markdown(found)}{END}{after}")


def sampled() -> Tensor:
    """States [N, 1, 32, 32] in [-1, 1] and beyond, not rounded."""
    model = mnist_tiny()
    denoiser, solver = model.denoiser(None), DPMSolverPP(order=2)
    grid = grid_for(NFE, solver, LogSNR(), denoiser.schedule)
    parts = [generate(denoiser, solver, grid, range(i, i + 250), model.shape).x for i in range(0, N, 250)]
    return torch.cat(parts)


def features(images: Tensor, batch: int = 250) -> Tensor:
    extract = extractor("mnist_classifier")
    return torch.cat([extract(part).features for part in images.split(batch)])


def fd(images: Tensor, reference: Gaussian | Moments | None = None) -> float:
    return frechet_distance(Moments.of(features(images)), reference or reference_of(protocol("mnist")).gaussian)


def rounding(states: Tensor) -> dict[str, Any]:
    """The same states under both rules, in all and in parts of 1,000, whose differences give the error of theirs."""
    rules = {rule: to_uint8(states, rule) for rule in ("round", "truncate")}
    parts = [[fd(part) for part in images.split(1000)] for images in rules.values()]
    differences = np.subtract(parts[1], parts[0])
    return {
        **{rule: fd(images) for rule, images in rules.items()},
        "grey_levels": (rules["truncate"].double() - rules["round"].double()).mean().item(),
        "difference_at_1000": float(differences.mean()),
        "difference_at_1000_se": float(differences.std(ddof=1) / len(differences) ** 0.5),
        "between_the_two": fd(rules["truncate"], Moments.of(features(rules["round"]))),
    }


def resizing(real: Tensor) -> dict[str, dict[str, float]]:
    """Real digits enlarged to 64x64 and brought back to 32x32 by each kernel: distance between kernels."""
    large = to_grey(F.interpolate(real.double(), size=64, mode="bicubic", antialias=True))
    small = {kernel: Moments.of(features(to_grey(resize(large, 32, kernel).double()))) for kernel in KERNELS}
    return {a: {b: frechet_distance(small[a], small[b]) for b in KERNELS} for a in KERNELS}


def to_grey(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def resizing_inception(real: Tensor, n: int = 48) -> dict[str, Any]:
    """Relative L2 change of Inception's features against EDM's way in, with random weights: an order of magnitude."""
    images = real[:: N // n][:n].repeat(1, 3, 1, 1)
    ways = [("tensorflow", "128"), ("tensorflow", "127.5"), ("torch", "127.5"), ("clean", "128")]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "inception.pth"
        write_random_inception(weights)
        found = [
            torch.cat([extractor("inception", "cpu", *way, weights)(part).features for part in images.split(16)])
            for way in ways
        ]
    return {"weights": "random", **{f"{k}, {s}": relative(x, found[0]) for (k, s), x in zip(ways, found, strict=True)}}


def jpeg(real: Tensor) -> dict[str, float]:
    """Real digits against themselves after JPEG."""

    def through(quality: int) -> Tensor:
        out = []
        for image in real[:, 0].numpy():
            file = BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            out.append(np.array(Image.open(file)))
        return torch.from_numpy(np.stack(out))[:, None]

    return {str(quality): fd(through(quality)) for quality in (95, 75)}


def batch_size(states: Tensor) -> dict[str, float]:
    """Change of the distance against batches of 250."""
    images = to_uint8(states)
    reference = reference_of(protocol("mnist")).gaussian
    base = fd(images)
    return {
        str(size): frechet_distance(Moments.of(features(images, size)), reference) - base for size in (1, 16, 64, 1000)
    }


def arithmetic(states: Tensor) -> dict[str, float]:
    """Change of the distance by what other code does with the same features."""
    reference, x = reference_of(protocol("mnist")).gaussian, features(to_uint8(states))
    moments = Moments.of(x)
    base = frechet_distance(moments, reference)
    mean = x.sum(0) / len(x)
    single = (x.T @ x - len(x) * torch.outer(mean, mean)) / (len(x) - 1)
    variants = {
        "covariance over n, not n - 1": Gaussian(moments.mean, moments.cov * (N - 1) / N),
        "sums in float32": Gaussian(mean.double(), single.double()),
    }
    return {name: frechet_distance(variant, reference) - base for name, variant in variants.items()}


def number_of_images(states: Tensor) -> dict[str, Any]:
    reference, x = reference_of(protocol("mnist")).gaussian, features(to_uint8(states))
    rows = {}
    for n in SIZES:
        part = Moments.of(x[:n])
        se = standard_error(influence(x[:n], reference))
        rows[str(n)] = {"fd": frechet_distance(part, reference), "se": se}
    return {**rows, "infinity": frechet_infinity(x, reference)}


def markdown(found: dict[str, Any]) -> str:
    r, n, kernels = found["rounding"], found["n"], found["resize"]
    samples = f"{N:,} samples of mnist_tiny ({found['samples']['solver']}, {NFE} NFE)"
    floor = found["noise_floor"]
    lines = [
        "",
        f"All distances are `fd_mnist` (protocol hash {found['protocol']['hash']}). Two random halves of the real",
        f"digits are {floor['distance']:.2f} apart ({floor['n']:,} against {floor['n']:,}): that is the scale.",
        "",
        f"**Rounding against truncation**, {samples}:",
        "",
        "| rule | fd_mnist@5000 |",
        "|---|---:|",
        f"| `round` (EDM) | {r['round']:.3f} |",
        f"| `truncate` (score_sde, ADM, EVODiff scripts) | {r['truncate']:.3f} |",
        "",
        f"Truncated images are {-r['grey_levels']:.2f} grey levels darker on average (pixels that saturate at 0 or 255",
        "do not change). Over five disjoint sets of 1,000 the difference truncate - round is",
        f"{r['difference_at_1000']:+.3f} ± {r['difference_at_1000_se']:.3f}; the two sets are",
        f"{r['between_the_two']:.4f} apart.",
        "",
        "**Resize kernel**: the real digits, enlarged to 64x64 and brought back to 32x32 by each kernel; distance",
        "between the results, which differ in nothing else:",
        "",
        "| | " + " | ".join(KERNELS) + " |",
        "|---|" + "---:|" * len(KERNELS),
        *(f"| {a} | " + " | ".join(f"{kernels[a][b]:.3f}" for b in KERNELS) + " |" for a in KERNELS),
        "",
        "At the door of Inception (random weights, 32 to 299; relative L2 change of the features):",
        "",
        "| resize, scaling | change |",
        "|---|---:|",
        *(f"| {way} | {v:.1e} |" for way, v in found["resize_inception"].items() if way != "weights"),
        "",
        "**JPEG**, real digits against themselves: "
        + ", ".join(f"{v:.3f} at quality {q}" for q, v in found["jpeg"].items())
        + ".",
        "",
        "**Batch size**, change of the distance against batches of 250:",
        "" + ", ".join(f"{v:.0e} at {b}" for b, v in found["batch"].items()) + ".",
        "",
        "**Arithmetic on the same features**: "
        + "; ".join(f"{name} {v:+.1e}" for name, v in found["arithmetic"].items())
        + ".",
        "",
        f"**N**, {samples}, first N of them; ± is the standard error:",
        "",
        "| N | fd_mnist@N |",
        "|---:|---:|",
        *(f"| {size:,} | {n[str(size)]['fd']:.2f} ± {n[str(size)]['se']:.2f} |" for size in SIZES),
        f"| infinity (extrapolated) | {n['infinity']:.2f} |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
