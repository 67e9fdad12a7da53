"""What a scheduler's configuration says of the process its network was trained on, in the words of this project.

A diffusers timestep is what the network is told of the time; our time t and it are one to one:

    VP    t = (timestep + 1) / N     sigma is kappa = sigma / alpha
    flow  t = timestep / N           sigma is t itself
    EDM   t = exp(4 timestep)        sigma is t itself
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from evodiff.errors import ConfigError
from evodiff.models.adapter import PREDICTIONS as TO_DATA
from evodiff.models.loading import cosine_betas, nearly_0, scaled_linear_betas
from evodiff.schedule import EDM, DiscreteVP, Flow, Node, NoiseSchedule

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
"""diffusers' names, and ours."""


class Process(Protocol):
    """A noise schedule, and a network's view of it."""

    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def init_noise_sigma(self) -> float: ...
    def timestep(self, t: float) -> float: ...
    def t_of_timestep(self, timestep: float) -> float: ...
    def t_of_sigma(self, sigma: float) -> float: ...
    def sigma(self, node: Node) -> float: ...

    def input_scale(self, node: Node) -> float:
        """What the network's input is times the state."""
        ...

    def data(self, x: Tensor, out: Tensor, node: Node) -> Tensor:
        """D from what the network returned at the state x."""
        ...


@dataclass(frozen=True)
class VP:
    """A discrete VP schedule of N timesteps."""

    schedule: DiscreteVP
    predicts: str
    init_noise_sigma: ClassVar[float] = 1.0

    @property
    def num_timesteps(self) -> int:
        return len(self.schedule.log_alphas)

    def timestep(self, t: float) -> float:
        return self.num_timesteps * t - 1

    def t_of_timestep(self, timestep: float) -> float:
        return (timestep + 1) / self.num_timesteps

    def t_of_sigma(self, sigma: float) -> float:
        return self.schedule.t_at(-math.log(sigma))

    def sigma(self, node: Node) -> float:
        return node.kappa

    def input_scale(self, node: Node) -> float:
        return 1.0

    def data(self, x: Tensor, out: Tensor, node: Node) -> Tensor:
        return TO_DATA[self.predicts](x, out, node)


@dataclass(frozen=True)
class Straight:
    """The straight path of flow matching."""

    schedule: Flow
    num_timesteps: int
    predicts: str
    init_noise_sigma: ClassVar[float] = 1.0

    def timestep(self, t: float) -> float:
        return self.num_timesteps * t

    def t_of_timestep(self, timestep: float) -> float:
        return self.t_of_sigma(timestep / self.num_timesteps)

    def t_of_sigma(self, sigma: float) -> float:
        return sigma if sigma < 1 else self.schedule.t_start  # sigma 1 has no signal, and pipelines begin there

    def sigma(self, node: Node) -> float:
        return node.sigma

    def input_scale(self, node: Node) -> float:
        return 1.0

    def data(self, x: Tensor, out: Tensor, node: Node) -> Tensor:
        return TO_DATA[self.predicts](x, out, node)


@dataclass(frozen=True)
class Preconditioned:
    """EDM's schedule, and the raw output of a network that EDM preconditions (arXiv 2206.00364, table 1).

    D = c_skip x + c_out F; diffusers' `v_prediction` is F with the other sign.
    """

    schedule: EDM
    sigma_data: float
    predicts: str

    @property
    def init_noise_sigma(self) -> float:
        return self.schedule.t_start

    def timestep(self, t: float) -> float:
        return 0.25 * math.log(t)

    def t_of_timestep(self, timestep: float) -> float:
        return math.exp(4 * timestep)

    def t_of_sigma(self, sigma: float) -> float:
        return sigma

    def sigma(self, node: Node) -> float:
        return node.sigma

    def input_scale(self, node: Node) -> float:
        return 1 / math.hypot(node.sigma, self.sigma_data)

    def data(self, x: Tensor, out: Tensor, node: Node) -> Tensor:
        size = math.hypot(node.sigma, self.sigma_data)
        c_out = node.sigma * self.sigma_data / size
        return (self.sigma_data / size) ** 2 * x + (-c_out if self.predicts == "v" else c_out) * out


def process_of(config: Mapping[str, Any]) -> Process:
    """The process of a scheduler's configuration. Raises ConfigError."""
    prediction = config["prediction_type"]
    if prediction not in PREDICTIONS:
        raise ConfigError(f"prediction_type={prediction} does not exist; possible: {', '.join(PREDICTIONS)}.")
    predicts, n = PREDICTIONS[prediction], config["num_train_timesteps"]
    if config["sigma_data"] is not None:
        if predicts not in ("eps", "v"):
            raise ConfigError(f"prediction_type={prediction} with sigma_data; possible: epsilon, v_prediction.")
        return Preconditioned(
            EDM(config["sigma_max"] or 80.0, config["sigma_min"] or 0.002), config["sigma_data"], predicts
        )
    if config["use_flow_sigmas"] or predicts == "flow":
        return Straight(Flow(1 - 1 / n, 1 / n), n, predicts)
    return VP(discrete_vp(config), predicts)


def discrete_vp(config: Mapping[str, Any]) -> DiscreteVP:
    """The schedule of the betas that a configuration gives or names."""
    n, kind, betas = config["num_train_timesteps"], config["beta_schedule"], config["trained_betas"]
    ends = config["beta_start"], config["beta_end"]
    if betas is not None:
        betas = [float(beta) for beta in betas]
    elif kind == "linear":
        betas = [ends[0] + (ends[1] - ends[0]) * i / max(n - 1, 1) for i in range(n)]
    elif kind == "scaled_linear":
        betas = scaled_linear_betas(*ends, n)
    elif kind == "squaredcos_cap_v2":
        betas = cosine_betas(n)
    elif kind == "sigmoid":
        steps = torch.linspace(-6, 6, n, dtype=torch.float64)
        betas = (ends[0] + (ends[1] - ends[0]) * steps.sigmoid()).tolist()
    else:
        possible = "linear, scaled_linear, squaredcos_cap_v2, sigmoid, or trained_betas"
        raise ConfigError(f"beta_schedule={kind} is not known here; possible: {possible}.")
    schedule = DiscreteVP.from_betas(betas)
    if config["rescale_betas_zero_snr"]:
        schedule = DiscreteVP(zero_terminal_snr(schedule.log_alphas))
    lowest = config["lambda_min_clipped"]
    if schedule.node(1.0).lam < lowest:
        schedule = DiscreteVP(schedule.log_alphas, t_start=schedule.t_at(lowest))
    return schedule


def zero_terminal_snr(log_alphas: Sequence[float]) -> tuple[float, ...]:
    """alphas shifted and scaled to run from the same first one to 0 (arXiv 2305.08891, algorithm 1), nearly."""
    alphas = [math.exp(v) for v in log_alphas]
    scale = alphas[0] / (alphas[0] - alphas[-1])
    *inner, _ = ((a - alphas[-1]) * scale for a in alphas)
    return tuple(math.log(a) for a in (*inner, nearly_0(inner[-1])))


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of another diffusers scheduler, with what it means without saying so. Raises ConfigError.

    A scheduler's own defaults describe its process too; diffusers alone would put ours in their place.
    """
    name = config.get("_class_name", "this scheduler")
    if config.get("invert_sigmas"):
        raise ConfigError(f"{name} with invert_sigmas counts its times the other way round, which is not known here.")
    if config.get("snr_shift_scale", 1.0) != 1.0:
        raise ConfigError(f"{name} with snr_shift_scale shifts its noise schedule, which is not known here.")
    if config.get("shift_terminal"):
        raise ConfigError(
            f"{name} with shift_terminal stretches its times, which is not known here. Give the sigmas it would use: "
            f"set shift_terminal to None, and call set_timesteps(sigmas=...)."
        )
    unknown = f"the noise schedule of {name} is not known here; possible: VP (betas), flow matching, EDM."
    meant = {key: config[key] for key in OF_THE_PROCESS if key in config}
    if config.get("timestep_type") == "continuous":
        if config.get("prediction_type") != "v_prediction" or config.get("sigma_max") is None:
            raise ConfigError(
                f"{name} with timestep_type=continuous is known here with prediction_type=v_prediction and a sigma_max."
            )
        meant |= {"sigma_data": 1.0}  # timesteps are log(sigma) / 4, and D = x / (sigma^2 + 1) - ..., as of EDM
    elif config.get("sigma_data") is not None:
        if not edm_preconditions(config):
            raise ConfigError(unknown)
        meant |= {"use_karras_sigmas": config.get("sigma_schedule", "karras") == "karras"}
        meant |= {"use_exponential_sigmas": config.get("sigma_schedule") == "exponential"}
    elif "shift" in config:  # only flow matching has it, and names itself nowhere else
        meant |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["shift"]}
        meant |= {"_class_name": config.get("_class_name", "FlowMatchEulerDiscreteScheduler")}  # whose keys these are
    elif "beta_schedule" not in config and {"_class_name", "_use_default_values"} & config.keys():
        raise ConfigError(unknown)
    defaults = [key for key in config.get("_use_default_values", ()) if key not in meant]
    return {**config, **meant, "_use_default_values": defaults}


def edm_preconditions(config: Mapping[str, Any]) -> bool:
    """Whether `sigma_data` is EDM's; consistency models and Stable Audio's scheduler have one too."""
    if "_class_name" in config:
        return config["_class_name"].startswith("EDM")
    # a scheduler that was not loaded from a file does not say its class
    stable_audio = "solver_order" in config and "algorithm_type" not in config
    return "prediction_type" in config and not stable_audio


OF_THE_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "sigma_data",
    "sigma_min",
    "sigma_max",
)
"""The arguments that describe the process, as far as a scheduler has them."""
