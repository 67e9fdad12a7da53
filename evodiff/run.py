"""What is to be done: a Run is everything that decides the images, a Job also how they are made and scored."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from evodiff.config import build, compose, essential, nearest, parse_range
from evodiff.denoiser import THRESHOLDS, threshold_of
from evodiff.device import device_for
from evodiff.errors import ConfigError
from evodiff.grid import TimeGrid, grid_for
from evodiff.metrics.distances import AGAINST_REFERENCE, FROM_IMAGES, OF_IMAGES
from evodiff.metrics.protocol import ROUNDINGS, Protocol, from_dict
from evodiff.metrics.score import METRICS
from evodiff.models.pretrained import Pretrained
from evodiff.noise import LegacyNoise, SeededNoise
from evodiff.paths import RESULTS
from evodiff.precision import PRECISIONS
from evodiff.solvers.base import Solver
from evodiff.store import SampleStore
from evodiff.tracking import Tracker

NOISES = {"seeded": SeededNoise, "legacy": LegacyNoise}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
NUMBERS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "batch": ("images", ("auto",)),
    "shard": ("images", ()),
    "threads": ("threads", (None,)),
}
"""Keys of a job that count something, and the words that may stand instead."""
SAVES = ("shards", "png", "grid", "none")
FEATURES_ONLY = ("grid", "none")
"""Kinds of `save` with which shards hold features in place of images."""


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
    cuda_graphs: bool = False

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
        ):
            if content[key] not in known:
                raise ConfigError(f"{key}={content[key]} does not exist; possible: {', '.join(map(str, known))}.")
        for key in ("denoise_final", "channels_last", "compile", "cuda_graphs"):
            if type(content[key]) is not bool:
                raise ConfigError(f"{key}={content[key]} is impossible; possible: true, false.")
        for key in ("t_start", "t_end"):
            if content[key] is not None and type(content[key]) not in (int, float):
                raise ConfigError(f"{key}={content[key]} is impossible: expected a number, or null.")
        fields = {name: content[name] for name in cls.__dataclass_fields__ if name != "seeds"}
        return cls(**fields, seeds=(seeds.start, seeds.stop - 1))

    def __post_init__(self) -> None:
        if self.nfe is not None and (type(self.nfe) is not int or self.nfe < 1):
            raise ConfigError(
                f"nfe={self.nfe} is impossible: expected a whole number of network evaluations, at least 1."
            )

    @property
    def computing(self) -> tuple[str, bool, bool, bool]:
        """How the network computes: the arguments of `prepared`."""
        return self.precision, self.channels_last, self.compile, self.cuda_graphs

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
        threshold_of(self.threshold, latent=model.decode is not None)
        build(self.guidance)
        solver = build(self.solver)
        if not isinstance(solver, Solver):
            raise ConfigError(
                f"solver={self.solver['name']} builds a {type(solver).__name__}, which is no evodiff solver."
            )
        if solver.stochastic and self.noise == "legacy":
            raise ConfigError(
                f"noise=legacy replays start noise only, and solver={self.solver['name']} draws more: set noise=seeded"
            )
        if self.nfe is not None:
            solver = solver.for_budget(self.nfe - self.denoise_final)
        grid = grid_for(
            self.nfe,
            solver,
            build(self.grid),
            model.schedule,
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
    threads: int | None
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
        for key, (counted, words) in NUMBERS.items():
            if cfg[key] not in words and (type(cfg[key]) is not int or cfg[key] < 1):
                or_word = "".join(f", or {'null' if word is None else word}" for word in words)
                raise ConfigError(
                    f"{key}={cfg[key]} is impossible: expected a number of {counted}, at least 1{or_word}."
                )
        metrics = metrics_of(cfg)
        protocol = None if cfg.protocol.name == "none" else from_dict(dict(cfg.protocol))
        if protocol is not None and protocol.rounding != run.rounding:
            raise ConfigError(
                f"protocol={cfg.protocol.name} scores images with rounding={protocol.rounding}, but the run asks for "
                f"rounding={run.rounding}. Set rounding={protocol.rounding}, or choose another protocol."
            )
        reference_run = None
        if not (cfg.reference_run is None or OmegaConf.is_list(cfg.reference_run)):
            raise ConfigError(
                f"reference_run={cfg.reference_run} is impossible: expected a list of overrides, or null, like "
                f"reference_run=['solver=unipc_3','nfe=200']."
            )
        if cfg.reference_run is not None and not AGAINST_REFERENCE.keys().isdisjoint(metrics):
            solver_part = ("solver", "grid", "nfe", "denoise_final", "t_start", "t_end")
            kept = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in solver_part]
            reference_run = Run.from_config(compose("run", [*kept, *cfg.reference_run]))
        device = device_for(cfg.device)
        tracker = build(cfg.tracker)
        return cls(run, protocol, reference_run, device, cfg.batch, cfg.shard, cfg.threads, cfg.save, metrics, tracker)

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
    needing = [n for n in metrics if n in FROM_IMAGES and (n in OF_IMAGES or cfg.reference_run is not None)]
    if cfg.save in FEATURES_ONLY and needing:
        rest = ",".join(name for name in metrics if name not in needing)
        raise ConfigError(
            f"save={cfg.save} keeps no images, and these metrics are taken from images: {', '.join(needing)}. "
            f"Set metrics=[{rest}], or save=shards."
        )
    return metrics


def store_of(job: Job, run: Run | None = None) -> SampleStore:
    run = run or job.run
    needs = ("x",) if job.keeps_states else ()
    return SampleStore(run.folder, run.identity(), run.seed_range, job.shard, needs)
