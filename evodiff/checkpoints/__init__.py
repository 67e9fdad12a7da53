"""Files that others published: where they are, how they get here, and how their weights are read as data.

`load` and `Checkpoint` live in `evodiff.checkpoints.checkpoint`; they are imported on first use, so that listing and
fetching files does not import torch.
"""

from typing import TYPE_CHECKING, Any

from evodiff.checkpoints.registry import require

if TYPE_CHECKING:
    from evodiff.checkpoints.checkpoint import Checkpoint, load

__all__ = ["Checkpoint", "load", "require"]


def __getattr__(name: str) -> Any:
    if name in ("Checkpoint", "load"):
        from evodiff.checkpoints import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
