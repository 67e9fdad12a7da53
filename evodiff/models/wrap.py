"""Your own network as a model of this project.

From Python, `evodiff.wrap(net, shape=(3, 32, 32), predicts="eps", schedule=DiscreteVP.linear())`; from the command
line, a file configs/model/mine.yaml and `evodiff run model=mine`:

    _target_: evodiff.wrap
    model:                                  # any class that can be imported, with its arguments
      _target_: my_package.MyUNet
      channels: 64
    weights: /path/to/weights.safetensors   # its state_dict; or a file that torch.load reads as data
    shape: [3, 32, 32]                      # channels, height, width
    predicts: eps                           # eps | x0 | v | score | flow
    schedule: {_target_: evodiff.schedule.LinearVP}   # its own; or EDM, CosineVP, DiscreteVP.linear, Flow
    label: {_target_: evodiff.models.adapter.ContinuousTime, scale: 999}   # what the network is told of the time
    num_classes: 0                          # above 0: the network is called as model(x, t, y)
    null_label: null                        # the y of no class, for guidance; null: y is None
    data_range: [-1, 1]                     # the network's black and white; [0, 1] for many
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evodiff.denoiser import Denoiser
from evodiff.device import device_for, moved
from evodiff.errors import ConfigError
from evodiff.files import sha256
from evodiff.models.adapter import ContinuousTime, DiscreteTime, NetworkDenoiser, NoiseLevel, process
from evodiff.models.pretrained import Pretrained
from evodiff.noise import normal32
from evodiff.paths import resolve
from evodiff.schedule import EDM, DiscreteVP, Node, NoiseSchedule

LARGEST = 10.0
"""Images are in [-1, 1]; a data prediction of this size at moderate noise means that the description is wrong."""

FARTHEST = 2.0
"""Of the data prediction at the last time from what the noise was added to: any image in [-1, 1] is within 1.6 of it,
also that of a network for other images; noise, velocity or a score taken for the image end farther off."""


def wrap(
    model: Callable[..., Tensor],
    *,
    shape: Sequence[int],
    predicts: str,
    schedule: NoiseSchedule,
    label: Callable[[Node], float] | None = None,
    num_classes: int = 0,
    null_label: int | None = None,
    data_range: Sequence[float] = (-1.0, 1.0),
    sample_on: str = "own",
    weights: str | Path | None = None,
    check: bool = True,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """A network `model(x, t)`, or `model(x, t, y)` with `num_classes`, as a pretrained model.

    x [B, C, H, W] float32 on `schedule`, t [B] float32 from `label` (by default N t - 1 on a DiscreteVP, sigma on EDM,
    t itself on others), y int64 [B]. For the unconditional branch of guidance y is None, or [B] times `null_label`
    for a network that was trained with a label for it (often `num_classes`). It returns `predicts` (eps, x0,
    v, score or flow) of the shape of x, or with twice its channels, of which the second half is left out.
    `sample_on`: the `own` schedule, or `edm` for the same noise levels on EDM's.

    With `check`, the network is called at three noise levels. Raises ConfigError if that fails, or if the output has
    another shape, is not finite, or makes data predictions far outside the range of images or, nearly without noise,
    far from the image; eps, v and flow taken for each other often pass. And for arguments that
    cannot be, like a device that this machine lacks (`device` is a name of torch, or auto).
    """
    channels, height, width = sizes(shape)
    black, white = _ends(data_range)
    missing = [name for name in ("node", "t_at", "t_start", "t_end") if not hasattr(schedule, name)]
    if missing or isinstance(schedule, type):
        raise ConfigError(f"wrap: schedule={schedule!r} must be an object of evodiff.schedule, like LinearVP()")
    if label is not None and not callable(label):
        raise ConfigError(f"wrap: label={label!r} must be a function of a node, like ContinuousTime(999), or None")
    if not _whole(num_classes):
        raise ConfigError(f"wrap: num_classes={num_classes!r} must be a whole number, 0 for a network without classes")
    if null_label is not None and not (_whole(null_label) and num_classes):
        raise ConfigError(
            f"wrap: null_label={null_label!r} must be a whole number from 0 on, of a network with classes, or None"
        )
    if sample_on not in ("own", "edm"):
        raise ConfigError(f"wrap: sample_on={sample_on!r} does not exist; possible: own, edm")
    device = torch.device(device_for(device))
    files = {}
    if weights is not None:
        if not isinstance(weights, str | Path):
            raise ConfigError(f"wrap: weights={weights!r} must be the path of a file, or None")
        path = resolve(weights)
        _load(model, path)
        files[path.name] = sha256(path)
    if isinstance(model, nn.Module):
        model = moved(model.eval().requires_grad_(False), device)
    seen = process(schedule, label or _label_of(schedule), sample_on, (black, white))

    def denoiser(y: Tensor | None) -> Denoiser:
        def conditional(x: Tensor, t: Tensor) -> Tensor:
            if y is None and null_label is not None:
                return model(x, t, torch.full((len(x),), null_label, device=x.device))
            return model(x, t, y)

        return NetworkDenoiser(conditional if num_classes else model, predicts, seen)

    wrapped = Pretrained(
        denoiser,
        (channels, height, width),
        num_classes=num_classes,
        files=files,
        device=device,
        networks=(model,) if isinstance(model, nn.Module) else (),
    )
    if check:
        _check(wrapped, predicts, null_label)
        if num_classes and null_label is None and not _takes_no_label(wrapped):
            wrapped = dataclasses.replace(wrapped, unconditional=False)
    return wrapped


def _takes_no_label(model: Pretrained) -> bool:
    """Whether the network has an answer where y is None."""
    denoiser = model.denoiser(None)
    node = denoiser.schedule.node(denoiser.schedule.t_start)
    try:
        denoiser(torch.zeros(1, *model.shape, device=model.device), node)
    except Exception:  # whatever a network raises
        return False
    return True


def sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width. Raises ConfigError for what is not three whole numbers above 0."""
    try:
        channels, height, width = map(operator.index, shape)
    except (TypeError, ValueError):
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise ConfigError(f"shape={shape!r} must be channels, height, width: three whole numbers above 0")
    return channels, height, width


def _whole(number: Any) -> bool:
    """Whether it is a whole number from 0 on, also one of numpy's."""
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 0


def _ends(data_range: Sequence[float]) -> tuple[float, float]:
    try:
        black, white = map(float, data_range)
    except (TypeError, ValueError):
        black = white = 0.0
    if not black < white:
        raise ConfigError(f"wrap: data_range={data_range!r} must be two rising numbers, black and white")
    return black, white


def _label_of(schedule: NoiseSchedule) -> Callable[[Node], float]:
    if isinstance(schedule, DiscreteVP):
        return DiscreteTime(len(schedule.log_alphas))
    return NoiseLevel() if isinstance(schedule, EDM) else ContinuousTime(1.0)


def _load(model: Any, path: Path) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"wrap: weights={path} need a torch.nn.Module, but the model is a {type(model).__name__}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as e:  # what a file that holds no weights makes torch raise has no end
        raise ConfigError(
            f"wrap: weights={path} cannot be loaded into {type(model).__name__}: {' '.join(str(e).split())[:300]}"
        ) from e


@torch.no_grad()
def _check(wrapped: Pretrained, predicts: str, null_label: int | None) -> None:
    # the first and the last label, of which a table of too few embeddings lacks one
    ends = [0, wrapped.num_classes - 1] + ([null_label] if null_label is not None else [])
    y = torch.tensor(ends, device=wrapped.device) if wrapped.num_classes else None
    denoise = wrapped.denoiser(y)
    assert isinstance(denoise, NetworkDenoiser)
    schedule, network = denoise.schedule, denoise.network
    random = torch.Generator("cpu").manual_seed(0)
    rows = len(ends) if wrapped.num_classes else 2
    clean = (2 * torch.rand(rows, *wrapped.shape, generator=random, dtype=torch.float32, device="cpu") - 1).to(
        wrapped.device
    )
    noise = normal32(clean.shape, random).to(wrapped.device)

    def watched(x: Tensor, t: Tensor) -> Tensor:
        where = f"x {list(x.shape)}, t {t[0].item():.6g}"
        try:
            out = network(x, t)
        except Exception as e:
            raise ConfigError(f"wrap: the model fails on {where} of float32: {type(e).__name__}: {e}") from e
        wide = (len(x), 2 * x.shape[1], *x.shape[2:])
        if not isinstance(out, Tensor) or out.shape not in (x.shape, wide) or not out.is_floating_point():
            got = f"{list(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(f"wrap: on {where} the model returns {got}; expected a float tensor {list(x.shape)}")
        if not out.isfinite().all():
            raise ConfigError(f"wrap: on {where} the model returns nan or inf; check its weights and its time label")
        return out

    denoise.network = watched
    first, last = schedule.node(schedule.t_start), schedule.node(schedule.t_end)
    middle = schedule.node(schedule.t_at(min(max(0.0, first.lam), last.lam)))
    told = denoise.process.label(denoise.process.native.node(denoise.process.native.t_start))
    if not isinstance(told, Real):
        raise ConfigError(f"wrap: label gives {told!r} for the first time; expected a number")
    advice = (
        f"Check predicts={predicts}, schedule, label and data_range; check=False (+model.check=false on a command "
        "line) leaves this test out."
    )
    for node in (first, middle, last):
        D = denoise(node.alpha * clean + node.sigma * noise, node)
        size = D.square().mean().sqrt().item()
        if node is not first and not size <= LARGEST:
            raise ConfigError(
                f"wrap: at t={node.t:.6g} the data prediction has root mean square {size:.3g}, but images are in "
                f"[-1, 1]. {advice}"
            )
        if node is last and not (off := (D - clean).square().mean().sqrt().item()) <= FARTHEST:
            raise ConfigError(
                f"wrap: at t={node.t:.6g}, nearly without noise, the data prediction is {off:.3g} (root mean square) "
                f"from the image. {advice}"
            )
