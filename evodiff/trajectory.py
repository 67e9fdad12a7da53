"""What the network sees of one seed on its way: D at every evaluation, by each method of a table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from evodiff.config import build, essential
from evodiff.denoiser import Denoiser
from evodiff.errors import EvodiffError
from evodiff.experiment import denoiser_for, generate_as
from evodiff.files import whole_file
from evodiff.models.pretrained import Pretrained
from evodiff.plots import save_trajectories
from evodiff.precision import prepared
from evodiff.run import NOISES, Job, store_of
from evodiff.sampling import to_uint8
from evodiff.schedule import Node

if TYPE_CHECKING:
    from evodiff.report import Table

WANTED_NFE = 10


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
    made = generate_as(run, model, recorder, solver, grid, seeds, noise)
    seen = torch.cat([D for _, D in recorder.seen])
    images = torch.cat([to_uint8(model.decode(seen) if model.decode else seen, run.rounding), made.images])
    return images.cpu().numpy(), np.array([kappa for kappa, _ in recorder.seen])


def save_sheet(path: Path, table: "Table") -> None:
    """One picture: a row for each method whose run is here, at WANTED_NFE or the column nearest to it.

    Trajectories are kept in the runs' folders. Nothing is written, and an older picture stays, where none can be had.
    """
    nfe = min(table.nfe, key=lambda n: abs(n - WANTED_NFE))
    models: dict[str, Pretrained | None] = {}
    rows = {}
    for cell in table.cells.values():
        job = cell.jobs[0]
        if cell.nfe != nfe or not job.run.folder.exists() or store_of(job).missing():
            continue
        kept = job.run.folder / "trajectory.npz"
        if not kept.exists():
            name = json.dumps(essential(job.run.as_dict()["model"]), sort_keys=True)
            if name not in models:
                models[name] = _loaded(job)
            if (model := models[name]) is None:
                continue
            images, kappas = trajectory(job, model)
            with whole_file(kept) as temporary:
                np.savez_compressed(temporary, images=images, kappas=kappas)
        with np.load(kept) as file:
            rows[cell.row] = (file["images"], file["kappas"])
    if rows:
        save_trajectories(path, rows, f"seed {job_seed(table)}, NFE {nfe}")


def job_seed(table: "Table") -> int:
    return next(iter(table.jobs.values())).run.seeds[0]


def _loaded(job: Job) -> Pretrained | None:
    run = job.run
    try:
        return prepared(build(run.model, device=job.device), run.precision, run.channels_last, compile=False)
    except EvodiffError:
        return None
