"""Fast diffusion sampling: `evodiff.sample` makes images, `evodiff.wrap` makes a model of your own network,
`evodiff.guidance` guides it, `evodiff.register_solver` names a solver of yours. Everything else is in the other
submodules."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evodiff import guidance
    from evodiff.api import sample
    from evodiff.models.wrap import wrap
    from evodiff.plugins import register_solver

__all__ = ["guidance", "register_solver", "sample", "wrap"]

_HOMES = {"register_solver": "evodiff.plugins", "sample": "evodiff.api", "wrap": "evodiff.models.wrap"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: importing evodiff does not import torch
        return getattr(import_module(_HOMES[name]), name)
    if name == "guidance":
        return import_module("evodiff.guidance")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
