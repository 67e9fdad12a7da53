"""A job: a run, and how to do it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from evodiff.config import build, compose, nearest
from evodiff.device import device_for
from evodiff.errors import ConfigError, StoreError
from evodiff.metrics.distances import AGAINST_REFERENCE, FROM_IMAGES, OF_IMAGES
from evodiff.metrics.protocol import Protocol, from_dict
from evodiff.metrics.score import METRICS
from evodiff.runs.run import Run
from evodiff.store import SampleStore
from evodiff.tracking import Tracker

NUMBERS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "batch": ("images", ("auto",)),
    "shard": ("images", ()),
    "threads": ("threads", (None,)),
}
"""Keys of a job that count something, and the words that may stand instead."""
MOST_THREADS = 16
"""For each core; torch crashes where the system has no more."""
SAVES = ("shards", "png", "grid", "none")
FEATURES_ONLY = ("grid", "none")
"""Kinds of `save` with which shards hold features in place of images."""


@dataclass(frozen=True)
class Job:
    """A run and how to do it: what changes neither the images nor the score."""

    run: Run
    protocol: Protocol | None
    reference_run: Run | None
    """The converged run that errors are measured from."""
    keeps_states: bool
    """Whether shards hold the states before rounding, several times the size of the images."""
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
    def measured(self) -> set[str]:
        """The metrics that come of it: errors against a reference run only where there is one."""
        return {name for name in self.metrics if self.reference_run is not None or name not in AGAINST_REFERENCE}

    @property
    def reference(self) -> "Job | None":
        """What makes the reference run, for which no picture of each image is asked."""
        if self.reference_run is None:
            return None
        save = "shards" if self.save == "png" else self.save
        return replace(self, run=self.reference_run, reference_run=None, save=save)

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
        if (most := MOST_THREADS * (os.cpu_count() or 1)) < (cfg.threads or 0):
            raise ConfigError(f"threads={cfg.threads} is impossible: more than {most} threads are of no use here.")
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
            reference_run = _reference_run(run, overrides, [str(text) for text in cfg.reference_run])
        return cls(
            run=run,
            protocol=protocol,
            reference_run=reference_run,
            keeps_states=reference_run is not None,
            device=device_for(cfg.device),
            batch=cfg.batch,
            shard=cfg.shard,
            threads=cfg.threads,
            save=cfg.save,
            metrics=metrics,
            tracker=build(cfg.tracker),
        )

    def with_nfe(self, nfe: int) -> "Job":
        return replace(self, run=replace(self.run, nfe=nfe))


def without_solver(overrides: Sequence[str]) -> list[str]:
    """Those that say nothing of solver and grid: what a run shares with the one that its errors are taken from."""
    own = ("solver", "grid", "nfe", "denoise_final", "t_start", "t_end")
    return [text for text in overrides if text.lstrip("+~").split("=")[0].split(".")[0] not in own]


def _reference_run(run: Run, overrides: list[str], instead: list[str]) -> Run:
    """The run of the same images that `instead` describes, in place of what `overrides` say of solver and grid. Raises
    ConfigError for one that no distance can be taken to."""
    reference = Run.from_config(compose("run", [*without_solver(overrides), *instead]))
    for text in instead:
        if (key := text.lstrip("+~").split("=")[0].split(".")[0]) not in Run.__dataclass_fields__:
            raise ConfigError(
                f"reference_run={instead}: {key} makes no other run. Leave it out, or set it for the run itself: it "
                f"holds for both. Possible: {', '.join(Run.__dataclass_fields__)}."
            )
    if not any(text.startswith("solver=") for text in instead):
        raise ConfigError(
            f"reference_run={instead} names no solver, and the default, {reference.solver['name']}, would be meant. "
            f"Name one, like reference_run=['solver=unipc_3','nfe=200']."
        )
    other = [key for key in ("model", "seeds", "guidance", "noise") if getattr(reference, key) != getattr(run, key)]
    if other:
        raise ConfigError(
            f"reference_run={instead} has other {' and '.join(other)} than the run, and distances are taken between "
            f"images of the same. Leave that out."
        )
    return reference


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


def store_of(job: Job) -> SampleStore:
    needs = ("x",) if job.keeps_states else ()
    return SampleStore(job.run.folder, job.run.identity(), job.run.seed_range, job.shard, needs)


def has_images(job: Job) -> bool:
    """Whether the shards of a run are in its folder; they are not read."""
    try:
        shards = store_of(job).shards
    except StoreError:
        return False
    return bool(shards) and all((job.run.folder / shard.file).exists() for shard in shards)
