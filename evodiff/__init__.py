"""Fast diffusion sampling. `evodiff.wrap` makes a model of your own network; everything else is in the submodules."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evodiff.models.wrap import wrap

__all__ = ["wrap"]


def __getattr__(name: str) -> Any:
    if name == "wrap":  # on first use: importing evodiff does not import torch
        from evodiff.models.wrap import wrap

        return wrap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
