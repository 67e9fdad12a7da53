"""Recordings of the official networks: which network they are of, its weights by rule, and its inputs."""

import hashlib
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from evodiff.errors import ConfigError
from evodiff.models.networks import build

MALFORMED = (
    *(OSError, EOFError, BadZipFile, zlib.error),
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
)
"""What reading a golden raises, and computing with it, if it is none: arrays of other shapes, words for numbers."""


def golden_files(path: Path) -> tuple[Path, Path]:
    """NAME.json and NAME.npz, of either one of them or of NAME, which may have dots itself."""
    name = path.stem if path.suffix in (".npz", ".json") else path.name
    return path.with_name(f"{name}.json"), path.with_name(f"{name}.npz")


def architecture_of(cls: str) -> str:
    """The architecture of `evodiff.models.networks.build` for an official class name."""
    architectures = {
        "DDPM": "score_sde",
        "NCSNpp": "score_sde",
        "Model": "ddim",
        "UNetModel": "guided_diffusion",
        "EncoderUNetModel": "guided_diffusion_classifier",
    }
    name = str(cls).rsplit(".", 1)[-1]
    if name.endswith("Precond"):
        return "edm"
    if name not in architectures:
        raise ConfigError(f"official class {cls} is unknown")
    return architectures[name]


def arguments(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the official constructor was given."""
    return dict(description.get("constructor_kwargs") or description["config"])


def network_of(description: Mapping[str, Any]) -> Any:
    """The filled network of a golden's or manifest's json, in eval mode."""
    architecture = architecture_of(description["cls"])
    config = arguments(description)
    if architecture == "edm":
        config["class_name"] = description["cls"].rsplit(".", 1)[-1]
    with torch.device("meta"):
        net = build(architecture, config)
    net.load_state_dict({key: fill(key, value) for key, value in net.state_dict().items()}, assign=True)
    return net.eval().requires_grad_(False)


def fill(key: str, value: Tensor) -> Tensor:
    """The weights of rule `pcg64-crc32-v1`; constants of the constructor stay as they are."""
    if key.endswith(".resample_filter") or key in ("sigmas", "u") or not value.is_floating_point():
        return value
    random = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    z = random.standard_normal(tuple(value.shape), dtype=np.float32)
    if key.endswith(".map_noise.freqs") or (key == "all_modules.0.W" and value.ndim == 1):
        z *= np.float32(16)
    else:
        z *= np.float32(0.05)
        if key.endswith(".weight") and value.ndim == 1:
            z += np.float32(1)
    return torch.from_numpy(z)


def state_sha256(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        array = np.ascontiguousarray(value.numpy())
        digest.update(f"{key}\0{array.dtype}\0{tuple(array.shape)!r}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()


def inputs_of(arrays: dict[str, Tensor], description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arrays with what only a rule gives: x, a scalar input, the label of a full-size conditional network."""
    rule, config = description.get("x_rule", ""), arguments(description)
    for name, value in re.findall(r"\b(t|sigma)\s*=\s*([\d.]*\d)", rule):
        arrays.setdefault(name, torch.tensor([float(value)]))
    if "x" not in arrays:
        data = config.get("data", {})
        named = {**data, **config}
        size = next(named[key] for key in ("img_resolution", "image_size") if key in named)
        channels = next(
            named[key] for key in ("img_channels", "in_channels", "num_channels", "channels") if key in named
        )
        z = np.random.Generator(np.random.PCG64(0)).standard_normal((1, channels, size, size), dtype=np.float32)
        x = torch.from_numpy(z)
        if "sqrt(sigma^2" in rule:
            x = x * (arrays["sigma"].reshape(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
        arrays["x"] = x
    index = re.search(r"(?:index|y\s*=)\s*(\d+)", rule)
    if index and config.get("label_dim") and "class_labels" not in arrays:
        arrays["class_labels"] = torch.eye(config["label_dim"])[[int(index[1])]]
    if index and "y" not in arrays:
        arrays["y"] = torch.tensor([int(index[1])])
    return arrays
