"""Which of torchrun's processes this is."""

import os

from evodiff.errors import ConfigError


def rank() -> int:
    """This process's number under torchrun; 0 is the one that scores, and the only one elsewhere."""
    return _number("RANK", 0) if processes() > 1 else 0


def processes() -> int:
    """How many torchrun started; 1 elsewhere."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """A number of the environment, which schedulers of other kinds may leave empty. Raises ConfigError."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(
            f"the environment has {name}={text}, where torchrun puts a number. Start it by torchrun, or unset {name}."
        )
    return int(text)


def use_own_gpu() -> None:
    """Let `cuda` mean the GPU of this rank."""
    import torch

    if processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
