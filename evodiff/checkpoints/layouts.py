"""The layouts in which weights are published, each turned into one state_dict of the bare network.

EDM          pickle with the network under `ema`; it describes itself
score_sde    {optimizer, model, ema, step}: `ema` is a list without names, in the order of the trained parameters
DDIM         [model, optimizer, epoch, step, ema], or a plain state_dict
ADM          a plain state_dict: published ones are EMA; its trainer writes ema_RATE_STEP.pt beside modelSTEP.pt
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evodiff.checkpoints.pickles import kind, read_edm, read_torch
from evodiff.errors import CheckpointError

Tensors = dict[str, Tensor]

SIGNATURES = {
    "edm": ("model.map_layer0.weight",),
    "score_sde": ("all_modules.0.", "all_modules.1.weight"),
    "ddim": ("temb.dense.0.weight", "conv_in.weight"),
    "guided_diffusion": ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks."),
    "guided_diffusion_classifier": ("time_embed.0.weight", "input_blocks.0.0.weight"),
}
"""Keys, or their beginnings, by which an architecture is known; the first that has all of its own wins."""


@dataclass(frozen=True)
class Weights:
    """A state_dict, the architecture it belongs to, and what else the file says of the network.

    `kind` is `ema` or `raw` where the layout tells them apart, and else `only`.
    """

    architecture: str
    tensors: Tensors
    kind: str
    config: dict[str, Any] = field(default_factory=dict)


def read_weights(path: Path, ema: bool = True) -> Weights:
    """The averaged weights of a file, or those in training where `ema` is false and the file has both.

    Nothing in the file is executed. Raises CheckpointError for a file that is damaged, refused, or of another layout.
    """
    how = kind(path)
    if how == "pickle":
        class_name, config, tensors = read_edm(path)
        if not ema:
            raise CheckpointError(f"{path}: pickles of NVlabs/edm hold EMA weights only; leave `--raw` out.")
        return Weights("edm", _checked(path, tensors), "ema", {"class_name": class_name, **config})
    content = _load_safetensors(path) if how == "safetensors" else read_torch(path)
    tensors = _state_dict(path, content, ema)
    kind_of = "only" if _is_state_dict(content) else "ema" if ema else "raw"
    return Weights(_architecture(path, tensors), _checked(path, tensors), kind_of)


def _load_safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} cannot be read ({e}). It is cut short or damaged; fetch or copy it again."
        ) from e


def _state_dict(path: Path, content: Any, ema: bool) -> Tensors:
    if isinstance(content, Mapping) and {"model", "ema"} <= content.keys() and isinstance(content["model"], Mapping):
        model = _bare(content["model"])
        return _named(path, model, content["ema"]) if ema else model
    if isinstance(content, list | tuple) and content and isinstance(content[0], Mapping):
        if ema and not (len(content) >= 5 and isinstance(content[-1], Mapping)):
            raise CheckpointError(
                f"{path} holds no EMA weights, only those in training; `--raw` takes them all the same."
            )
        return _bare(content[-1] if ema else content[0])
    if _is_state_dict(content):
        if not ema:
            raise CheckpointError(f"{path} holds one set of weights only; leave `--raw` out.")
        return _bare(content)
    if isinstance(content, Mapping) and "state_dict" in content:
        raise CheckpointError(
            f"{path} is a Lightning checkpoint, as latent diffusion models are published. They are used through the "
            "package diffusers: model=lsun_bedroom_ldm or model=sd15."
        )
    what = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        what += f" of {', '.join(sorted(map(str, content))[:6])}"
    raise CheckpointError(f"{path} holds {what}; known are checkpoints of EDM, score_sde, DDIM and guided-diffusion.")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _bare(state_dict: Any) -> Tensors:
    """Without the `module.` that DataParallel puts before every name."""
    return {str(k).removeprefix("module."): v for k, v in dict(state_dict).items()}


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _named(path: Path, model: Tensors, ema: Any) -> Tensors:
    """The model's state_dict with its parameters replaced by the nameless list of averages.

    The list has the parameters that were trained: no buffers, and not the frozen frequencies of a Fourier embedding.
    """
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    names = [name for name in model if name != "sigmas"]
    if isinstance(shadow, list) and len(shadow) == len(names) - 1:
        names = [name for name in names if name != "all_modules.0.W"]
    if not isinstance(shadow, list) or [_shape(model[n]) for n in names] != [_shape(s) for s in shadow]:
        raise CheckpointError(
            f"{path}: its EMA weights do not fit its model ({len(shadow or ())} tensors for {len(names)} parameters). "
            "The file is damaged or of another code base; fetch it again."
        )
    return {**model, **dict(zip(names, shadow, strict=True))}


def _architecture(path: Path, tensors: Tensors) -> str:
    for architecture, keys in SIGNATURES.items():
        if all(any(name.startswith(key) for name in tensors) for key in keys):
            return architecture
    shown = ", ".join(list(tensors)[:3]) or "nothing"
    raise CheckpointError(
        f"{path} holds weights of an unknown network ({shown}, ...); known are {', '.join(SIGNATURES)}. "
        "A model of your own is used through `evodiff.wrap`."
    )


def _checked(path: Path, tensors: Tensors) -> Tensors:
    """Dense, finite, contiguous, in single precision at least, and no larger than the file they came from."""
    total = 0
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(f"{path}: {name} is no dense tensor. The file is damaged or of another code base.")
        total += value.numel() * value.element_size()
    if total > path.stat().st_size:
        raise CheckpointError(
            f"{path} is refused: its {path.stat().st_size:,} bytes claim to hold {total:,} bytes of weights."
        )
    checked: Tensors = {}
    storages = set()
    for name, value in tensors.items():
        if value.is_floating_point():
            value = value.float() if value.element_size() < 4 else value
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"{path}: {name} holds NaN or infinity. The file is damaged; fetch it again.")
        value = value.contiguous()
        storage = value.untyped_storage().data_ptr()
        checked[name] = value.clone() if storage in storages else value  # safetensors keep no tensor under two names
        storages.add(storage)
    return checked
