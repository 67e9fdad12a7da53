"""The figures of docs/method.md, and the numbers behind them: docs/figures/*.svg and method.json."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evodiff.api import named_grid, named_solver
from evodiff.config import build, compose
from evodiff.denoiser import Denoiser
from evodiff.files import whole_file
from evodiff.grid import Karras, LogSNR, Spacing, Step, TimeGrid, TimeUniform
from evodiff.models.analytic import GaussianMixture
from evodiff.models.pretrained import Pretrained
from evodiff.noise import SeededNoise
from evodiff.paths import ROOT
from evodiff.plots import COLOURS, MARKERS, plt
from evodiff.sampling import integrate
from evodiff.schedule import EDM, CosineVP, LinearVP, NoiseSchedule
from evodiff.solvers.evodiff import EVODiff, inverse_kappa_step, log_ratio
from evodiff.solvers.exponential import ddim
from evodiff.solvers.linear import combine
from evodiff.solvers.probability_flow import ProbabilityFlow
from evodiff.trace import trace

FIGURES = ROOT / "docs" / "figures"
SCHEDULES: dict[str, NoiseSchedule] = {"EDM": EDM(), "LinearVP": LinearVP(), "CosineVP": CosineVP()}
SPACINGS: dict[str, Spacing] = {"logsnr": LogSNR(), "karras": Karras(), "time_uniform": TimeUniform()}
TRACED = {
    "ddim": named_solver("ddim"),
    "dpmpp_2m": named_solver("dpmpp_2m"),
    "evodiff": named_solver("evodiff"),
    "evodiff, final=euler": named_solver("evodiff", final="euler"),
}

Numbers = dict[str, Any]


def grids(steps: int = 10) -> Numbers:
    """kappa at the nodes and h of the steps, on LinearVP, for each spacing; and kappa over t of each schedule."""
    over_t = {}
    for name, schedule in SCHEDULES.items():
        times = [schedule.t_end + (schedule.t_start - schedule.t_end) * i / 100 for i in range(101)]
        over_t[name] = {"t": [t / schedule.t_start for t in times], "kappa": [schedule.node(t).kappa for t in times]}
    spaced = {}
    for name, spacing in SPACINGS.items():
        vp = SCHEDULES["LinearVP"]
        grid = TimeGrid.at(spacing.times(steps, vp, vp.t_start, vp.t_end), vp)
        spaced[name] = {
            "kappa": [node.kappa for node in grid.nodes],
            "h": [inverse_kappa_step(step) for step in grid.steps()],
        }
    return {"over_t": over_t, "spaced": spaced}


def plane() -> GaussianMixture:
    """Three clusters in the plane, as images of two pixels."""
    means = torch.tensor([[-0.8, 0.3], [0.6, 0.5], [0.1, -0.7]], dtype=torch.float64).view(3, 1, 1, 2)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    return GaussianMixture(means, torch.full((3,), 0.2, dtype=torch.float64), third, EDM())


def flow(denoise: Denoiser, x: Tensor, times: list[float]) -> list[Tensor]:
    """The exact path from x at the first of `times` through the others, x included."""
    path = [x]
    for t, u in zip(times, times[1:], strict=False):
        grid = TimeGrid.at([t, u], denoise.schedule)
        path.append(integrate(ProbabilityFlow(rtol=1e-9, atol=1e-9), denoise, path[-1], grid))
    return path


def one_step(steps: int = 8, shown: int = 3, samples: int = 256) -> Numbers:
    """What one step of EVODiff does to some states in the plane: its start after correction, where DDIM, the probe and
    the correction arrive, and the exact solution from the same start. The first sample is drawn, all are measured."""
    denoise, solver = plane(), EVODiff()
    schedule = denoise.schedule
    grid = TimeGrid.at(LogSNR().times(steps, schedule, schedule.t_start, schedule.t_end), schedule)
    x = SeededNoise(range(samples)).latents((1, 1, 2)).double() * schedule.t_start
    seen: Any = ()
    rows = []
    for step in grid.steps():
        if step.left == 1:
            break
        if seen:
            m = denoise(x, step.s)
            start = x + corrected(solver, seen, m, step.previous)
            probe, after = solver.step(denoise, x, step, seen)
            end = probe + corrected(solver, after, denoise(probe, step.t), step)
            times = [step.s.t * (step.t.t / step.s.t) ** (k / 16) for k in range(17)] if step.i == shown else []
            path = flow(denoise, start, times or [step.s.t, step.t.t])
            arrivals = {"DDIM": ddim(start, m, step.s, step.t), "probe": probe, "corrected": end}
            mean = {name: (y - path[-1]).flatten(1).norm(dim=1).mean().item() for name, y in arrivals.items()}
            rows.append({"kappa": step.s.kappa, "kappa_next": step.t.kappa, "distance": mean})
            if step.i == shown:
                drawn = {name: y[0].flatten().tolist() for name, y in arrivals.items()}
                picture = {"path": [y[0].flatten().tolist() for y in path], **drawn}
        x, seen = solver.step(denoise, x, step, seen)
    return {"steps": rows, "picture": picture, "means": denoise.means.flatten(1).tolist()}


def corrected(solver: EVODiff, seen: Any, m: Tensor, step: Step) -> Tensor:
    """What the correction adds to the arrival of `step`, where the network gives m."""
    span = seen.span.to(m)
    weights = solver.correct(span, step, *seen.probe) if seen.probe else torch.zeros_like(span.gram[0])
    return combine(*zip(weights, span.images, strict=True))


class Weights(EVODiff):
    """EVODiff that keeps the mean eta and zeta of each correction, found from the weights that it puts on the images:
    unit / zeta (1 - eta) R on the newest change, and -(unit / zeta eta / R + gain) r1 on the one before."""

    kept: list[Numbers]

    def correct(self, span: Any, step: Step, r1: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override]
        w = super().correct(span, step, r1, gain)
        unit, R = 0.5 * step.t.sigma * inverse_kappa_step(step), log_ratio(step)
        newest, before = w[2] / R, -R * (w[1] / r1 + gain)
        eta, zeta = before / (newest + before), unit / (newest + before)
        second_order = (1 - 2 * eta) / zeta
        means = [step.t.kappa, *(value.mean().item() for value in (eta, zeta, second_order))]
        self.kept.append(dict(zip(("kappa", "eta", "zeta", "of_second_order"), means, strict=True)))
        return w


def weights(model: Pretrained, nfe: int, samples: int = 64, **fields: Any) -> list[Numbers]:
    solver = Weights(**fields)
    object.__setattr__(solver, "kept", [])
    start(model, solver, nfe, samples, integrate)
    return solver.kept


def start(model: Pretrained, solver: Any, nfe: int, samples: int, then: Callable[..., Any]) -> Any:
    """`then` of the model's denoiser, the solver, the state of pure noise and the grid of `nfe` evaluations."""
    denoise, noise = model.denoiser(None), SeededNoise(range(samples))
    schedule = denoise.schedule
    grid = TimeGrid.at(named_grid("logsnr").times(nfe, schedule, schedule.t_start, schedule.t_end), schedule)
    x = noise.latents(model.shape).double() * grid.nodes[0].sigma
    with torch.no_grad():
        return then(solver, denoise, x, grid)


def traces(model: Pretrained, nfe: int = 10, samples: int = 64) -> Numbers:
    found = {}
    for name, solver in TRACED.items():

        def traced(solver: Any, denoise: Denoiser, x: Tensor, grid: TimeGrid) -> Any:
            return trace(denoise, solver, grid, x, SeededNoise(range(len(x))))

        rows = start(model, solver, nfe, samples, traced)
        found[name] = [{key: value for key, value in asdict(row).items() if value == value} for row in rows]
    return found


def numbers() -> Numbers:
    """Everything the figures show, as plain data with five digits."""
    digits = build(compose("run", ["model=mixture_digits"]).model)
    mnist = build(compose("run", ["model=mnist_tiny"]).model)
    found = {
        "grids": grids(),
        "one_step": one_step(),
        "weights": {str(nfe): weights(mnist, nfe) for nfe in (10, 30)},
        "traces": {"mnist_tiny": traces(mnist), "mixture_digits": traces(digits)},
    }
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.5g}"))


def draw_grids(found: Numbers) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for i, (name, line) in enumerate(found["over_t"].items()):
        axes[0].plot(line["t"], line["kappa"], color=COLOURS[i], label=name)
    axes[0].set(xlabel="t / t_start", title="kappa = sigma / alpha of a schedule", yscale="log")
    for i, (name, line) in enumerate(found["spaced"].items()):
        style = {"color": COLOURS[i + 3], "marker": MARKERS[i], "ms": 4, "label": name}
        axes[1].plot(line["kappa"], **style)
        axes[2].plot(range(1, len(line["h"]) + 1), line["h"], **style)
    axes[1].set(xlabel="node", title="kappa at the nodes of 10 steps, LinearVP", yscale="log")
    axes[2].set(xlabel="step", title="h = 1/kappa_t - 1/kappa_s of each step", yscale="log")
    axes[1].legend(fontsize=9, frameon=False)
    return finished(figure, axes)


def draw_one_step(found: Numbers) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    picture = found["picture"]
    axes[0].plot(*zip(*picture["path"], strict=True), color="#555555", lw=1.5, label="exact path")
    axes[0].plot(*picture["path"][0], "k.", ms=10)
    axes[0].annotate("x at s", picture["path"][0], xytext=(-12, 8), textcoords="offset points", fontsize=9)
    axes[0].plot(*picture["path"][-1], "k*", ms=11, label="exact x at t")
    axes[0].set(title="one step in the plane")
    axes[0].set_aspect("equal", adjustable="datalim")
    for i, name in enumerate(("DDIM", "probe", "corrected")):
        axes[0].plot(*picture[name], MARKERS[i], color=COLOURS[i], ms=8, label=name)
        line = [row["distance"][name] for row in found["steps"]]
        kappas = [row["kappa_next"] for row in found["steps"]]
        axes[1].plot(kappas, line, MARKERS[i] + "-", color=COLOURS[i], ms=4, label=name)
    axes[1].set(xscale="log", yscale="log", xlabel="kappa at t", title="mean distance from the exact x at t")
    axes[1].invert_xaxis()
    return finished(figure, axes)


def draw_weights(found: Numbers) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    titles = {"eta": "eta", "zeta": "zeta", "of_second_order": "(1 - 2 eta) / zeta, 1 for second order"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for i, (nfe, rows) in enumerate(found.items()):
            kappas, values = [row["kappa"] for row in rows], [row[name] for row in rows]
            axis.plot(kappas, values, MARKERS[i] + "-", color=COLOURS[i], ms=4, label=f"NFE {nfe}")
        axis.set(xscale="log", xlabel="kappa at t", title=title)
        axis.invert_xaxis()
    axes[2].axhline(1, color="#555555", ls=":")
    return finished(figure, axes)


def draw_traces(found: Numbers) -> plt.Figure:
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6))
    panels = {
        "variance": "variance of the image given x, over DDIM's",
        "entropy": "entropy of the next state less DDIM's, nats",
        "distance": "distance of D from the final image",
    }
    for line, (model, solvers) in zip(axes, found.items(), strict=True):
        for axis, (name, title) in zip(line, panels.items(), strict=True):
            for i, (solver, rows) in enumerate(solvers.items()):
                kappas = [row["kappa"] for row in rows]
                style = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 4, "label": solver}
                axis.plot(kappas, beside_ddim(name, rows, solvers["ddim"]), **style)
                if f"exact_{name}" in rows[0]:
                    exact = beside_ddim(f"exact_{name}", rows, solvers["ddim"])
                    axis.plot(kappas, exact, ":", color=COLOURS[i], lw=2)
            axis.set(xscale="log", xlabel="kappa", title=f"{model}: {title}")
            axis.title.set_size(9)
            axis.invert_xaxis()
    return finished(figure, axes.flatten())


def beside_ddim(name: str, rows: list[Numbers], ddim: list[Numbers]) -> list[float]:
    """A column of the trace: variance over that of DDIM, entropy less that of DDIM, distance as it is."""
    pairs = [(row[name], other[name]) for row, other in zip(rows, ddim, strict=True)]
    if name.endswith("variance"):
        return [ours / theirs for ours, theirs in pairs]
    return [ours - theirs if name.endswith("entropy") else ours for ours, theirs in pairs]


def finished(figure: plt.Figure, axes: Any) -> plt.Figure:
    for axis in axes:
        axis.grid(True, alpha=0.25)
    axes[0].legend(fontsize=9, frameon=False)
    figure.tight_layout()
    return figure


def main(folder: Path = FIGURES) -> int:
    found = numbers()
    with whole_file(folder / "method.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    plt.rcParams["svg.hashsalt"] = "evodiff"  # the same numbers give the same file
    drawn = {"grids": draw_grids, "one_step": draw_one_step, "weights": draw_weights, "traces": draw_traces}
    for name, draw in drawn.items():
        figure = draw(found[name])
        with whole_file(folder / f"{name}.svg") as temporary:
            figure.savefig(temporary, metadata={"Date": None})
        plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
