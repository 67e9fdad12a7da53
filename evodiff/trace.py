"""`evodiff trace`: how uncertain the image still is along a solver's trajectory (EVODiff, arXiv 2509.26096, section 3).

At every evaluation of the network, at x_s on the way to the next node t:

- the conditional variance of the image, Var(x_0 | x_s) = kappa^2 dD/dy with y = x / alpha (Tweedie), averaged over
  pixels and samples; its diagonal from random signs v as v * (J^T v) (Hutchinson);
- the conditional entropy of the next state in the Gaussian approximation of the paper, per pixel,
  H(x_t | x_s) = mean 1/2 log 2 pi e Var(x_t | x_s), from
  Var(x_t | x_s) / alpha_t^2 = kappa_t^2 rho + rho^2 Var(x_0 | x_s), rho = 1 - kappa_t^2 / kappa_s^2, and its change
  since the evaluation before;
- for an exact mixture also both from the exact covariance of each sample, its determinant instead of its diagonal.

The entropy is taken of the variance averaged over samples, for that of one sample is too noisy; the exact one is an
average of the samples' own. So the first lies above the second (Jensen), besides what the diagonal adds.

At the last node there is no next state: a solver that evaluates there has no entropy there, nan.

The traces of several solvers beside each other show whether one lowers the uncertainty faster than another.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.files import whole_file
from evodiff.grid import TimeGrid
from evodiff.models.analytic import GaussianMixture
from evodiff.noise import SeededNoise
from evodiff.paths import results_folder
from evodiff.precision import products
from evodiff.sampling import integrate, start
from evodiff.schedule import Node
from evodiff.solvers.base import Solver


@dataclass(frozen=True)
class Evaluation:
    """At one evaluation of the network. `exact_*` are nan unless the denoiser is an exact mixture; `distance` is the
    root mean square distance of D from the image that the solver ends with."""

    evaluation: int
    kappa: float
    kappa_next: float
    variance: float
    entropy: float
    entropy_change: float
    exact_variance: float
    exact_entropy: float
    exact_entropy_change: float
    distance: float


class Probe:
    """A denoiser that keeps x, D and the diagonal of dD/dy, averaged over samples, of every call."""

    def __init__(self, denoiser: Denoiser, noise: SeededNoise, probes: int = 4):
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.noise, self.probes = noise, probes
        self.calls: list[tuple[Node, Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            D = self.denoiser(x, node)
            diagonal = torch.zeros_like(x[0])
            for k in range(self.probes):
                v = self.noise.normal(x).sign()
                (vJ,) = torch.autograd.grad((D * v).sum(), x, retain_graph=k < self.probes - 1)
                diagonal += node.alpha * (vJ * v).mean(0) / self.probes
        self.calls.append((node, x.detach(), D.detach(), diagonal))
        return D.detach()


def trace(
    denoiser: Denoiser, solver: Solver, grid: TimeGrid, x: Tensor, noise: SeededNoise, probes: int = 4
) -> list[Evaluation]:
    """The trace of `solver` from x [B, C, H, W] at the first node of `grid`.

    Raises ConfigError for one that asks at several times in one evaluation: a row has one.
    """
    probe = Probe(denoiser, SeededNoise([probe_seed(seed) for seed in noise.seeds]), probes)
    end = integrate(solver, probe, x, grid, noise)
    if len(probe.calls) != (nfe := solver.evaluations(len(grid))) and not solver.adaptive:
        raise ConfigError(
            f"trace: {type(solver).__name__} asks for each image at a time of its own, {len(probe.calls)} calls in "
            f"{nfe} evaluations, and a trace has one time in each; possible: one seed, like seeds=0, or another solver"
        )
    rows: list[Evaluation] = []
    for i, (s, x_s, D, diagonal) in enumerate(probe.calls):
        later = [node for node, *_ in probe.calls[i + 1 :] if node.kappa < s.kappa]
        t = later[0] if later else grid.nodes[-1]
        variance = s.kappa**2 * diagonal.double().clamp(min=0)
        entropy = gaussian_entropy(next_variance(variance, s, t)).mean().item()
        exact_variance = exact_entropy = math.nan
        if isinstance(denoiser, GaussianMixture):
            exact_variance, exact_entropy = exact(denoiser, x_s, s, t)
        if t.kappa >= s.kappa:
            entropy = exact_entropy = math.nan
        before = rows[-1] if rows else None
        rows.append(
            Evaluation(
                i + 1,
                s.kappa,
                t.kappa,
                variance.mean().item(),
                entropy,
                entropy - before.entropy if before else math.nan,
                exact_variance,
                exact_entropy,
                exact_entropy - before.exact_entropy if before else math.nan,
                (D - end).square().mean().sqrt().item(),
            )
        )
    return rows


def probe_seed(seed: int) -> int:
    """Of a stream apart from the sample's own, from which a stochastic solver draws."""
    probe_stream = 2
    return int(np.random.SeedSequence([seed, probe_stream]).generate_state(1)[0])


def next_variance(variance: Tensor, s: Node, t: Node) -> Tensor:
    """Var(x_t | x_s) from Var(x_0 | x_s), for the forward process's own bridge from x_0 and x_s to x_t."""
    rho = 1 - (t.kappa / s.kappa) ** 2
    return t.alpha**2 * (t.kappa**2 * rho + rho**2 * variance)


def gaussian_entropy(variance: Tensor) -> Tensor:
    """1/2 log 2 pi e v, in nats."""
    return 0.5 * (2 * math.pi * math.e * variance).log()


def exact(mixture: GaussianMixture, x: Tensor, s: Node, t: Node) -> tuple[float, float]:
    """Mean over pixels and samples of Var(x_0 | x_s), and H(x_t | x_s) per pixel, from the exact covariance.

    Given component k, x_0 has mean m_k and variance v_k; so Cov = sum_k w_k (v_k I + (m_k - D)(m_k - D)^T), whose
    determinant needs only a K x K matrix.
    """
    means, y = mixture.means.to(x).flatten(1), (x / s.alpha).flatten(1)
    stds, weights = mixture.stds.to(x), mixture.weights.to(x)
    total = stds**2 + s.kappa**2
    square = (y[:, None] - means).square().sum(2)
    w = torch.softmax(weights.log() - 0.5 * y.shape[1] * total.log() - 0.5 * square / total, dim=1)
    gain = stds**2 / total
    m = means + gain[:, None] * (y[:, None] - means)
    D = (w[:, :, None] * m).sum(1)
    A = w.sqrt()[:, :, None] * (m - D[:, None])  # Cov = v I + A^T A
    v = w @ (gain * s.kappa**2)
    pixels = y.shape[1]
    variance = (v + A.square().sum((1, 2)) / pixels).mean().item()

    rho = 1 - (t.kappa / s.kappa) ** 2
    isotropic = t.kappa**2 * rho + rho**2 * v
    inner = torch.eye(len(means)).to(x) + (rho**2 / isotropic)[:, None, None] * (A @ A.transpose(1, 2))
    log_det = isotropic.log() + torch.logdet(inner) / pixels
    return variance, (0.5 * (math.log(2 * math.pi * math.e * t.alpha**2) + log_det)).mean().item()


def write(folder: Path, traces: dict[str, list[Evaluation]]) -> None:
    """trace.json, trace.csv and trace.png in `folder`."""
    with whole_file(folder / "trace.json") as temporary:
        plain = {
            name: [{k: v if math.isfinite(v) else None for k, v in asdict(row).items()} for row in rows]
            for name, rows in traces.items()
        }
        temporary.write_text(json.dumps(plain, indent=1) + "\n")
    with whole_file(folder / "trace.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["solver", *(field.name for field in fields(Evaluation))])
        for name, rows in traces.items():
            writer.writerows([name, *asdict(row).values()] for row in rows)
    draw(folder / "trace.png", traces)


def draw(path: Path, traces: dict[str, list[Evaluation]]) -> None:
    """Conditional variance and entropy against kappa, one line per solver; dotted where they are exact."""
    from evodiff.plots import COLOURS, MARKERS, plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    panels = (
        ("variance", "conditional variance of the image"),
        ("entropy", "entropy of the next state, nats per pixel"),
        ("distance", "distance of D from the final image"),
    )
    for axis, (name, title) in zip(axes, panels, strict=True):
        for i, (solver, rows) in enumerate(traces.items()):
            kappas, colour = [row.kappa for row in rows], COLOURS[i % len(COLOURS)]
            values = [getattr(row, name) for row in rows]
            axis.plot(kappas, values, MARKERS[i % len(MARKERS)] + "-", color=colour, label=solver, ms=4, lw=1.4)
            if name != "distance" and rows[0].exact_variance == rows[0].exact_variance:
                axis.plot(kappas, [getattr(row, f"exact_{name}") for row in rows], ":", color=colour, lw=2)
        axis.set(xlabel="noise-to-signal ratio kappa", title=title, xscale="log")
        axis.invert_xaxis()
        axis.grid(True, alpha=0.25)
        if name == "variance":
            axis.set_yscale("log")
    axes[0].legend(fontsize=9, frameon=False)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """`evodiff trace model=mixture solver=evodiff,ddim [nfe=10] [seeds=0-63] [probes=4] [out=DIR]`."""
    from evodiff.config import compose, parse_range
    from evodiff.runs.run import Run
    from evodiff.settings import model_of, parse

    defaults = {"solver": "ddim,dpmpp_2m,evodiff", "seeds": "0-63", "probes": 4, "out": None}
    given, overrides = parse("trace", __doc__, argv, defaults)
    seeds = parse_range(given["seeds"])
    cfg, model, _ = model_of("trace", overrides, ("nfe", "grid", "solver"))
    traces = {}
    for name in given["solver"].split(","):
        run = Run.from_config(compose("run", [*overrides, f"solver={name}"]))
        solver, grid = run.plan(model)
        noise = SeededNoise(seeds)
        labels = noise.labels(model.num_classes).to(model.device) if model.num_classes else None
        x = start(noise, model.shape, grid.nodes[0], model.device)
        with products(run.precision):
            traces[name] = trace(model.denoiser(labels), solver, grid, x, noise, given["probes"])
    folder = Path(given["out"] or results_folder() / "traces" / f"{cfg.model.name}-nfe{cfg.nfe}")
    write(folder, traces)
    for name, rows in traces.items():
        print(name)
        print(table(rows))
    print(f"{folder}: trace.json, trace.csv, trace.png")
    return 0


def table(rows: Sequence[Evaluation]) -> str:
    """The rows as text, one line each."""
    exact = rows[0].exact_variance == rows[0].exact_variance
    columns = ["kappa", "variance", "entropy", "entropy_change", "distance"]
    columns += ["exact_variance", "exact_entropy", "exact_entropy_change"] if exact else []
    lines = ["  " + "".join(f"{column:>22}" for column in columns)]
    lines += ["  " + "".join(f"{getattr(row, column):>22.4g}" for column in columns) for row in rows]
    return "\n".join(lines)
