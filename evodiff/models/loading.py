"""From a checkpoint to a network on a device, and to the schedule it was trained on."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from evodiff import checkpoints
from evodiff.checkpoints.checkpoint import Checkpoint
from evodiff.device import moved
from evodiff.errors import CheckpointError, ConfigError
from evodiff.models.networks import build
from evodiff.schedule import EDM, DiscreteVP, LinearVP, NoiseSchedule


def load_network(name_or_path: str, architecture: str, device: torch.device | str) -> tuple[Any, Checkpoint]:
    """The network of a checkpoint, in eval mode and frozen. On the CPU its weights stay mapped from the file.

    Raises ConfigError for a checkpoint of another architecture, CheckpointError if the weights do not fit.
    """
    checkpoint = checkpoints.load(name_or_path)
    if checkpoint.architecture != architecture:
        raise ConfigError(
            f"{name_or_path} holds a network of {checkpoint.architecture}, but this model is made of {architecture}."
        )
    with torch.device("meta"):
        net = build(architecture, checkpoint.config)
    try:
        missing, unexpected = net.load_state_dict(checkpoint.tensors, strict=False, assign=True)
    except RuntimeError as e:
        raise CheckpointError(f"{checkpoint.path}: {' '.join(str(e).split())}") from e
    # constants that the constructor computes may be absent; weights may not
    missing = [key for key in missing if net.state_dict()[key].is_meta]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the network does not"
        raise CheckpointError(
            f"{checkpoint.path} does not fit its description: it {what} ({len(missing)} missing, {len(unexpected)} too "
            f"many). Convert the original file again."
        )
    for parameter in net.parameters():
        if parameter.dtype == torch.float64:  # some averages are kept so; what a network is given is float32
            parameter.data = parameter.data.float()
    return moved(net.eval().requires_grad_(False), device), checkpoint


def schedule_of(description: Any) -> NoiseSchedule:
    """The schedule a checkpoint names by `type`. Raises ConfigError."""
    if not isinstance(description, Mapping):
        raise ConfigError(f"schedule={description!r} is no mapping; expected `type` and its numbers.")
    fields = dict(description)
    kinds, key = TYPES, fields.pop("type", None)
    if key == "DiscreteVP":
        kinds, key = BETAS, fields.pop("betas", "linear")
    if not isinstance(key, str) or key not in kinds:
        field = "betas" if kinds is BETAS else "type"
        raise ConfigError(f"schedule: {field}={key} does not exist; possible: {', '.join(kinds)}.")
    try:
        return kinds[key](**fields)
    except TypeError as e:
        raise ConfigError(f"schedule: {key} cannot be made of {', '.join(fields) or 'nothing'} ({e}).") from e


def discrete_schedule_of(description: Any) -> DiscreteVP:
    """The same, of a network whose labels are those of discrete times. Raises ConfigError for another one."""
    schedule = schedule_of(description)
    if not isinstance(schedule, DiscreteVP):
        raise ConfigError(f"schedule: type={description['type']} has no betas, as this network needs; use DiscreteVP.")
    return schedule


def _cosine(num_timesteps: int, **times: float) -> DiscreteVP:
    return DiscreteVP.from_betas(cosine_betas(num_timesteps), **times)


def _scaled_linear(beta_start: float, beta_end: float, num_timesteps: int, **times: float) -> DiscreteVP:
    return DiscreteVP.from_betas(scaled_linear_betas(beta_start, beta_end, num_timesteps), **times)


BETAS: dict[Any, Callable[..., NoiseSchedule]] = {
    "linear": DiscreteVP.linear,
    "cosine": _cosine,
    "scaled_linear": _scaled_linear,
}
TYPES: dict[Any, Callable[..., NoiseSchedule]] = {"EDM": EDM, "LinearVP": LinearVP, "DiscreteVP": DiscreteVP.linear}


def cosine_betas(num_timesteps: int, s: float = 0.008, largest: float = 0.999) -> list[float]:
    """beta_i = 1 - abar(i + 1) / abar(i), abar(i) = cos^2((i/N + s)/(1 + s) pi/2) (arXiv 2102.09672, eq. 17)."""
    bar = [math.cos((i / num_timesteps + s) / (1 + s) * math.pi / 2) ** 2 for i in range(num_timesteps + 1)]
    return [min(1 - b / a, largest) for a, b in zip(bar, bar[1:], strict=False)]


def scaled_linear_betas(beta_start: float, beta_end: float, num_timesteps: int) -> list[float]:
    """Square roots evenly spaced (latent diffusion, arXiv 2112.10752)."""
    return [b**2 for b in torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).tolist()]


def nearly_0(before: float) -> float:
    """alpha at the first time of a schedule that has none left there (arXiv 2305.08891), below the one `before`."""
    return min(2.0**-12, before / 2)
