"""The solvers of this project as schedulers of diffusers (`pip install -e '.[diffusers]'`).

    from evodiff.interop.diffusers import EVODiffScheduler

    pipe.scheduler = EVODiffScheduler.from_config(pipe.scheduler.config)
    image = pipe("a bird", num_inference_steps=10).images[0]

A pipeline calls the network and hands its output to `step`; a solver with one evaluation per step asks for exactly that
output, at the state and the node the pipeline has just been at. So `step` is the solver's own `step`, whose denoiser
gives what was handed in, and each number of inference steps is one network evaluation: `num_inference_steps` is `nfe`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evodiff.api import named_solver
from evodiff.compat import import_torchvision
from evodiff.denoiser import Clipped, DynamicThreshold
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import Step, TimeGrid
from evodiff.interop import ending, images
from evodiff.interop.process import VP, Straight, process_of, translated
from evodiff.interop.timesteps import Nodes, choose_nodes
from evodiff.schedule import Node, NoiseSchedule
from evodiff.solvers.base import Solver
from evodiff.solvers.time_shift import TimeShift

import_torchvision()  # diffusers imports it, and beside a CPU build of torch it fails without this
try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as e:
    raise ConfigError(
        "evodiff.interop.diffusers needs the package diffusers. Install it: pip install -e '.[diffusers]'."
    ) from e


@dataclass
class SolverSchedulerOutput(SchedulerOutput):
    """`prev_sample`, the state at the next node, and `pred_original_sample`, the data prediction D at this one."""

    pred_original_sample: Tensor | None = None


class GivenOutput:
    """The denoiser of one step: D of the network output that the pipeline has computed."""

    def __init__(self, D: Tensor, node: Node, schedule: NoiseSchedule):
        self.D, self.node, self.schedule, self.asked = D, node, schedule, False

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        if self.asked or node != self.node:
            raise SamplingError(
                "the solver asks for a network output that the pipeline has not computed: it is none that evaluates "
                "the network once per step, at the state it was given."
            )
        self.asked = True
        return self.D


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """Any solver of this project that evaluates the network once per step, by its name in configs/solver.

    `solver_fields` are its fields, like {"order": 3}. `spacing` is a name in configs/grid (logsnr, karras,
    time_uniform, ...); null follows `use_karras_sigmas`, `use_lu_lambdas`, `use_exponential_sigmas` and
    `timestep_spacing`, uniform by default. Timesteps are not rounded to whole numbers. With
    final_sigmas_type="sigma_min" the last step ends at the smallest noise level of training; with "zero" the last
    network evaluation is the result (`denoise_final` elsewhere in this project). `clip_sample` and `thresholding` limit
    D. The other arguments are those of diffusers' schedulers.

    A configuration of another scheduler is taken at its word on the process (betas, prediction, flow shift, EDM's
    sigma_data) and the spacing, but for its solver's own settings (solver_order, lower_order_final, ...).
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    fixed_solver: str | None = None
    _step_index: int | None
    _begin_index: int | None
    _state: Any

    @register_to_config
    def __init__(
        self,
        solver: str = "evodiff",
        solver_fields: dict[str, Any] | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        lambda_min_clipped: float = -math.inf,
        prediction_type: str = "epsilon",
        spacing: str | None = None,
        use_karras_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "sigma_min",
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        sigma_data: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
    ):
        if self.fixed_solver:
            self.register_to_config(solver=self.fixed_solver)
        check_choice("timestep_spacing", timestep_spacing, ("linspace", "leading", "trailing"))
        check_choice("final_sigmas_type", final_sigmas_type, ("sigma_min", "zero"))
        self.process = process_of(self.config)
        self._fields = fields = dict(solver_fields or {})
        if self.config["solver"] == "evodiff" and isinstance(self.process, Straight):
            # kappa falls a hundredfold in the first step of a flow, and the balanced differences follow it: five
            # uniform steps of the shipped digits end at a root mean square error of 3.3, with plain differences at 0.2
            fields.setdefault("balance", False)
        self._solver = one_evaluation(self.config["solver"], **fields)
        self.init_noise_sigma = self.process.init_noise_sigma
        if isinstance(self.process, VP):
            log_alphas = torch.tensor(self.process.schedule.log_alphas, dtype=torch.float64)
            alphas_cumprod = (2 * log_alphas).exp()
            self.alphas_cumprod = alphas_cumprod.float()
            self.alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]]).float()
            self.betas = 1 - self.alphas
        first, last = (self.process.timestep(t) for t in (self.process.schedule.t_start, self.process.schedule.t_end))
        self.timesteps = torch.linspace(first, last, num_train_timesteps)
        self.num_inference_steps: int | None = None
        self._restart(Nodes((), to_zero=final_sigmas_type == "zero"))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if isinstance(config, Mapping) and "solver" not in config:  # which ours have
            given = {key: kwargs[key] for key in kwargs.keys() & config.keys()}
            config = translated({**config, **given})
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later step: the solver takes that for its first."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the nodes by one of: their number, the timesteps of all evaluations, or noise levels.

        `sigmas` falls; it is sigma / alpha, of flows sigma itself. Of n + 1 values the last is where the last step
        ends, 0 meaning that the last evaluation is the result; for flows, n values as pipelines give them, moved by
        `flow_shift`. `mu`: a flow shift of exp(mu) for this call, or with time_shift_type="linear" of mu. Raises
        ConfigError.
        """
        shift = self.config["flow_shift"]
        if mu is not None:
            shift = mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        self._restart(choose_nodes(self.config, self.process, num_inference_steps, timesteps, sigmas, shift))
        evaluated = self._nodes.evaluated
        steps = [self.process.timestep(node.t) for node in evaluated]
        self.timesteps = torch.tensor(steps, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([self.process.sigma(node) for node in self._nodes.all] + [0.0] * self._nodes.to_zero)
        self.num_inference_steps = len(evaluated)

    def _restart(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.solver = ending(self._solver, self._fields, nodes.to_zero)
        self._step_index = None
        self._begin_index = None
        self._grid: TimeGrid | None = None
        self._noise: Any = GeneratorNoise()

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The step whose timestep is nearest."""
        known = [self.process.timestep(node.t) for node in self._nodes.evaluated]
        return min(range(len(known)), key=lambda i: abs(known[i] - float(timestep)))

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input; with EDM's preconditioning it is the state, scaled."""
        if timestep is None or isinstance(self.process, VP | Straight):
            return sample
        node = self.process.schedule.node(self.process.t_of_timestep(float(timestep)))
        return sample * self.process.input_scale(node)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma z, at one timestep or at one per sample."""
        nodes = [self.process.schedule.node(self.process.t_of_timestep(t)) for t in timesteps.flatten().tolist()]
        per_sample = [1] * (original_samples.ndim - 1)
        like = original_samples
        alpha, sigma = (
            torch.tensor([getattr(node, name) for node in nodes], dtype=torch.float64).to(like.device, like.dtype)
            for name in ("alpha", "sigma")
        )
        return alpha.view(-1, *per_sample) * original_samples + sigma.view(-1, *per_sample) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by the name and in the order of flow-matching pipelines."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SolverSchedulerOutput | tuple[Tensor, ...]:
        """From the network's output at `sample` [B, C, ...] to the state at the next node.

        Computed in float32 at least, returned in the dtype of `sample`. Channels of the output beyond C, a learned
        variance, are left out. `timestep` decides where the first call begins, unless `set_begin_index` did. Raises
        SamplingError before `set_timesteps` and after the last step.
        """
        if not self._nodes.all:
            raise SamplingError("step comes before set_timesteps: call scheduler.set_timesteps(n) first.")
        if self._step_index is None:
            self._begin(timestep, sample)
        i, begin = self._step_index, self._begin_index
        assert i is not None and begin is not None
        if i >= len(self._nodes.evaluated):
            raise SamplingError(
                f"all {self.num_inference_steps} steps are done: call scheduler.set_timesteps(n) again."
            )
        node = self._nodes.all[i]
        x = images(sample.to(torch.promote_types(sample.dtype, torch.float32)))
        out = model_output[:, : sample.shape[1]]
        if out.shape != sample.shape:
            raise SamplingError(f"model_output is {list(model_output.shape)}, but the sample {list(sample.shape)}")
        out = images(out.to(x.dtype))
        D = self._limited(self.process.data(x, out, node), node)
        if begin + len(self._grid or ()) > i:
            assert self._grid is not None
            self._noise.generator = generator
            x_t, self._state = self.solver.step(self._given(D, node), x, Step(self._grid, i - begin), self._state)
        else:
            x_t = D
        self._step_index = i + 1
        x_t, D = (tensor.reshape(sample.shape).to(sample.dtype) for tensor in (x_t, D))
        return SolverSchedulerOutput(x_t, D) if return_dict else (x_t,)

    def _begin(self, timestep: float | Tensor, sample: Tensor) -> None:
        if self._begin_index is None:
            self._begin_index = self.index_for_timestep(timestep)
        self._step_index = self._begin_index
        rest = self._nodes.all[self._begin_index :]
        if len(rest) > 1:
            self._grid = TimeGrid(rest, self.process.schedule)
            self.solver.check(self._grid, images(sample).shape[1:])
        self._state = self.solver.init(self._noise)

    def _given(self, D: Tensor, node: Node) -> GivenOutput:
        return GivenOutput(D, node, self.process.schedule)

    def _limited(self, D: Tensor, node: Node) -> Tensor:
        config, denoise = self.config, self._given(D, node)
        if config["thresholding"]:
            clipped = Clipped(denoise, config["sample_max_value"])
            return DynamicThreshold(clipped, config["dynamic_thresholding_ratio"])(D, node)
        return Clipped(denoise, config["clip_sample_range"])(D, node) if config["clip_sample"] else D


class EVODiffScheduler(SolverScheduler):
    """EVODiff (arXiv 2509.26096) as a scheduler; `solver_fields` are those of evodiff.solvers.evodiff.EVODiff.

    On flows `balance` is false unless it is given: the released rule is made for EDM's noise levels. Where the last
    evaluation is the result `final` is euler unless it is given: the released one is for the end of a run.
    """

    fixed_solver = "evodiff"


class GeneratorNoise:
    """The noise of a stochastic step, from the generator that `step` was given, or one per sample."""

    generator: torch.Generator | list[torch.Generator] | None = None

    def normal(self, like: Tensor) -> Tensor:
        return randn_tensor(like.shape, generator=self.generator, device=like.device, dtype=like.dtype)


def one_evaluation(name: str, **fields: Any) -> Solver:
    """The solver of a name. Raises ConfigError if it needs other evaluations than the pipeline's one per step."""
    solver = named_solver(name, **fields)
    shifts = isinstance(solver, TimeShift) and solver.window > 0
    if solver.adaptive or shifts or any(solver.evaluations(n) != n for n in range(1, 7)):
        raise ConfigError(
            f"solver={name} does not evaluate the network exactly once per step, at the step's own time, as a "
            f"scheduler must; possible: multistep solvers like evodiff, dpmpp_2m, unipc_3, deis_tab3."
        )
    return solver


def check_choice(name: str, value: str, possible: Sequence[str]) -> None:
    if value not in possible:
        raise ConfigError(f"{name}={value} does not exist; possible: {', '.join(possible)}.")
