"""A run, from its configuration to its record: sample_run makes the images, score_run measures them."""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from evodiff.config import build, compose, essential, parse_range
from evodiff.denoiser import Clipped, Denoiser, DynamicThreshold
from evodiff.errors import ConfigError
from evodiff.files import whole_file
from evodiff.grid import TimeGrid, grid_for
from evodiff.metrics.protocol import Protocol, from_dict
from evodiff.metrics.score import score
from evodiff.models.pretrained import Pretrained
from evodiff.noise import LegacyNoise, SeededNoise
from evodiff.paths import RESULTS
from evodiff.plots import save_grid
from evodiff.progress import progress
from evodiff.sampling import generate
from evodiff.solvers.base import Solver
from evodiff.store import SampleStore
from evodiff.tracking import Tracker

NOISES = {"seeded": SeededNoise, "legacy": LegacyNoise}
THRESHOLDS = {"none": lambda denoiser: denoiser, "clip": Clipped, "dynamic": DynamicThreshold}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
ROUNDINGS = ("round", "truncate")


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
        ):
            if content[key] not in known:
                raise ConfigError(f"{key}={content[key]} does not exist; possible: {', '.join(known)}.")
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
        return essential(self.as_dict())

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
    batch: int
    shard: int
    tracker: Tracker

    @classmethod
    def compose(cls, overrides: list[str]) -> "Job":
        return cls.from_config(compose("run", overrides), overrides)

    @classmethod
    def from_config(cls, cfg: DictConfig, overrides: list[str]) -> "Job":
        run = Run.from_config(cfg)
        for key in ("batch", "shard"):
            if not isinstance(cfg[key], int) or cfg[key] < 1:
                raise ConfigError(f"{key}={cfg[key]} is impossible: expected a number of images, at least 1.")
        protocol = None if cfg.protocol.name == "none" else from_dict(dict(cfg.protocol))
        if protocol is not None and protocol.rounding != run.rounding:
            raise ConfigError(
                f"protocol={cfg.protocol.name} scores images with rounding={protocol.rounding}, but the run asks for "
                f"rounding={run.rounding}. Set rounding={protocol.rounding}, or choose another protocol."
            )
        reference_run = None
        if cfg.reference_run is not None:
            solver_part = ("solver", "grid", "nfe", "denoise_final", "t_start", "t_end")
            kept = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in solver_part]
            reference_run = Run.from_config(compose("run", [*kept, *cfg.reference_run]))
        return cls(run, protocol, reference_run, device_for(cfg.device), cfg.batch, cfg.shard, build(cfg.tracker))

    def with_nfe(self, nfe: int) -> "Job":
        return replace(self, run=replace(self.run, nfe=nfe))


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
    model: Pretrained = build(run.model, device=job.device)
    solver, grid = run.plan(model)
    store.check_weights(model.files)
    write_yaml(run.folder / "run.yaml", run.as_dict())
    with progress(run.key(), sum(map(len, missing))) as advance:
        for seeds in missing:
            with store.claim(seeds) as mine:
                if mine:
                    _sample_shard(job, run, store, model, solver, grid, seeds, advance)
    if store.missing():
        return False
    _save_preview(run, store)
    return True


def _sample_shard(
    job: Job,
    run: Run,
    store: SampleStore,
    model: Pretrained,
    solver: Solver,
    grid: TimeGrid,
    seeds: range,
    advance: Any,
) -> None:
    started, parts = time.monotonic(), []
    for first in range(seeds.start, seeds.stop, job.batch):
        batch = range(first, min(first + job.batch, seeds.stop))
        noise = NOISES[run.noise](batch)
        part = generate(
            denoiser_for(run, model, noise),
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
        parts.append(part)
        advance(len(batch))
    store.write(
        list(seeds),
        np.concatenate([p.images.cpu().numpy() for p in parts]),
        np.concatenate([p.x.float().cpu().numpy() for p in parts]),
        nfe=max(p.nfe for p in parts),
        seconds=time.monotonic() - started,
        weights=model.files,
    )


def denoiser_for(run: Run, model: Pretrained, noise: Any) -> Denoiser:
    """The denoiser of one batch: labels drawn, guided, thresholded."""
    labels = noise.labels(model.num_classes).to(model.device) if model.num_classes else None
    return THRESHOLDS[run.threshold](build(run.guidance)(model, labels))


@dataclass(frozen=True)
class Record:
    """score.json: everything needed to repeat one cell and to judge it."""

    key: str
    run: dict[str, Any]
    protocol: dict[str, Any] | None
    metrics: dict[str, float]
    nfe: int
    network_passes: int
    images: int
    seconds: float
    weights: dict[str, str]
    shards: dict[str, str]
    reference_run: str | None
    device: str
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")


def score_run(job: Job, run: Run | None = None) -> Record:
    """Score the images of a complete run; an up-to-date score.json is taken as it is."""
    is_reference = run is not None
    run = run or job.run
    store = store_of(job, run)
    path = run.folder / "score.json"
    protocol = job.protocol.describe() if job.protocol else None
    reference = None if is_reference or job.reference_run is None else job.reference_run
    shards = {shard.file: shard.sha256 for shard in store.shards}
    if path.exists() and not store.missing():
        record = Record.read(path)
        known = (record.protocol, record.shards, record.reference_run)
        if known == (protocol, shards, reference.key() if reference else None):
            return record
    metrics: dict[str, float] = {}
    if job.protocol:
        metrics |= score((torch.from_numpy(images) for (images,) in store.batches("images")), job.protocol, job.device)
    if reference:
        metrics[f"rmse@{len(run.seed_range)}"] = rmse(store, store_of(job, reference))
    metrics[f"contrast@{len(run.seed_range)}"] = contrast(store)
    nfe = max(shard.nfe for shard in store.shards)
    record = Record(
        key=run.key(),
        run=run.as_dict(),
        protocol=protocol,
        metrics=metrics,
        nfe=nfe,
        network_passes=nfe * build(run.guidance).network_passes,
        images=len(run.seed_range),
        seconds=round(sum(shard.seconds for shard in store.shards), 3),
        weights=store.weights,
        shards=shards,
        reference_run=reference.key() if reference else None,
        device=device_name(job.device),
        versions=versions(),
    )
    record.write(path)
    return record


def rmse(store: SampleStore, reference: SampleStore) -> float:
    """Root mean square of x - x_ref over all images and pixels, x in [-1, 1] before rounding; same seeds."""
    total, count = 0.0, 0
    for (seeds, x), (ref_seeds, ref) in zip(store.batches("seeds", "x"), reference.batches("seeds", "x"), strict=True):
        assert np.array_equal(seeds, ref_seeds)
        total += float(((x.astype(np.float64) - ref) ** 2).sum())
        count += x.size
    return float(np.sqrt(total / count))


def contrast(store: SampleStore) -> float:
    """Mean over images of the standard deviation of their pixels, in grey levels."""
    stds = [images.reshape(len(images), -1).std(axis=1, dtype=np.float64) for (images,) in store.batches("images")]
    return float(np.concatenate(stds).mean())


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("evodiff", "torch", "numpy")}


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        OmegaConf.save(OmegaConf.create(dict(content)), temporary)


def _save_preview(run: Run, store: SampleStore) -> None:
    save_grid(run.folder / "grid.png", store.first(64), columns=8)
