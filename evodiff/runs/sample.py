"""sample_run makes the images of a run that are missing."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from evodiff.background import OneBehind, one_ahead
from evodiff.config import build
from evodiff.cpu import use_cpu
from evodiff.denoiser import Denoiser, OfBatch, threshold_of
from evodiff.device import device_name
from evodiff.files import sha256, whole_file
from evodiff.grid import TimeGrid
from evodiff.metrics.score import Scorer
from evodiff.models.pretrained import Pretrained
from evodiff.noise import Noise
from evodiff.paths import resolve
from evodiff.pictures import save_grid, save_pngs
from evodiff.precision import products
from evodiff.progress import progress
from evodiff.runs.batch_size import automatic, synchronised_clock
from evodiff.runs.job import FEATURES_ONLY, Job, store_of
from evodiff.runs.loaded import loaded
from evodiff.runs.run import DTYPES, NOISES, Run
from evodiff.sampling import Generated, generate
from evodiff.solvers.base import Solver
from evodiff.store import SampleStore

PREVIEW = 64
"""Images in grid.png."""


def sample_run(job: Job) -> bool:
    """Make the missing shards of a run. False if another process still works on some of them.

    A run that is complete costs nothing: the model is not even loaded.
    """
    run = job.run
    use_cpu(job.threads)
    store = store_of(job)
    read = files_read(run)
    store.check_files(store.weights | read, unnoted=read)
    for name in store.damaged():
        print(f"{run.key()}: {name} is damaged or missing; sampling it anew", file=sys.stderr)
    for name in store.lacking():
        print(f"{run.key()}: {name} has no {' and '.join(store.needs)} in it; sampling it anew", file=sys.stderr)
    if not store.missing():
        store.tidy()
        save_pictures(job, store)
        return True
    scorer = Scorer(job.protocol, job.device, job.scored) if job.save in FEATURES_ONLY and job.protocol else None
    with loaded(run, job.device) as model:
        _make_shards(job, model, scorer, store, read)
    if store.missing():
        return False
    store.tidy()
    save_pictures(job, store)
    return True


def _make_shards(
    job: Job, model: Pretrained, scorer: Scorer | None, store: SampleStore, read: Mapping[str, str]
) -> None:
    """Those of the missing shards that no other process works on; `read` is what files_read found."""
    run = job.run
    solver, grid = run.plan(model)
    if solver.caveat:
        print(f"{run.key()}: {solver.caveat}; configs/solver/{run.solver['name']}.yaml says more", file=sys.stderr)
    files = {**read, **model.files}
    store.check_files(files, unnoted=read)
    write_yaml(run.folder / "run.yaml", run.as_dict())
    before: list[range] = []
    missing = store.missing()
    if job.batch == "auto" and missing:
        job = replace(job, batch=batch_for(job, model, grid, max(map(len, missing))))
    with progress(run.key(), sum(map(len, missing))) as advance:
        while missing != before:  # others may have cut the seeds in other places, and ended
            with OneBehind() as behind:
                for seeds in missing:
                    with ExitStack() as claim:
                        if not claim.enter_context(store.claim(seeds)):
                            continue
                        started, batches = time.monotonic(), []
                        with products(run.precision):
                            for batch in sample_batches(job, model, solver, grid, seeds):
                                batches.append(batch)
                                advance(len(batch.seeds))
                        shard = shard_of(job, scorer, seeds, batches, time.monotonic() - started)
                        behind(write_shard, store, files, shard, claim.pop_all())
            before, missing = missing, store.missing()


def files_read(run: Run) -> dict[str, str]:
    """sha256 of the files that a configuration names, for they may change: of times, of statistics, of weights.

    By the name there; weights by the file's name, as in Pretrained.files.
    """
    names = run.named("path") + [f"{folder}/{part}.npz" for folder in run.named("folder") for part in ("l", "sb")]
    found = {name: resolve(name) for name in names}
    if isinstance(weights := run.model.get("weights"), str):
        found[Path(weights).name] = resolve(weights)
    return {name: sha256(path) for name, path in found.items() if path.is_file()}


def save_pictures(job: Job, store: SampleStore) -> None:
    """What a complete run lacks of grid.png and, with save=png, of a file for each image: its last process may have
    died before it, or the run was made without them."""
    path = job.run.folder / "grid.png"
    if not path.exists() and len(preview := store.first(PREVIEW)):
        save_grid(path, preview, columns=8)
    if job.save == "png":
        for seeds, images in store.batches("seeds", "images"):
            save_pngs(job.run.folder / "png", seeds.tolist(), images)


def sample_batches(job: Job, model: Pretrained, solver: Solver, grid: TimeGrid, seeds: range) -> Iterator[Generated]:
    """The images of `seeds`, on the CPU, `job.batch` at a time."""
    assert isinstance(job.batch, int)
    run, size = job.run, job.batch
    looked_at = job.save != "none" or (job.protocol is not None and job.scored)
    drawing = model if looked_at else replace(model, decode=None)  # a decoder may cost as much as the network

    def drawn(batch: range) -> tuple[range, Noise, Tensor | None]:
        noise: Noise = NOISES[run.noise](batch)
        noise.latents(model.shape)
        return batch, noise, noise.labels(model.num_classes) if model.num_classes else None

    batches = (range(a, min(a + size, seeds.stop)) for a in range(seeds.start, seeds.stop, size))
    for batch, noise, labels in one_ahead(drawn, batches):
        generated = generate_as(run, drawing, denoiser_for(run, model, labels), solver, grid, batch, noise)
        # not a view of the state, which would stay on the device for as long as the shard is made
        x = generated.x.float().cpu() if job.keeps_states else torch.empty(0)
        yield replace(generated, x=x, images=generated.images.cpu(), labels=labels)


def generate_as(
    run: Run, model: Pretrained, denoiser: Denoiser, solver: Solver, grid: TimeGrid, seeds: Sequence[int], noise: Noise
) -> Generated:
    """One batch with the settings of a run."""
    return generate(
        denoiser,
        solver,
        grid,
        seeds,
        model.shape,
        denoise_final=run.denoise_final,
        noise=noise,
        device=model.device,
        dtype=DTYPES[run.dtype],
        rounding=run.rounding,
        decode=model.decode,
    )


def batch_for(job: Job, model: Pretrained, grid: TimeGrid, largest: int) -> int:
    """What `batch=auto` comes to for this network on this device: `largest` at most."""
    run = job.run

    @torch.no_grad()
    def call(n: int) -> Tensor:
        x = torch.zeros(n, *model.shape, dtype=DTYPES[run.dtype], device=job.device)
        labels = torch.zeros(n, dtype=torch.int64) if model.num_classes else None
        return denoiser_for(run, model, labels)(x, grid.nodes[0])

    with torch.compiler.set_stance("force_eager"):  # or every size that is tried would be compiled
        size = automatic(call, largest, job.device, synchronised_clock(job.device))
    print(f"{run.key()}: batch=auto is {size} images on {job.device}", file=sys.stderr)
    return size


def denoiser_for(run: Run, model: Pretrained, labels: Tensor | None) -> Denoiser:
    """The denoiser of one batch: guided towards its labels, thresholded."""
    labels = None if labels is None else labels.to(model.device)
    thresholded, guided = threshold_of(run.threshold, latent=model.decode is not None), build(run.guidance)

    def of(labels: Tensor | None) -> Denoiser:
        return thresholded(guided(model, labels))

    # a compiled network would be compiled anew for each size that a part of a batch has
    return of(labels) if run.compile else OfBatch(of, labels)


@dataclass(frozen=True)
class MadeShard:
    """What is to be written of some seeds."""

    seeds: range
    arrays: Mapping[str, np.ndarray]
    nfe: int
    seconds: float
    made_by: str | None
    device: str


def shard_of(job: Job, scorer: Scorer | None, seeds: range, batches: list[Generated], seconds: float) -> MadeShard:
    """What `save` keeps of finished batches: images, or their features alone."""
    arrays: dict[str, np.ndarray] = {}
    if scorer is not None:
        features = [part for batch in batches for part in scorer.parts(batch.images)]
        for name in scorer.needs:
            arrays[name] = np.concatenate([getattr(part, name).numpy() for part in features])
    images = np.concatenate([batch.images.numpy() for batch in batches])
    if job.save not in FEATURES_ONLY:
        arrays["images"] = images
    if labels := [batch.labels.numpy() for batch in batches if batch.labels is not None]:
        arrays["labels"] = np.concatenate(labels)
    if job.keeps_states:
        arrays["x"] = np.concatenate([batch.x.numpy() for batch in batches])
    if job.save == "grid" and (kept := PREVIEW - (seeds.start - job.run.seeds[0])) > 0:
        arrays["preview"] = images[:kept]
    made_by = scorer.moments.made_by if scorer is not None else None
    nfe = max(batch.nfe for batch in batches)
    return MadeShard(seeds, arrays, nfe, seconds, made_by, device_name(job.device))


def write_shard(store: SampleStore, files: Mapping[str, str], shard: MadeShard, claim: ExitStack) -> None:
    """Write it, and let go of the seeds."""
    with claim:
        store.write(
            shard.seeds,
            shard.arrays,
            nfe=shard.nfe,
            seconds=shard.seconds,
            weights=files,
            made_by=shard.made_by,
            device=shard.device,
        )


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        OmegaConf.save(OmegaConf.create(dict(content)), temporary)
