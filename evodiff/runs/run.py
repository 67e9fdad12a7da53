"""A run: everything that decides the images, and nothing else."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from evodiff.config import build, essential, parse_range
from evodiff.denoiser import THRESHOLDS, threshold_of
from evodiff.errors import ConfigError
from evodiff.grid import TimeGrid, grid_for
from evodiff.models.pretrained import Pretrained
from evodiff.noise import LegacyNoise, SeededNoise
from evodiff.paths import results_folder
from evodiff.precision import PRECISIONS
from evodiff.sampling import ROUNDINGS
from evodiff.solvers.base import Solver

NOISES = {"seeded": SeededNoise, "legacy": LegacyNoise}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


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
            if content[key] not in list(known):  # a mapping has no place in one
                raise ConfigError(f"{key}={content[key]} does not exist; possible: {', '.join(map(str, known))}.")
        for key in ("denoise_final", "channels_last", "compile", "cuda_graphs"):
            if type(content[key]) is not bool:
                raise ConfigError(f"{key}={content[key]} is impossible; possible: true, false.")
        for key in ("t_start", "t_end"):
            if content[key] is None:
                continue
            if type(content[key]) not in (int, float):
                raise ConfigError(f"{key}={content[key]} is impossible: expected a number, or null.")
            content[key] = float(content[key])  # 40 and 40.0 are one run
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
        return self._key

    @cached_property
    def _key(self) -> str:  # the pages of a table ask for it thousands of times
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return f"{self.solver['name']}-nfe{self.nfe or 'adaptive'}-{digest[:8]}"

    def named(self, field: str) -> list[str]:
        """What the solver and the grid read, at any depth: the `path` of a file, the `folder` of statistics
        (evodiff.ems.load)."""

        def within(config: Mapping[str, Any]) -> Iterator[str]:
            for key, value in config.items():
                if isinstance(value, Mapping):
                    yield from within(value)
                elif key == field:
                    yield str(value)

        return [*within(self.solver), *within(self.grid)]

    @property
    def folder(self) -> Path:
        return results_folder() / "runs" / self.model["name"] / self.key()

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
