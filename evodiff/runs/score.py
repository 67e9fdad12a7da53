"""score_run measures the images of a complete run."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from evodiff.config import build
from evodiff.cpu import use_cpu
from evodiff.device import device_name
from evodiff.errors import ConfigError, StoreError
from evodiff.locks import locked
from evodiff.metrics.distances import AGAINST_REFERENCE, OF_IMAGES
from evodiff.metrics.features import Features
from evodiff.metrics.score import Scorer, files_left_open, files_used
from evodiff.runs.job import Job, store_of
from evodiff.runs.loaded import loaded
from evodiff.runs.record import Record, versions
from evodiff.runs.run import Run
from evodiff.store import SampleStore, Shard

UNKNOWN = "unknown"


def check_scorable(job: Job) -> None:
    """Raise now what scoring would raise after hours of sampling: files that are not here, a single image, images that
    do not suit the protocol, or a reference run that cannot be."""
    current = current_record(job)  # of every job, for this raises what a damaged folder raises
    if current is None and job.reference and store_of(job.reference).missing():
        with loaded(job.run, job.device) as model:
            job.reference.run.plan(model)
    if current is None and job.protocol and job.scored:
        if len(job.run.seed_range) < 2:
            seed = job.run.seeds[0]
            raise ConfigError(
                f"seeds={seed} is one image, of seed {seed}, and {job.protocol.metric} needs at least 2: give a range, "
                f"like seeds=0-{max(seed, 1)}, or use `evodiff sample`."
            )
        scorer = Scorer(job.protocol, job.device, job.scored)
        scorer.check_count(len(job.run.seed_range))
        if store_of(job).missing():
            with loaded(job.run, job.device) as model:
                if model.decode is None:
                    scorer.extracted(torch.zeros(1, *model.shape, dtype=torch.uint8))


def score_run(job: Job) -> Record:
    """Score the images of a complete run.

    A record of these images that has what is asked is taken as it is; of another one of the same protocol all that
    still holds is kept. Of processes that score a run one works, and the others wait.
    """
    if record := current_record(job):
        return record
    store_of(job).check_complete()
    with locked(job.run.folder, "score.lock"):
        return current_record(job) or _scored(job)


def _scored(job: Job) -> Record:
    run, reference = job.run, job.reference
    use_cpu(job.threads)
    store = store_of(job)
    n = len(run.seed_range)
    before = scored_before(job)
    metrics, asked, files = still_true(before, job.reference_run) if before else ({}, [], {})
    if job.protocol and job.scored:
        files = files_used(job.protocol, job.device)
        scorer = Scorer(job.protocol, job.device, job.scored)
        for _, arrays in store.files(partial(_scored_arrays, scorer, store)):
            _add_arrays(scorer, arrays)
        metrics |= scorer.result()
    for name in job.metrics:
        if reference and name in AGAINST_REFERENCE:
            metrics[f"{name}@{n}"] = AGAINST_REFERENCE[name](store, store_of(reference))
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
        reference_run=reference.run.key() if reference else before.reference_run if before else None,
        device=", ".join(sorted({shard.device for shard in store.shards} - {""})) or device_name(job.device),
        versions=versions(),
        asked=list(dict.fromkeys([*asked, *filter(job.measured.__contains__, job.metrics)])),
        files=files,
    )
    record.write(_score_file(job))
    return record


def score_files(job: Job) -> tuple[Path, Path]:
    """Where a run's record of the job's protocol may be: score.json, or beside one of another, score-<hash>.json."""
    own = job.protocol.hash if job.protocol else "none"
    return job.run.folder / "score.json", job.run.folder / f"score-{own}.json"


def _score_file(job: Job) -> Path:
    """The one of them that is this protocol's."""
    first, own = score_files(job)
    return first if _protocol_of(first) in (job.protocol.hash if job.protocol else None, UNKNOWN) else own


def _protocol_of(path: Path) -> str | None:
    """The hash of the protocol of a record; UNKNOWN if there is none, or one that cannot be read."""
    try:
        return (Record.read(path).protocol or {}).get("hash")
    except StoreError:
        return UNKNOWN


def current_record(job: Job) -> Record | None:
    """The record of a run, if it is of the images that are there and has what is asked."""
    reference = job.reference_run.key() if job.reference_run else None
    record = scored_before(job)
    has_all = record and job.measured <= {*record.asked} and reference in (None, record.reference_run)
    return record if has_all else None


def scored_before(job: Job) -> Record | None:
    """The record of a run by the job's protocol, if it is of the images that are there."""
    store = store_of(job)
    path = _score_file(job)
    if not path.exists() or store.missing():
        return None
    try:
        record = Record.read(path)
    except StoreError:  # of another version, or damaged: scored anew
        return None
    expected = (job.protocol.describe() if job.protocol else None, store.digests)
    same = (record.protocol, record.shards) == expected and same_files(job, record)
    return record if same else None


def still_true(record: Record, reference: Run | None) -> tuple[dict[str, float], list[str], dict[str, str]]:
    """Metrics, what was asked, and files of a record: all but the errors against another reference run."""
    moved = reference is not None and reference.key() != record.reference_run
    lost = AGAINST_REFERENCE.keys() if moved else ()
    metrics = {name: value for name, value in record.metrics.items() if name.split("@")[0] not in lost}
    return metrics, [name for name in record.asked if name not in lost], record.files


def same_files(job: Job, record: Record) -> bool:
    """Whether extractor and statistics are what they were, where the protocol does not say what they must be."""
    if job.protocol is None or not record.files:
        return True
    now = files_left_open(job.protocol, job.device)
    return all(record.files.get(name, digest) == digest for name, digest in now.items())


def _scored_arrays(scorer: Scorer, store: SampleStore, shard: Shard) -> Sequence[str]:
    """The features kept while sampling, if they are this protocol's; otherwise the images."""
    if shard.made_by == scorer.moments.made_by and {*scorer.needs} <= {*shard.holds}:
        return scorer.needs
    if "images" in shard.holds:
        return ("images",)
    raise StoreError(
        f"{shard.file} in {store.folder} keeps no images, and not the {' and '.join(scorer.needs)} of protocol "
        f"{scorer.protocol.name} ({scorer.moments.made_by}). Remove the folder and sample anew with save=shards, or "
        f"with this protocol and these metrics."
    )


def _add_arrays(scorer: Scorer, arrays: Mapping[str, np.ndarray]) -> None:
    if "images" in arrays:
        for part in scorer.parts(torch.from_numpy(arrays["images"])):
            scorer.add_features(part)
    else:
        scorer.add_features(Features(**{name: torch.from_numpy(array) for name, array in arrays.items()}))
