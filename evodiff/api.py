"""The Python interface: from a model and a solver to images, in one call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from evodiff.config import LARGEST_SEED, build, choices, nearest
from evodiff.denoiser import Denoiser, threshold_of
from evodiff.device import device_for
from evodiff.errors import ConfigError
from evodiff.fields import shown
from evodiff.grid import Listed, Spacing, grid_for
from evodiff.guidance import Unguided
from evodiff.models.pretrained import Pretrained
from evodiff.models.wrap import sizes
from evodiff.noise import SeededNoise
from evodiff.paths import CONFIGS
from evodiff.plugins import registered
from evodiff.precision import computing
from evodiff.runs.run import DTYPES
from evodiff.sampling import Generated, generate
from evodiff.solvers.base import Solver

UNGUIDED = Unguided()
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
"""What a configuration file can hold."""


class Guidance(Protocol):
    """An object of evodiff.guidance."""

    def __call__(self, model: Pretrained, labels: Tensor | None) -> Denoiser: ...


def sample(
    model: Pretrained | Denoiser | str,
    solver: Solver | str = "evodiff",
    nfe: int | None = 10,
    seeds: Sequence[int] | np.ndarray | Tensor = range(16),
    *,
    grid: Spacing | Sequence[float] | str = "logsnr",
    guidance: Guidance | str = UNGUIDED,
    labels: Sequence[int] | np.ndarray | Tensor | None = None,
    denoise_final: bool = False,
    t_start: float | None = None,
    t_end: float | None = None,
    threshold: str = "none",
    shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
    batch: int = 250,
) -> Generated:
    """One image per seed, each from exactly `nfe` network evaluations: what `evodiff sample` makes of the same seeds.

    >>> import evodiff
    >>> out = evodiff.sample("mnist_tiny", solver="evodiff", nfe=5, seeds=range(4))
    >>> out.images.shape, out.images.dtype, out.nfe
    (torch.Size([4, 1, 32, 32]), torch.uint8, 5)

    `model`: what `evodiff.wrap` returns, the name of a file of configs/model, or a denoiser D(x, node) of your own with
    a `schedule`; that one needs the `shape` [C, H, W] of a sample. `device`: of a named model or a denoiser, by default
    the CPU. `solver`, `grid` and `guidance`: the name of a file of configs/, or an object, like EVODiff(final="euler");
    `grid` also the times themselves, falling, on the model's schedule: n + 1 for n steps.
    `labels`: the class of each seed; by default it is drawn from the seed. The other arguments are keys of
    configs/run.yaml. The result has `x` [N, C, H, W] in `dtype`, `images` in uint8, `nfe`, and the `labels`.
    Networks compute as with precision=fp32, unless the model is one that `evodiff.precision.prepared` has returned.

    Raises ConfigError for what does not exist, like float64 on MPS, BudgetError for an `nfe` that the solver cannot
    spend exactly, and SamplingError if the network returns NaN.
    """
    model = _pretrained(model, shape, device)
    solver = named_solver(solver) if isinstance(solver, str) else solver
    if not isinstance(solver, Solver):
        raise ConfigError(
            f"solver={shown(solver)} is impossible: give the name of a solver, or an object like EVODiff()."
        )
    spacing = _spacing(grid)
    guided: Guidance = build(_config("guidance", guidance)) if isinstance(guidance, str) else guidance
    if isinstance(guided, type) or not callable(guided):
        raise ConfigError(
            f"guidance={shown(guided)} is impossible: give the name of a guidance, or an object like "
            f"ClassifierFree(2.0)."
        )
    thresholded = threshold_of(threshold, latent=model.decode is not None)
    seeds = _seeds(seeds)
    if not all(isinstance(n, Integral) and n >= 1 for n in (batch, 1 if nfe is None else nfe)):
        raise ConfigError(f"nfe={nfe!r} and batch={batch!r} must be whole numbers, at least 1.")
    if not isinstance(denoise_final, bool):
        raise ConfigError(f"denoise_final={denoise_final!r} is impossible: give True or False.")
    for name, t in (("t_start", t_start), ("t_end", t_end)):
        if t is not None and not isinstance(t, Real):
            raise ConfigError(f"{name}={t!r} is impossible: give a number, or None for the schedule's own.")
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype={dtype!r} is impossible: give torch.float64 or torch.float32.")
    if labels is not None:
        labels = _labels(labels, len(seeds), model.num_classes)
    if nfe is not None:
        nfe = int(nfe)  # also one of numpy's
        solver = solver.for_budget(nfe - denoise_final)
    schedule = model.schedule
    nodes = grid_for(nfe, solver, spacing, schedule, denoise_final=denoise_final, t_start=t_start, t_end=t_end)
    solver.check(nodes, model.shape)

    parts, drawn = [], []
    with torch.inference_mode(False), computing("fp32", model.device):  # guidance by a classifier takes gradients
        for first in range(0, len(seeds), batch):
            own = tuple(seeds[first : first + batch])
            noise = SeededNoise(own)
            y = None
            if model.num_classes:
                y = noise.labels(model.num_classes) if labels is None else torch.tensor(labels[first : first + batch])
                drawn.append(y)
                y = y.to(model.device)
            denoiser = thresholded(guided(model, y))
            parts.append(
                generate(
                    denoiser,
                    solver,
                    nodes,
                    own,
                    model.shape,
                    denoise_final=denoise_final,
                    noise=noise,
                    device=model.device,
                    dtype=dtype,
                    decode=model.decode,
                )
            )
    x, images = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "images"))
    return Generated(tuple(seeds), x, images, max(part.nfe for part in parts), torch.cat(drawn) if drawn else None)


def named_solver(name: str, **fields: Any) -> Solver:
    """The solver of a file of configs/solver, or of another package (evodiff.plugins), with other `fields`.

    >>> from evodiff.api import named_solver
    >>> named_solver("dpmpp_2m", lower_order_final=False)
    DPMSolverPP(order=2, lower_order_final=False)

    Fields that are objects, like `statistics` or `base`, are given as such.
    Raises ConfigError, naming what is possible.
    """
    config = _config("solver", name)
    if unknown := sorted(fields.keys() - config.keys()):
        possible = ", ".join(key for key in config if key not in ("name", "_target_")) or "none"
        raise ConfigError(f"solver={name} has no field {', '.join(unknown)}. Possible: {possible}.")
    if missing := [key for key, value in {**config, **fields}.items() if isinstance(value, str) and value == "???"]:
        raise ConfigError(
            f"solver={name} needs {', '.join(missing)}: give an object, or named_solver({name!r}, {missing[0]}=...)."
        )
    objects = {key: value for key, value in fields.items() if not isinstance(value, PLAIN)}
    if not objects:
        return build({**config, **fields})
    rest = {key: value for key, value in {**config, **fields}.items() if key not in objects}
    return build({**rest, "_partial_": True})(**objects)  # Hydra would make dictionaries of them


def named_grid(name: str) -> Spacing:
    """The spacing of a file of configs/grid. Raises ConfigError, naming what is possible."""
    config = _config("grid", name)
    if missing := [key for key, value in config.items() if value == "???"]:
        raise ConfigError(
            f"grid={name} needs {', '.join(missing)}: give an object, like evodiff.grid.FromFile(path=...)."
        )
    return build(config)


def _spacing(grid: Any) -> Spacing:
    if isinstance(grid, str):
        return named_grid(grid)
    if hasattr(grid, "times") and not isinstance(grid, type):
        return grid
    try:
        times = tuple(map(float, grid))
    except (TypeError, ValueError):
        times = ()
    if len(times) < 2:
        raise ConfigError(
            f"grid={shown(grid)} is impossible: give the name of a grid, an object with times(n, schedule, t_start, "
            f"t_end) like Karras(), or the falling times of the model's schedule themselves, n + 1 for n steps."
        )
    return Listed(times)


def _seeds(seeds: Any) -> Sequence[int]:
    given = seeds.tolist() if isinstance(seeds, np.ndarray | Tensor) else seeds
    whole = isinstance(given, Sequence) and all(isinstance(s, Integral) and not isinstance(s, bool) for s in given)
    if not whole or not given or not all(0 <= s <= LARGEST_SEED for s in given):
        raise ConfigError(
            f"seeds={shown(given)} is impossible: give at least one number from 0 on, up to {LARGEST_SEED}, like "
            f"seeds=range(16)."
        )
    return [int(s) for s in given]  # also those of numpy


def _labels(labels: Any, n: int, num_classes: int) -> list[int]:
    given = labels.tolist() if isinstance(labels, np.ndarray | Tensor) else labels
    whole = isinstance(given, Sequence) and all(isinstance(y, Integral) for y in given)
    if not num_classes:
        raise ConfigError("this model has no classes: leave labels out.")
    if isinstance(given, Sequence) and len(given) != n:
        raise ConfigError(f"{len(given)} labels for {n} seeds of a model with {num_classes} classes.")
    if not whole or not all(0 <= y < num_classes for y in given):
        raise ConfigError(
            f"labels={shown(labels)} are impossible: classes are 0 to {num_classes - 1}, one whole number for each "
            f"seed."
        )
    return [int(y) for y in given]


def _same(asked: torch.device, own: torch.device) -> bool:
    """Whether a device is the one that is asked for; `cuda` is any of its kind."""
    return asked.type == own.type and (asked.index is None or own.index is None or asked.index == own.index)


@contextmanager
def _as_shipped() -> Iterator[None]:
    """Networks are built in float32 on the CPU, whatever the program has made torch's defaults."""
    own = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(own)


def _config(group: str, name: str) -> dict[str, Any]:
    """What a name stands for in a group of configs/."""
    known = choices(group)
    if name not in known:
        raise ConfigError(f"{group}={name} does not exist.{nearest(name, known)} Possible: {', '.join(known)}.")
    if group == "solver" and name in registered():
        return {"name": name, **registered()[name]}
    content = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"))
    assert isinstance(content, dict)
    return {"name": name, **{str(key): value for key, value in content.items()}}


def _pretrained(
    model: Pretrained | Denoiser | str, shape: Sequence[int] | None, device: torch.device | str | None
) -> Pretrained:
    if isinstance(model, str):
        with _as_shipped():
            built = build(_config("model", model), device=device_for(device or "cpu"))
        return _pretrained(built, shape, device)
    if isinstance(model, Pretrained):
        if shape is not None and sizes(shape) != tuple(model.shape):
            raise ConfigError(f"shape={tuple(shape)} is not the model's, {tuple(model.shape)}. Leave it out.")
        if device is not None and not _same(torch.device(device_for(device)), model.device):
            raise ConfigError(
                f"device={device} is not the model's, {model.device}. Leave it out, or give device={device} to "
                f"evodiff.wrap or to what loads the model."
            )
        return model
    if isinstance(model, nn.Module) or not hasattr(model, "schedule"):
        raise ConfigError(
            f"a {type(model).__name__} is no denoiser with a schedule. Make a model of it: evodiff.wrap(network, "
            f"shape=..., predicts=..., schedule=...)."
        )
    if shape is None:
        raise ConfigError("a denoiser does not tell the size of its samples: give shape=(channels, height, width).")
    return Pretrained(lambda labels: model, sizes(shape), device=torch.device(device_for(device or "cpu")))
