"""Solvers of other packages, by name: `solver=NAME` on the command line, in tables and in `evodiff.sample`.

A package names the module that defines its solvers in its pyproject.toml,

    [project.entry-points."evodiff.solvers"]
    my_solver = "my_package.solvers"

and there the decorator gives each of them its name:

    @register_solver("my_solver")
    @dataclass(frozen=True)
    class MySolver(Multistep): ...

Once the package is installed that is all. In a script or a notebook the decorator alone is enough.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from evodiff.errors import ConfigError
from evodiff.paths import CONFIGS
from evodiff.solvers.base import Solver

ENTRY_POINTS = "evodiff.solvers"

S = TypeVar("S", bound=type[Solver])
_registered: dict[str, dict[str, Any]] = {}


def register_solver(name: str) -> Callable[[S], S]:
    """A class decorator: the solver is chosen by `solver=name`, and its fields are set by `solver.<field>=`.

    Raises ConfigError for a name that is taken, and for what is no solver that can be built by its name.
    """

    def register(solver: S) -> S:
        if not (isinstance(solver, type) and issubclass(solver, Solver) and dataclasses.is_dataclass(solver)):
            raise ConfigError(f"register_solver({name!r}): {solver!r} is no dataclass derived from evodiff's Solver.")
        if "<locals>" in solver.__qualname__:
            raise ConfigError(f"register_solver({name!r}): {solver.__qualname__} must be at the top of its module.")
        config = {"_target_": f"{solver.__module__}.{solver.__qualname__}", **_fields(solver)}
        other = _registered.get(name, config)["_target_"]
        if (CONFIGS / "solver" / f"{name}.yaml").exists() or other != config["_target_"]:
            raise ConfigError(f"register_solver({name!r}): there is a solver of that name; choose another one.")
        _registered[name] = config
        return solver

    return register


def registered() -> Mapping[str, Mapping[str, Any]]:
    """The registered solvers: of each name its configuration, `_target_` and the fields with their defaults."""
    _load_entry_points()
    return _registered


def publish_solvers() -> None:
    """Make them choices of the group `solver` in Hydra's configurations."""
    from hydra.core.config_store import ConfigStore

    for name, config in registered().items():
        ConfigStore.instance().store(group="solver", name=name, node=dict(config), provider="evodiff")


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as e:  # whatever another package does wrong, our own solvers go on working
            warnings.warn(f"the solvers of {entry.value} are left out: {type(e).__name__}: {e}", stacklevel=2)


def _fields(solver: type[Any]) -> dict[str, Any]:
    """Fields that a command line can set, with their defaults; `???` where there is none."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(solver):
        if not field.init:
            continue
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            fields[field.name] = "???"
        elif isinstance(field.default, bool | int | float | str | None):
            fields[field.name] = field.default
    return fields
