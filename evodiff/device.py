"""The device that computes: by its name, and as records call it."""

import platform

import torch

from evodiff.errors import ConfigError


def device_for(name: str | torch.device) -> str:
    """`auto` is the first CUDA device, or the CPU: MPS has no float64, the default of the state.

    Raises ConfigError for a device this machine lacks.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=str(name))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ConfigError(f"device={name} is not available here ({str(e).splitlines()[0]}). Use device=auto.") from e
    return str(name)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
