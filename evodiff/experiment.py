"""A run made and measured: sample_run makes the images that are missing, score_run measures them."""

import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from evodiff.background import OneBehind, one_ahead
from evodiff.batch_size import automatic, synchronised_clock
from evodiff.config import build
from evodiff.cpu import use_cpu
from evodiff.denoiser import Denoiser, threshold_of
from evodiff.device import device_name
from evodiff.errors import ConfigError, StoreError
from evodiff.files import sha256, whole_file
from evodiff.grid import TimeGrid
from evodiff.metrics.distances import AGAINST_REFERENCE, OF_IMAGES
from evodiff.metrics.features import Features
from evodiff.metrics.protocol import Protocol
from evodiff.metrics.score import LEAST, Scorer, files_used, reference_path
from evodiff.models.pretrained import Pretrained
from evodiff.noise import Noise
from evodiff.paths import resolve
from evodiff.pictures import save_grid, save_pngs
from evodiff.precision import prepared, products
from evodiff.progress import progress
from evodiff.record import Record, versions
from evodiff.run import DTYPES, FEATURES_ONLY, NOISES, Job, Run, store_of
from evodiff.sampling import Generated, generate
from evodiff.solvers.base import Solver
from evodiff.store import SampleStore, Shard

PREVIEW = 64
"""Images in grid.png."""
EXTRACTED_AT_ONCE = 250
NAMING_FILES = ("checkpoint", "classifier", "weights", "pipeline", "prompts")
"""Fields of a model that may name a file or a folder."""
_kept: dict[str, Pretrained] = {}
"""The model of the run before, under what it was made of."""


def sample_run(job: Job, run: Run | None = None) -> bool:
    """Make the missing shards of a run. False if another process still works on some of them.

    A run that is complete costs nothing: the model is not even loaded.
    """
    run = run or job.run
    use_cpu(job.threads)
    store = store_of(job, run)
    read = files_read(run)
    store.check_files(store.weights | read, unnoted=read)
    for name in store.damaged():
        print(f"{run.key()}: {name} is damaged or missing; sampling it anew", file=sys.stderr)
    for name in store.lacking():
        print(f"{run.key()}: {name} has no {' and '.join(store.needs)} in it; sampling it anew", file=sys.stderr)
    if not store.missing():
        save_pictures(job, run, store)
        return True
    scorer = Scorer(job.protocol, job.device, job.scored) if job.save in FEATURES_ONLY and job.protocol else None
    with loaded(run, job.device) as model:
        _make_shards(job, run, model, scorer, store, read)
    if store.missing():
        return False
    save_pictures(job, run, store)
    return True


@contextmanager
def loaded(run: Run, device: str) -> Iterator[Pretrained]:
    """The model of a run on a device, computing as the run says.

    It is kept for the next run, unless what happens inside fails, for example for want of memory. Only one is kept: the
    one before is let go of first, and so it is when a file that the configuration names has changed. Raises what
    building the model raises.
    """
    key = json.dumps([run.as_dict()["model"], run.computing, device, _states(run.model)], sort_keys=True)
    if key not in _kept:
        _kept.clear()
        gc.collect()  # a compiled network refers to itself
        _kept[key] = prepared(build(run.model, device=device), *run.computing)
    try:
        yield _kept[key]
    except BaseException:
        _kept.clear()
        raise


def _states(model: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Size and time of change of the files that a model's configuration names, also of those in folders."""
    named = [resolve(Path(model[key]).expanduser()) for key in NAMING_FILES if isinstance(model.get(key), str)]
    files = [path for one in named for path in (one, *sorted(one.rglob("*"))) if path.is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _make_shards(
    job: Job, run: Run, model: Pretrained, scorer: Scorer | None, store: SampleStore, read: Mapping[str, str]
) -> None:
    """Those of the missing shards that no other process works on; `read` is what files_read found."""
    solver, grid = run.plan(model)
    files = {**read, **model.files}
    store.check_files(files, unnoted=read)
    write_yaml(run.folder / "run.yaml", run.as_dict())
    if job.batch == "auto":
        job = replace(job, batch=batch_for(job, run, model, grid))
    before: list[range] = []
    missing = store.missing()
    with progress(run.key(), sum(map(len, missing))) as advance:
        while missing != before:  # others may have cut the seeds in other places, and ended
            with OneBehind() as behind:
                for seeds in missing:
                    with ExitStack() as claim:
                        if not claim.enter_context(store.claim(seeds)):
                            continue
                        started, batches = time.monotonic(), []
                        with products(run.precision):
                            for batch in sample_batches(job, run, model, solver, grid, seeds):
                                batches.append(batch)
                                advance(len(batch.seeds))
                        shard = shard_of(job, run, scorer, seeds, batches, time.monotonic() - started)
                        behind(write_shard, store, files, shard, claim.pop_all())
            before, missing = missing, store.missing()


def files_read(run: Run) -> dict[str, str]:
    """sha256 of the files that a configuration names, for they may change: of times, of statistics, of weights.

    By the name there; weights by the file's name, as in Pretrained.files.
    """
    statistics = run.solver.get("statistics")
    folder = statistics.get("folder") if isinstance(statistics, Mapping) else None
    names = [run.grid["path"]] if "path" in run.grid else []
    names += [f"{folder}/{part}.npz" for part in ("l", "sb")] if folder else []
    found = {str(name): resolve(str(name)) for name in names}
    weights = Path(str(run.model.get("weights")))
    return {name: sha256(path) for name, path in {**found, weights.name: weights}.items() if path.is_file()}


def check_scorable(job: Job) -> None:
    """Raise now what scoring would raise after hours of sampling: files that are not here, a single image, or images
    that do not suit the protocol."""
    if job.protocol and job.scored and current_record(job) is None:
        if len(job.run.seed_range) < 2:
            seed = job.run.seeds[0]
            raise ConfigError(
                f"seeds={seed} is one image, of seed {seed}, and {job.protocol.metric} needs at least 2: give a range, "
                f"like seeds=0-{max(seed, 1)}, or use `evodiff sample`."
            )
        for name in job.scored:
            if (n := len(job.run.seed_range)) < (least := LEAST.get(name, 2)):
                raise ConfigError(
                    f"metrics={name} needs at least {least} images, and these are {n}: seeds={job.run.seeds[0]}-"
                    f"{job.run.seeds[1]}. Ask for more, or leave {name} out."
                )
        scorer = Scorer(job.protocol, job.device, job.scored)
        if store_of(job).missing():
            with loaded(job.run, job.device) as model:
                if model.decode is None:
                    scorer.extracted(torch.zeros(1, *model.shape, dtype=torch.uint8))


def save_pictures(job: Job, run: Run, store: SampleStore) -> None:
    """What a complete run lacks of grid.png and, with save=png, of a file for each image: its last process may have
    died before it, or the run was made without them."""
    path = run.folder / "grid.png"
    if not path.exists() and len(preview := store.first(PREVIEW)):
        save_grid(path, preview, columns=8)
    if job.save == "png":
        for seeds, images in store.batches("seeds", "images"):
            save_pngs(run.folder / "png", seeds.tolist(), images)


def sample_batches(
    job: Job, run: Run, model: Pretrained, solver: Solver, grid: TimeGrid, seeds: range
) -> Iterator[Generated]:
    """The images of `seeds`, on the CPU, `job.batch` at a time."""
    assert isinstance(job.batch, int)
    size = job.batch
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
        yield replace(generated, x=x, images=generated.images.cpu())


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


def batch_for(job: Job, run: Run, model: Pretrained, grid: TimeGrid) -> int:
    """What `batch=auto` comes to for this network on this device."""

    @torch.no_grad()
    def call(n: int) -> Tensor:
        x = torch.zeros(n, *model.shape, dtype=DTYPES[run.dtype], device=job.device)
        labels = torch.zeros(n, dtype=torch.int64) if model.num_classes else None
        return denoiser_for(run, model, labels)(x, grid.nodes[0])

    with torch.compiler.set_stance("force_eager"):  # or every size that is tried would be compiled
        size = automatic(call, job.shard, job.device, synchronised_clock(job.device))
    print(f"{run.key()}: batch=auto is {size} images on {job.device}", file=sys.stderr)
    return size


def denoiser_for(run: Run, model: Pretrained, labels: Tensor | None) -> Denoiser:
    """The denoiser of one batch: guided towards its labels, thresholded."""
    labels = None if labels is None else labels.to(model.device)
    thresholded = threshold_of(run.threshold, latent=model.decode is not None)
    return thresholded(build(run.guidance)(model, labels))


@dataclass(frozen=True)
class MadeShard:
    """What is to be written of some seeds."""

    seeds: range
    arrays: Mapping[str, np.ndarray]
    nfe: int
    seconds: float
    protocol: str | None


def shard_of(
    job: Job, run: Run, scorer: Scorer | None, seeds: range, batches: list[Generated], seconds: float
) -> MadeShard:
    """What `save` keeps of finished batches: images, or their features alone."""
    arrays: dict[str, np.ndarray] = {}
    if scorer is not None:
        features = [scorer.extracted(part) for batch in batches for part in batch.images.split(EXTRACTED_AT_ONCE)]
        for name in scorer.needs:
            arrays[name] = np.concatenate([getattr(part, name).numpy() for part in features])
    images = np.concatenate([batch.images.numpy() for batch in batches])
    if job.save not in FEATURES_ONLY:
        arrays["images"] = images
    if job.keeps_states:
        arrays["x"] = np.concatenate([batch.x.numpy() for batch in batches])
    if job.save == "grid" and (kept := PREVIEW - (seeds.start - run.seeds[0])) > 0:
        arrays["preview"] = images[:kept]
    protocol = scorer.protocol.hash if scorer is not None else None
    nfe = max(batch.nfe for batch in batches)
    return MadeShard(seeds, arrays, nfe, seconds, protocol)


def write_shard(store: SampleStore, files: Mapping[str, str], shard: MadeShard, claim: ExitStack) -> None:
    """Write it, and let go of the seeds."""
    with claim:
        store.write(
            shard.seeds,
            shard.arrays,
            nfe=shard.nfe,
            seconds=shard.seconds,
            weights=files,
            protocol=shard.protocol,
        )


def score_run(job: Job, run: Run | None = None) -> Record:
    """Score the images of a complete run.

    A score.json of these images that has what is asked is taken as it is; of another one all that still holds is kept.
    """
    if record := current_record(job, run):
        return record
    reference = job.reference_run if run is None else None
    run = run or job.run
    use_cpu(job.threads)
    store = store_of(job, run)
    n = len(run.seed_range)
    before = scored_before(job, run)
    metrics, asked, files = still_true(before, reference) if before else ({}, [], {})
    if job.protocol and job.scored:
        files = files_used(job.protocol, job.device)
        scorer = Scorer(job.protocol, job.device, job.scored)
        for _, arrays in store.files(partial(_scored_arrays, scorer, store)):
            _add_arrays(scorer, arrays)
        metrics |= scorer.result()
    for name in job.metrics:
        if reference and name in AGAINST_REFERENCE:
            metrics[f"{name}@{n}"] = AGAINST_REFERENCE[name](store, store_of(job, reference))
        elif name in OF_IMAGES:
            values = [OF_IMAGES[name](images) for (images,) in store.batches("images")]
            metrics[f"{name}@{n}"] = float(np.concatenate(values).mean())
    nfe = max(shard.nfe for shard in store.shards)
    record = Record(
        key=run.key(),
        run=run.as_dict(),
        protocol=job.protocol.describe() if job.protocol else None,
        metrics=metrics,
        nfe=nfe,
        network_passes=nfe * build(run.guidance).network_passes,
        images=n,
        seconds=round(sum(shard.seconds for shard in store.shards), 3),
        weights=store.weights,
        shards=store.digests,
        reference_run=reference.key() if reference else before.reference_run if before else None,
        device=device_name(job.device),
        versions=versions(),
        asked=list(dict.fromkeys([*asked, *job.metrics])),
        files=files,
    )
    record.write(run.folder / "score.json")
    return record


def current_record(job: Job, run: Run | None = None) -> Record | None:
    """The score.json of a run, if it is of the images that are there and has what is asked."""
    reference = job.reference_run.key() if run is None and job.reference_run else None
    record = scored_before(job, run or job.run)
    has_all = record and {*job.metrics} <= {*record.asked} and reference in (None, record.reference_run)
    return record if has_all else None


def scored_before(job: Job, run: Run) -> Record | None:
    """The score.json of a run, if it is of the images that are there, by the job's protocol."""
    store = store_of(job, run)
    path = run.folder / "score.json"
    if not path.exists() or store.missing():
        return None
    try:
        record = Record.read(path)
    except StoreError:  # of another version, or damaged: scored anew
        return None
    expected = (job.protocol.describe() if job.protocol else None, store.digests)
    same = (record.protocol, record.shards) == expected and same_reference(job.protocol, record)
    return record if same else None


def still_true(record: Record, reference: Run | None) -> tuple[dict[str, float], list[str], dict[str, str]]:
    """Metrics, what was asked, and files of a record: all but the errors against another reference run."""
    moved = reference is not None and reference.key() != record.reference_run
    lost = AGAINST_REFERENCE.keys() if moved else ()
    metrics = {name: value for name, value in record.metrics.items() if name.split("@")[0] not in lost}
    return metrics, [name for name in record.asked if name not in lost], record.files


def same_reference(protocol: Protocol | None, record: Record) -> bool:
    """Whether the statistics of real images are what they were, where the protocol does not say what they must be."""
    known = record.files.get("reference")
    if protocol is None or protocol.reference_sha256 is not None or known is None:
        return True
    return known == sha256(reference_path(protocol))


def _scored_arrays(scorer: Scorer, store: SampleStore, shard: Shard) -> Sequence[str]:
    """The features kept while sampling, if they are this protocol's; otherwise the images."""
    if shard.protocol == scorer.protocol.hash and {*scorer.needs} <= {*shard.holds}:
        return scorer.needs
    if "images" in shard.holds:
        return ("images",)
    raise StoreError(
        f"{shard.file} in {store.folder} keeps no images, and not the {' and '.join(scorer.needs)} of protocol "
        f"{scorer.protocol.name} ({scorer.protocol.hash}). Remove the folder and sample anew with save=shards, or "
        f"with this protocol and these metrics."
    )


def _add_arrays(scorer: Scorer, arrays: Mapping[str, np.ndarray]) -> None:
    if "images" in arrays:
        for part in torch.from_numpy(arrays["images"]).split(EXTRACTED_AT_ONCE):
            scorer.add(part)
    else:
        scorer.add_features(Features(**{name: torch.from_numpy(array) for name, array in arrays.items()}))


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        OmegaConf.save(OmegaConf.create(dict(content)), temporary)
