"""Empirical model statistics for DPM-Solver-v3 (arXiv 2310.13268, section 3.1 and appendix C): their files, and
`evodiff stats ems`, which computes them for any model.

A folder holds l.npz with `l` and sb.npz with `s` and `b`, [M + 1, C, H, W], as the released ones do; ours also name the
half-log-SNRs, `lambdas` [M + 1], in l.npz.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from evodiff.checkpoints.integrity import read_json
from evodiff.denoiser import Denoiser
from evodiff.errors import ConfigError
from evodiff.files import whole_file
from evodiff.grid import LogSNR, TimeGrid
from evodiff.models.pretrained import Pretrained
from evodiff.noise import SeededNoise
from evodiff.paths import CHECKPOINTS, resolve
from evodiff.precision import products
from evodiff.progress import progress
from evodiff.sampling import integrate, start
from evodiff.schedule import Node
from evodiff.solvers.dpm_solver_v3 import Statistics
from evodiff.solvers.dpmpp import DPMSolverPP

PRODUCTS = ("y", "D", "dD", "yy", "yD", "DD", "ydD", "DdD", "J")
"""What is averaged at each node and pixel: y = x / alpha, D, its derivative dD along the trajectory, and dD/dy."""


def load(folder: str, lambdas: Sequence[float] | None = None) -> Statistics:
    """Statistics from a folder (l.npz, sb.npz); relative paths may start at the project's root.

    The released files do not say which half-log-SNRs they belong to: give the first and the last as `lambdas`, for EDM
    from 80 to 0.002 [-4.382, 6.2146]. The last ones are kept, until their files change. Raises ConfigError.
    """
    path = resolve(folder)
    files = path / "l.npz", path / "sb.npz"
    written = tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)
    return _load(folder, path, None if lambdas is None else tuple(lambdas), written)


@lru_cache(maxsize=1)  # they can be gigabytes: the cells of a table share one
def _load(folder: str, path: Path, lambdas: tuple[float, ...] | None, written: tuple[int, ...]) -> Statistics:
    try:
        with np.load(path / "l.npz") as l_file, np.load(path / "sb.npz") as sb_file:
            arrays = [torch.from_numpy(a).double() for a in (l_file["l"], sb_file["s"], sb_file["b"])]
            own = torch.from_numpy(l_file["lambdas"]).double().flatten() if "lambdas" in l_file else None
    except Exception as e:  # what a damaged or foreign file makes numpy, zipfile and zlib raise has no end
        raise ConfigError(
            f"statistics.folder={folder}: {e}. Expected l.npz with l, and sb.npz with s and b; "
            f"`evodiff stats ems model=... out={folder}` computes them."
        ) from e
    if own is not None:
        nodes = own
        given = lambdas if len(own) else None
        if given is not None and (len(given) != 2 or not np.allclose(own[[0, -1]], given, rtol=0, atol=1e-3)):
            raise ConfigError(
                f"statistics.lambdas={list(given)}, but {path / 'l.npz'} says {own[0]:.4g} to {own[-1]:.4g}; "
                f"leave statistics.lambdas at null"
            )
    elif lambdas is None or len(lambdas) != 2 or not lambdas[0] < lambdas[1]:
        raise ConfigError(
            f"{path / 'l.npz'} does not say which half-log-SNRs it belongs to: set statistics.lambdas to the first and "
            f"the last, rising, for example [-4.382, 6.2146] for EDM from 80 to 0.002 (not {lambdas and list(lambdas)})"
        )
    else:
        nodes = torch.linspace(float(lambdas[0]), float(lambdas[1]), len(arrays[0]), dtype=torch.float64)
    try:
        return Statistics(nodes, *arrays)
    except ConfigError as e:
        raise ConfigError(f"statistics.folder={folder}: {e}") from e


def save(folder: Path, statistics: Statistics) -> None:
    """Write l.npz and sb.npz, float32."""
    arrays = {name: getattr(statistics, name).numpy().astype(np.float32) for name in ("l", "s", "b")}
    with whole_file(folder / "sb.npz") as temporary:
        np.savez_compressed(temporary, s=arrays["s"], b=arrays["b"])
    with whole_file(folder / "l.npz") as temporary:
        np.savez_compressed(temporary, l=arrays["l"], lambdas=statistics.lambdas.numpy())


class Observer:
    """A denoiser that sums PRODUCTS over the samples it sees at each node of `grid`, in float64.

    The diagonal of dD/dy is estimated by v * (J^T v) with random signs v (Hutchinson), one backward pass each.
    """

    def __init__(self, denoiser: Denoiser, grid: TimeGrid, shape: Sequence[int], noise: SeededNoise):
        self.denoiser, self.grid, self.noise = denoiser, grid, noise
        self.schedule = denoiser.schedule
        self.sums = torch.zeros(len(PRODUCTS), len(grid.nodes), *shape, dtype=torch.float64)
        self.seen: list[tuple[float, Tensor, Tensor]] = []
        self.node = 0

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        v = self.noise.normal(x).sign()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            D = self.denoiser(x, node)
            (vJ,) = torch.autograd.grad((D * v).sum(), x)
        D = D.detach()
        self.sums[PRODUCTS.index("J"), self.node] += (node.alpha * vJ * v).double().sum(0).cpu()
        self.seen = [*self.seen, (node.lam, (x.detach() / node.alpha).double(), D.double())][-3:]
        self.node += 1
        if self.node == 2:
            self.add(0, 0)
        if self.node > 2:
            self.add(self.node - 2, 1)
        if self.node == len(self.grid.nodes):
            self.add(self.node - 1, -1)
        return D

    def add(self, node: int, at: int) -> None:
        """Sum the products of entry `at` of what was seen last: central differences inside, one-sided at the ends."""
        (lam_a, _, D_a), (lam_b, _, D_b) = {
            0: (self.seen[0], self.seen[1]),
            1: (self.seen[0], self.seen[-1]),
            -1: (self.seen[-2], self.seen[-1]),
        }[at]
        _, y, D = self.seen[at]
        dD = (D_b - D_a) / (lam_b - lam_a)
        for i, product in enumerate((y, D, dD, y * y, y * D, D * D, y * dD, D * dD)):
            self.sums[i, node] += product.sum(0).cpu()


def statistics_from(sums: Tensor, count: int, lambdas: Tensor) -> Statistics:
    """l, s, b from the sums over `count` samples (equations 8 and 11 of the paper).

    l = E diag(sigma deps/dx); then f' = s f + b is the least-squares line of f' on f, f = (1 - l) y - D and
    f' = -l' y - (1 - l) (y - D) - D' along the trajectory y' = -(y - D). A pixel whose f never changes has s = 0.
    """
    y, D, dD, yy, yD, DD, ydD, DdD, J = sums / count
    l = 1 - J  # noqa: E741
    (dl,) = torch.gradient(l, spacing=(lambdas,), dim=0)
    a = 1 - l
    c = -(dl + a)  # f' = c y + a D - dD
    f, df = a * y - D, c * y + a * D - dD
    variance = a * a * yy - 2 * a * yD + DD - f * f
    covariance = a * (c * yy + a * yD - ydD) - (c * yD + a * DD - DdD) - f * df
    s = torch.where(variance > 1e-10, covariance / variance.clamp(min=1e-10), 0.0)
    return Statistics(lambdas, l, s, df - s * f)


def compute(
    model: Pretrained, grid: TimeGrid, samples: int, batch: int, partial: Path, identity: dict[str, Any]
) -> Statistics:
    """Statistics of `samples` trajectories (seeds 0, 1, ...) of 2nd-order DPM-Solver++ on `grid`.

    After each batch the sums so far are written to `partial`; a second call with the same `identity` goes on from
    there. Raises ConfigError if `partial` is of another computation.
    """
    lambdas = torch.tensor([node.lam for node in grid.nodes], dtype=torch.float64)
    sums = torch.zeros(len(PRODUCTS), len(grid.nodes), *model.shape, dtype=torch.float64)
    done, wanted = 0, json.dumps(identity, sort_keys=True)
    if partial.exists():
        try:
            with np.load(partial) as file:
                before, sums, done = str(file["identity"]), torch.from_numpy(file["sums"]), int(file["done"])
        except Exception as e:  # what numpy and zipfile raise of a damaged file has no end
            raise ConfigError(f"{partial} cannot be read ({e}). Remove it to begin anew.") from e
        if before != wanted:
            raise ConfigError(f"{partial} is of another computation: {before}. Remove it, or set another out.")
    with progress("stats ems", samples - done, "samples") as advance:
        while done < samples:
            seeds = range(done, min(done + batch, samples))
            noise = SeededNoise(seeds)
            labels = noise.labels(model.num_classes).to(model.device) if model.num_classes else None
            observer = Observer(model.denoiser(labels), grid, model.shape, noise)
            x = start(noise, model.shape, grid.nodes[0], model.device)
            integrate(DPMSolverPP(order=2, lower_order_final=False), observer, x, grid, denoise_final=True)
            sums, done = sums + observer.sums, seeds.stop
            with whole_file(partial) as temporary:
                np.savez(temporary, sums=sums.numpy(), done=done, identity=wanted)
            advance(len(seeds))
    return statistics_from(sums, samples, lambdas)


def main(argv: list[str]) -> int:
    """`evodiff stats ems model=NAME [nodes=120] [samples=1024] [batch=64] [out=DIR] [model.KEY=...]`."""
    from evodiff.config import essential
    from evodiff.settings import model_of, parse

    defaults = {"nodes": 120, "samples": 1024, "batch": 64, "out": None}
    given, overrides = parse("stats ems", __doc__, argv, defaults)
    if given["nodes"] < 2:
        raise ConfigError(f"nodes={given['nodes']} is impossible: differences along a trajectory need at least 2")
    cfg, model, ends = model_of("stats ems", overrides)
    schedule = model.schedule
    grid = TimeGrid.at(LogSNR().times(given["nodes"], schedule, *ends), schedule)
    identity = {
        "model": essential(OmegaConf.to_container(cfg.model)),
        "files": dict(model.files),
        "nodes": given["nodes"],
        "samples": given["samples"],
        "t": list(ends),
        **({"precision": cfg.precision} if cfg.precision != "fp32" else {}),
    }
    folder = Path(given["out"] or CHECKPOINTS / cfg.model.name / "ems")
    partial, about = folder / "partial.npz", folder / "ems.json"
    if about.exists() and read_json(about) != json.loads(json.dumps(identity)):
        raise ConfigError(f"{folder} holds statistics of another computation ({about}). Set another out.")
    if not all(path.exists() for path in (about, folder / "l.npz", folder / "sb.npz")):
        with products(cfg.precision):
            statistics = compute(model, grid, given["samples"], given["batch"], partial, identity)
        save(folder, statistics)
        with whole_file(about) as temporary:
            temporary.write_text(json.dumps(identity, indent=1) + "\n")
        partial.unlink(missing_ok=True)  # another process may have ended before
    print(
        f"{folder}: l.npz, sb.npz of {given['samples']} samples at {given['nodes'] + 1} half-log-SNRs. Use them with "
        f"solver=dpm_v3 'solver.statistics={{_target_: evodiff.ems.load, folder: {folder}}}'"
    )
    return 0
