"""What network weights belong to: told by the file, by a JSON beside it, by the registry, or by the asker."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from evodiff.checkpoints.layouts import Weights
from evodiff.checkpoints.registry import resembling
from evodiff.errors import CheckpointError, ConfigError, EvodiffError

OF_SCHEDULE = "schedule."
"""How an override of the schedule begins; all others are of the network."""
DDPM_LINEAR = {"type": "DiscreteVP", "betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_timesteps": 1000}


@dataclass(frozen=True)
class Description:
    """What a network is: architecture, the official constructor's arguments, and the noise schedule it was trained on.

    `schedule` has `type`, a class of evodiff.schedule (EDM, LinearVP, DiscreteVP), and its numbers; DiscreteVP has
    `betas` (linear, cosine, scaled_linear) and `num_timesteps`.
    """

    architecture: str = ""
    config: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None


def described_in(path: Path) -> Description | None:
    """A JSON file about a network, ours or one with `constructor_kwargs`, `init_kwargs` or `config`; otherwise None."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    config = next(
        (found[k] for k in ("config", "constructor_kwargs", "init_kwargs") if isinstance(found.get(k), dict)), None
    )
    return Description(found.get("architecture", ""), config, found.get("schedule")) if config else None


def described_beside(source: Path) -> Description | None:
    """What a JSON file in the same folder says, whose name the source's name begins with."""
    near = [path for path in source.parent.glob("*.json") if source.name.startswith(path.stem)]
    found = (described_in(path) for path in sorted(near, key=lambda path: -len(path.stem)))
    return next((description for description in found if description), None)


def describe(
    source: Path, weights: Weights, given: Description, overrides: Sequence[str]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, configuration and schedule: what the file says, else `given`, else what is known of its like.

    `overrides` are `key=value` on the configuration, and `schedule.key=value` on the schedule. Raises CheckpointError
    unless the network so described has exactly these weights, ConfigError for what describes none.
    """
    from evodiff.models.loading import schedule_of

    architecture = weights.architecture
    if given.architecture and given.architecture != architecture:
        raise CheckpointError(f"{source} holds weights of {architecture}, not of {given.architecture}.")
    if not given.config and not weights.config:
        given = described_beside(source) or given
    alike = resembling(fingerprint(weights.tensors), source.name)
    if not given.config and alike:
        given = Description(architecture, alike.config, given.schedule or alike.schedule)
    config = weights.config or given.config
    if not config:
        raise ConfigError(
            f"{source} holds weights of {architecture}, of no network in the registry, and not all arguments of a "
            "network can be told from its weights. Run `evodiff convert` with --config FILE.json, the arguments of its "
            "constructor, or with --like NAME of the registry and what differs as key=value."
        )
    of_network = [o for o in overrides if not o.startswith(OF_SCHEDULE)]
    merged = _merged(config, of_network)
    network = fitting(source, architecture, merged, weights.tensors)
    known = given.schedule or (alike.schedule if alike else None)
    stated = stated_schedule(architecture, merged, network)
    if given.schedule and of_network and stated != stated_schedule(architecture, config, network):
        raise ConfigError(
            f"{' '.join(of_network)} changes the schedule, which is given apart; change it with {OF_SCHEDULE}key=value."
        )
    schedule = given.schedule or stated or known or DDPM_LINEAR
    if not isinstance(schedule, Mapping):
        raise ConfigError(f"{source}: schedule={schedule!r} is no mapping; expected `type` and its numbers.")
    schedule = _changed(schedule, [o.removeprefix(OF_SCHEDULE) for o in overrides if o.startswith(OF_SCHEDULE)])
    schedule_of(schedule)
    return architecture, merged, schedule


def _merged(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    try:
        changed = OmegaConf.merge(OmegaConf.create(plain(config)), OmegaConf.from_dotlist(list(overrides)))
        merged: Any = OmegaConf.to_container(changed)
        return merged
    except (OmegaConfBaseException, ValueError) as e:
        raise ConfigError(f"{' '.join(overrides)}: {str(e).splitlines()[0]}") from e


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=dict))


def stated_schedule(architecture: str, config: Mapping[str, Any], network: Any) -> Mapping[str, Any] | None:
    """The schedule that a configuration says its network was trained on; None if it says nothing of it."""
    if architecture == "edm":  # the limits of the network, inside those that Karras et al. sample between
        return {"type": "EDM", "t_start": min(80.0, network.sigma_max), "t_end": max(0.002, network.sigma_min)}
    if architecture == "score_sde":
        model = config.get("model", {})
        sde = config.get("training", {}).get("sde") or ("vesde" if model.get("scale_by_sigma") else "vpsde")
        if sde == "vesde":
            return {"type": "EDM", "t_start": float(model["sigma_max"]), "t_end": float(model["sigma_min"])}
        if sde == "vpsde":
            return {"type": "LinearVP", "beta_min": model.get("beta_min", 0.1), "beta_max": model.get("beta_max", 20.0)}
        raise ConfigError(f"training.sde={sde} has no schedule here; possible: vpsde, vesde.")
    noise = config.get("diffusion")
    names = {"beta_schedule": "betas", "num_diffusion_timesteps": "num_timesteps"}
    return {**DDPM_LINEAR, **{names.get(key, key): value for key, value in noise.items()}} if noise else None


def _changed(schedule: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The schedule with its `key=value`; the numbers of one kind are not those of another, and are left behind."""
    said = _merged({}, overrides)
    if said.get("type", schedule.get("type")) != schedule.get("type"):
        schedule = {}
    elif said.get("betas", schedule.get("betas", "linear")) != schedule.get("betas", "linear"):
        schedule = {key: schedule[key] for key in ("type", "num_timesteps") if key in schedule}
    return dict(plain({**schedule, **said}))


def fingerprint(shapes: Mapping[str, Any]) -> str:
    """16 hex digits of the names and shapes of weights."""
    lines = sorted(f"{name} {list(value.shape)}" for name, value in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def fitting(source: Path, architecture: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The network of this configuration, without weights. Raises CheckpointError unless it has exactly these."""
    from evodiff.models.networks import build

    try:
        with torch.device("meta"):
            network = build(architecture, config)
        expected = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    except EvodiffError:
        raise
    except Exception as e:  # arguments of a wrong type or size fail wherever they are first used
        raise ConfigError(f"{source}: no {architecture} network can be built from its arguments ({e}).") from e
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    wrong = [k for k in {**expected, **found} if expected.get(k) != found.get(k)]
    if wrong:
        k = wrong[0]
        said = f"{k} is {list(found[k]) if k in found else 'missing'}"
        meant = f"{list(expected[k])} is expected" if k in expected else "the network has no such weight"
        raise CheckpointError(
            f"{source} does not fit the network it is said to be ({architecture}): {said}, {meant}; {len(wrong)} of "
            f"{len(expected)} weights differ. Give its own arguments with --config, --like or key=value."
        )
    return network
