"""The device that computes: by its name, and as records call it."""

import platform
import textwrap
from itertools import chain

import torch
from torch import nn

from evodiff.errors import ConfigError

KINDS = ("cpu", "cuda", "mps", "xpu")


def device_for(name: str | torch.device) -> str:
    """`auto` is the first CUDA device, or the CPU: MPS has no float64, the default of the state.

    Raises ConfigError for a device this machine lacks.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(str(name)).type not in KINDS:
            raise ConfigError(f"device={name} is not supported. Use device=auto, or one of {', '.join(KINDS)}.")
        torch.empty(1, device=str(name))
    except (RuntimeError, AssertionError, ValueError, ImportError) as e:
        reason = textwrap.shorten(str(e), 120, placeholder=" ...")  # torch lists all backends there are
        raise ConfigError(f"device={name} is not available here ({reason}). Use device=auto.") from e
    return str(name)


def widest_float(device: str | torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has no other."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def moved(network: nn.Module, device: str | torch.device) -> nn.Module:
    """A network, on a device. Its float64 numbers become what the device has."""
    for tensor in chain(network.parameters(), network.buffers()):
        if tensor.dtype == torch.float64:
            tensor.data = tensor.data.to(widest_float(device))
    return network.to(device)


def finished(device: str) -> None:
    """Wait until the device is."""
    match torch.device(device).type:
        case "cuda":
            torch.cuda.synchronize(device)
        case "mps":
            torch.mps.synchronize()


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
