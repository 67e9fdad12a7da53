"""What the network sees of one seed on its way: D at every evaluation, by each method of a table."""

from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from evodiff.denoiser import Denoiser
from evodiff.files import whole_file
from evodiff.models.pretrained import Pretrained
from evodiff.plots import save_trajectories
from evodiff.precision import products
from evodiff.runs.job import Job, store_of
from evodiff.runs.loaded import loaded
from evodiff.runs.run import NOISES
from evodiff.runs.sample import denoiser_for, generate_as
from evodiff.sampling import to_uint8
from evodiff.schedule import Node

if TYPE_CHECKING:
    from evodiff.tables.table import Table

WANTED_NFE = 10
FILE = "trajectory.npz"


class Recorder:
    """A denoiser that keeps D [1, C, H, W] and kappa of every call."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.seen: list[tuple[float, Tensor]] = []

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        D = self.denoiser(x, node)
        self.seen.append((node.kappa, D.float()))
        return D


def trajectory(job: Job, model: Pretrained) -> tuple[np.ndarray, np.ndarray]:
    """Of the run's first seed: uint8 images [NFE + 1, C, H, W], the last one the sample, and kappas [NFE]."""
    run, seeds = job.run, [job.run.seeds[0]]
    solver, grid = run.plan(model)
    noise = NOISES[run.noise](seeds)
    labels = noise.labels(model.num_classes) if model.num_classes else None
    recorder = Recorder(denoiser_for(run, model, labels))
    with products(run.precision):
        made = generate_as(run, model, recorder, solver, grid, seeds, noise)
        seen = torch.cat([D for _, D in recorder.seen])
        images = torch.cat([to_uint8(model.decode(seen) if model.decode else seen, run.rounding), made.images])
    return images.cpu().numpy(), np.array([kappa for kappa, _ in recorder.seen])


def shown(table: "Table") -> dict[str, Job]:
    """By method, the run of a table at WANTED_NFE or the column nearest to it."""
    nfe = min(table.nfe, key=lambda n: abs(n - WANTED_NFE))
    return {cell.row: cell.jobs[0] for cell in table.cells.values() if cell.nfe == nfe}


def is_missing(job: Job) -> bool:
    return job.run.folder.exists() and not store_of(job).missing() and _read(job) is None


def make(job: Job) -> None:
    """The trajectory of a run into its folder, if the run is here and its trajectory is not."""
    if not is_missing(job):
        return
    # a network compiled for the run's batches would be compiled anew for this single image
    with loaded(job.run, job.device) as model, torch.compiler.set_stance("force_eager"):
        images, kappas = trajectory(job, model)
    with whole_file(job.run.folder / FILE) as temporary:
        np.savez_compressed(temporary, images=images, kappas=kappas)


def save_sheet(path: Path, table: "Table") -> None:
    """One picture: a row for each method whose trajectory is here. Nothing is written where there is none, and an older
    picture stays."""
    jobs = shown(table)
    rows = {row: kept for row, job in jobs.items() if (kept := _read(job)) is not None}
    if rows:
        run = next(iter(jobs.values())).run
        save_trajectories(path, rows, f"seed {run.seeds[0]}, NFE {run.nfe}")


def _read(job: Job) -> tuple[np.ndarray, np.ndarray] | None:
    """None if there is none, or none that can be read."""
    try:
        with np.load(job.run.folder / FILE) as file:
            return file["images"], file["kappas"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
