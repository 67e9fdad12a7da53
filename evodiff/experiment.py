"""A run, from its configuration to its record: sample_run makes the images, score_run measures them."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evodiff.background import OneBehind, one_ahead
from evodiff.batch_size import automatic, synchronised_clock
from evodiff.config import build, compose, essential, nearest, parse_range
from evodiff.denoiser import Clipped, Denoiser, DynamicThreshold
from evodiff.errors import ConfigError, StoreError
from evodiff.files import whole_file
from evodiff.grid import TimeGrid, grid_for
from evodiff.metrics.features import Features
from evodiff.metrics.protocol import Protocol, from_dict
from evodiff.metrics.score import METRICS, Scorer, files_used
from evodiff.models.pretrained import Pretrained
from evodiff.noise import LegacyNoise, Noise, SeededNoise
from evodiff.paths import RESULTS
from evodiff.plots import save_grid, save_pngs
from evodiff.precision import PRECISIONS, prepared
from evodiff.progress import progress
from evodiff.record import AGAINST_REFERENCE, OF_IMAGES, Record, device_name, versions
from evodiff.sampling import Generated, generate
from evodiff.solvers.base import Solver
from evodiff.store import SampleStore, Shard
from evodiff.tracking import Tracker

NOISES = {"seeded": SeededNoise, "legacy": LegacyNoise}
THRESHOLDS = {"none": lambda denoiser: denoiser, "clip": Clipped, "dynamic": DynamicThreshold}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
ROUNDINGS = ("round", "truncate")
SAVES = ("shards", "png", "grid", "none")
FEATURES_ONLY = ("grid", "none")
"""Kinds of `save` with which shards hold features in place of images."""
PREVIEW = 64
"""Images in grid.png."""
EXTRACTED_AT_ONCE = 250


@dataclass(frozen=True)
class Run:
    """Everything that decides the images, and nothing else. Groups are plain dictionaries with the `name` chosen."""

    model: Mapping[str, Any]
    solver: Mapping[str, Any]
    grid: Mapping[str, Any]
    guidance: Mapping[str, Any]
    nfe: int | None
    denoise_final: bool
    t_start: float | None
    t_end: float | None
    threshold: str
    seeds: tuple[int, int]
    noise: str
    dtype: str
    rounding: str
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Run":
        """From the composed `run.yaml`. Raises ConfigError for values that cannot be run."""
        content = OmegaConf.to_container(cfg)
        assert isinstance(content, dict)
        seeds = parse_range(content["seeds"])
        for key, known in (
            ("noise", NOISES),
            ("threshold", THRESHOLDS),
            ("dtype", DTYPES),
            ("rounding", ROUNDINGS),
            ("precision", PRECISIONS),
            ("channels_last", (True, False)),
            ("compile", (True, False)),
        ):
            if content[key] not in known:
                raise ConfigError(f"{key}={content[key]} does not exist; possible: {', '.join(map(str, known))}.")
        fields = {name: content[name] for name in cls.__dataclass_fields__ if name != "seeds"}
        return cls(**fields, seeds=(seeds.start, seeds.stop - 1))

    def __post_init__(self) -> None:
        if self.nfe is not None and (type(self.nfe) is not int or self.nfe < 1):
            raise ConfigError(f"nfe={self.nfe} is impossible: expected a number of network evaluations, at least 1.")

    @property
    def seed_range(self) -> range:
        return range(self.seeds[0], self.seeds[1] + 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field: what `run.yaml` and the record hold."""
        return json.loads(json.dumps(asdict(self)))

    def identity(self) -> dict[str, Any]:
        """Plain JSON types without what only repeats a default: what the key and the manifest are made of."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {key: value for key, value in essential(self.as_dict()).items() if defaults[key] != value}

    def key(self) -> str:
        """`<solver>-nfe<n>-<8 hex>`: the name of the run's folder."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return f"{self.solver['name']}-nfe{self.nfe or 'adaptive'}-{digest[:8]}"

    @property
    def folder(self) -> Path:
        return RESULTS / "runs" / self.model["name"] / self.key()

    def plan(self, model: Pretrained) -> tuple[Solver, TimeGrid]:
        """The solver and the grid of this run on a model. Raises BudgetError if the NFE cannot be spent exactly."""
        solver: Solver = build(self.solver)
        if self.nfe is not None:
            solver = solver.for_budget(self.nfe - self.denoise_final)
        grid = grid_for(
            self.nfe,
            solver,
            build(self.grid),
            model.denoiser(None).schedule,
            denoise_final=self.denoise_final,
            t_start=self.t_start,
            t_end=self.t_end,
        )
        solver.check(grid, model.shape)
        return solver, grid


@dataclass(frozen=True)
class Job:
    """A run and how to do it: what changes neither the images nor the score."""

    run: Run
    protocol: Protocol | None
    reference_run: Run | None
    device: str
    batch: int | Literal["auto"]
    shard: int
    save: str
    metrics: tuple[str, ...]
    tracker: Tracker

    @property
    def scored(self) -> tuple[str, ...]:
        """The metrics that are taken from features."""
        return tuple(name for name in self.metrics if name in METRICS)

    @property
    def keeps_states(self) -> bool:
        """Whether shards hold the states before rounding, several times the size of the images."""
        return self.reference_run is not None

    @classmethod
    def compose(cls, overrides: list[str]) -> "Job":
        return cls.from_config(compose("run", overrides), overrides)

    @classmethod
    def from_config(cls, cfg: DictConfig, overrides: list[str]) -> "Job":
        run = Run.from_config(cfg)
        for key, words in (("batch", ("auto",)), ("shard", ())):
            if cfg[key] not in words and (type(cfg[key]) is not int or cfg[key] < 1):
                or_auto = ", or auto" if words else ""
                raise ConfigError(f"{key}={cfg[key]} is impossible: expected a number of images, at least 1{or_auto}.")
        metrics = metrics_of(cfg)
        protocol = None if cfg.protocol.name == "none" else from_dict(dict(cfg.protocol))
        if protocol is not None and protocol.rounding != run.rounding:
            raise ConfigError(
                f"protocol={cfg.protocol.name} scores images with rounding={protocol.rounding}, but the run asks for "
                f"rounding={run.rounding}. Set rounding={protocol.rounding}, or choose another protocol."
            )
        reference_run = None
        if cfg.reference_run is not None and not AGAINST_REFERENCE.keys().isdisjoint(metrics):
            solver_part = ("solver", "grid", "nfe", "denoise_final", "t_start", "t_end")
            kept = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in solver_part]
            reference_run = Run.from_config(compose("run", [*kept, *cfg.reference_run]))
        device = device_for(cfg.device)
        tracker = build(cfg.tracker)
        return cls(run, protocol, reference_run, device, cfg.batch, cfg.shard, cfg.save, metrics, tracker)

    def with_nfe(self, nfe: int) -> "Job":
        return replace(self, run=replace(self.run, nfe=nfe))


def metrics_of(cfg: DictConfig) -> tuple[str, ...]:
    """The metrics asked for. Raises ConfigError for unknown ones, and for those that need what `save` does not keep."""
    if cfg.save not in SAVES:
        raise ConfigError(
            f"save={cfg.save} does not exist.{nearest(str(cfg.save), SAVES)} Possible: {', '.join(SAVES)}."
        )
    known = [*METRICS, *AGAINST_REFERENCE, *OF_IMAGES]
    metrics = tuple(cfg.metrics) if OmegaConf.is_list(cfg.metrics) else (cfg.metrics,)
    for name in metrics:
        if name not in known:
            raise ConfigError(f"no metric is called {name}.{nearest(str(name), known)} Possible: {', '.join(known)}.")
    needing = [name for name in metrics if name not in METRICS and (name in OF_IMAGES or cfg.reference_run is not None)]
    if cfg.save in FEATURES_ONLY and needing:
        rest = ",".join(name for name in metrics if name not in needing)
        raise ConfigError(
            f"save={cfg.save} keeps no images, and these metrics are taken from images: {', '.join(needing)}. "
            f"Set metrics=[{rest}], or save=shards."
        )
    return metrics


def device_for(name: str) -> str:
    """`auto` is the first accelerator, or the CPU. Raises ConfigError for a device this machine lacks."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ConfigError(f"device={name} is not available here ({str(e).splitlines()[0]}). Use device=auto.") from e
    return name


def store_of(job: Job, run: Run | None = None) -> SampleStore:
    run = run or job.run
    return SampleStore(run.folder, run.identity(), run.seed_range, job.shard)


def sample_run(job: Job, run: Run | None = None) -> bool:
    """Make the missing shards of a run. False if another process still works on some of them.

    A run that is complete costs nothing: the model is not even loaded.
    """
    run = run or job.run
    store = store_of(job, run)
    for name in store.damaged():
        print(f"{run.key()}: {name} is damaged or missing; sampling it anew", file=sys.stderr)
    missing = store.missing()
    if not missing:
        return True
    scorer = Scorer(job.protocol, job.device, job.scored) if job.save in FEATURES_ONLY and job.protocol else None
    model = prepared(build(run.model, device=job.device), run.precision, run.channels_last, run.compile)
    solver, grid = run.plan(model)
    store.check_weights(model.files)
    write_yaml(run.folder / "run.yaml", run.as_dict())
    if job.batch == "auto":
        job = replace(job, batch=batch_for(job, run, model, grid))
    with progress(run.key(), sum(map(len, missing))) as advance, OneBehind() as behind:
        for seeds in missing:
            with ExitStack() as claim:
                if claim.enter_context(store.claim(seeds)):
                    started, batches = time.monotonic(), []
                    for batch in sample_batches(job, run, model, solver, grid, seeds):
                        batches.append(batch)
                        advance(len(batch.seeds))
                    shard = shard_of(job, run, scorer, seeds, batches, time.monotonic() - started)
                    behind(write_shard, run.folder, store, model, shard, claim.pop_all())
    if store.missing():
        return False
    preview = store.first(PREVIEW)
    if len(preview):
        save_grid(run.folder / "grid.png", preview, columns=8)
    return True


def sample_batches(
    job: Job, run: Run, model: Pretrained, solver: Solver, grid: TimeGrid, seeds: range
) -> Iterator[Generated]:
    """The images of `seeds`, on the CPU, `job.batch` at a time."""
    assert isinstance(job.batch, int)
    size = job.batch

    def drawn(batch: range) -> tuple[range, Noise, Tensor | None]:
        noise: Noise = NOISES[run.noise](batch)
        noise.latents(model.shape)
        return batch, noise, noise.labels(model.num_classes) if model.num_classes else None

    batches = (range(a, min(a + size, seeds.stop)) for a in range(seeds.start, seeds.stop, size))
    for batch, noise, labels in one_ahead(drawn, batches):
        generated = generate(
            denoiser_for(run, model, labels),
            solver,
            grid,
            batch,
            model.shape,
            denoise_final=run.denoise_final,
            noise=noise,
            device=job.device,
            dtype=DTYPES[run.dtype],
            rounding=run.rounding,
            decode=model.decode,
        )
        x = generated.x.float().cpu() if job.keeps_states else generated.x[:0]
        yield replace(generated, x=x, images=generated.images.cpu())


def batch_for(job: Job, run: Run, model: Pretrained, grid: TimeGrid) -> int:
    """What `batch=auto` comes to for this network on this device."""

    @torch.no_grad()
    def call(n: int) -> Tensor:
        x = torch.zeros(n, *model.shape, dtype=DTYPES[run.dtype], device=job.device)
        labels = torch.zeros(n, dtype=torch.int64) if model.num_classes else None
        return denoiser_for(run, model, labels)(x, grid.nodes[0])

    size = automatic(call, job.shard, job.device, synchronised_clock(job.device))
    print(f"{run.key()}: batch=auto is {size} images on {job.device}", file=sys.stderr)
    return size


def denoiser_for(run: Run, model: Pretrained, labels: Tensor | None) -> Denoiser:
    """The denoiser of one batch: guided towards its labels, thresholded."""
    labels = None if labels is None else labels.to(model.device)
    return THRESHOLDS[run.threshold](build(run.guidance)(model, labels))


@dataclass(frozen=True)
class MadeShard:
    """What is to be written of some seeds; `pngs` are the images again, for a file each."""

    seeds: range
    arrays: Mapping[str, np.ndarray]
    nfe: int
    seconds: float
    protocol: str | None
    pngs: np.ndarray | None


def shard_of(
    job: Job, run: Run, scorer: Scorer | None, seeds: range, batches: list[Generated], seconds: float
) -> MadeShard:
    """What `save` keeps of finished batches: images, or their features alone."""
    arrays: dict[str, np.ndarray] = {}
    if scorer is not None:
        features = [scorer.extracted(batch.images) for batch in batches]
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
    return MadeShard(seeds, arrays, nfe, seconds, protocol, images if job.save == "png" else None)


def write_shard(folder: Path, store: SampleStore, model: Pretrained, shard: MadeShard, claim: ExitStack) -> None:
    """Write it, and let go of the seeds."""
    with claim:
        if shard.pngs is not None:
            save_pngs(folder / "png", shard.seeds, shard.pngs)
        store.write(
            shard.seeds,
            shard.arrays,
            nfe=shard.nfe,
            seconds=shard.seconds,
            weights=model.files,
            protocol=shard.protocol,
        )


def score_run(job: Job, run: Run | None = None) -> Record:
    """Score the images of a complete run; a score.json that has what is asked is taken as it is."""
    if record := current_record(job, run):
        return record
    reference = job.reference_run if run is None else None
    run = run or job.run
    store = store_of(job, run)
    n = len(run.seed_range)
    metrics: dict[str, float] = {}
    if job.protocol and job.scored:
        scorer = Scorer(job.protocol, job.device, job.scored)
        for shard, arrays in store.files():
            _add_shard(scorer, store, shard, arrays)
        metrics |= scorer.result()
    for name in job.metrics:
        if reference and name in AGAINST_REFERENCE:
            metrics[f"{name}@{n}"] = AGAINST_REFERENCE[name](store, store_of(job, reference))
        elif name in OF_IMAGES:
            metrics[f"{name}@{n}"] = OF_IMAGES[name](store)
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
        reference_run=reference.key() if reference else None,
        device=device_name(job.device),
        versions=versions(),
        asked=list(job.metrics),
        files=files_used(job.protocol, job.device) if job.protocol and job.scored else {},
    )
    record.write(run.folder / "score.json")
    return record


def current_record(job: Job, run: Run | None = None) -> Record | None:
    """The score.json of a run, if it is of the images that are there and has what is asked."""
    reference = job.reference_run.key() if run is None and job.reference_run else None
    run = run or job.run
    store = store_of(job, run)
    path = run.folder / "score.json"
    if not path.exists() or store.missing():
        return None
    record = Record.read(path)
    expected = (job.protocol.describe() if job.protocol else None, store.digests, reference)
    asked_before = {*job.metrics} <= {*record.asked}
    return record if asked_before and (record.protocol, record.shards, record.reference_run) == expected else None


def _add_shard(scorer: Scorer, store: SampleStore, shard: Shard, arrays: Mapping[str, np.ndarray]) -> None:
    """The features kept while sampling, if they are this protocol's; otherwise those of the images."""
    if shard.protocol == scorer.protocol.hash and {*scorer.needs} <= {*shard.holds}:
        scorer.add_features(Features(**{name: torch.from_numpy(arrays[name]) for name in scorer.needs}))
    elif "images" in shard.holds:
        for part in torch.from_numpy(arrays["images"]).split(EXTRACTED_AT_ONCE):
            scorer.add(part)
    else:
        raise StoreError(
            f"{shard.file} in {store.folder} keeps no images, and not the {' and '.join(scorer.needs)} of protocol "
            f"{scorer.protocol.name} ({scorer.protocol.hash}). Remove the folder and sample anew with save=shards, or "
            f"with this protocol and these metrics."
        )


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        OmegaConf.save(OmegaConf.create(dict(content)), temporary)
