"""Fields of a wrong type or value, refused where a solver, schedule or guidance is made: named, with what may be."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from evodiff.errors import ConfigError


def refuse(solver: Any, name: str, possible: str, why: str = "is impossible") -> NoReturn:
    """Raises ConfigError for the value that field `name` has."""
    raise ConfigError(f"{type(solver).__name__}: {name}={shown(getattr(solver, name))} {why}; possible: {possible}")


def shown(value: Any) -> str:
    """What a message says was given: all of it where that is short, else its kind, for it may hold whole images."""
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else f"<{type(value).__name__}>"


def check_known(solver: Any, name: str, known: Sequence[Any], possible: str | None = None) -> None:
    """The field must be one of `known`, of the same type."""
    value = getattr(solver, name)
    if not any(type(value) is type(k) and value == k for k in known):
        refuse(solver, name, possible or ", ".join(map(str, known)), "does not exist")


def check_number(solver: Any, name: str, allowed: Callable[[float], bool], possible: str) -> None:
    """The field must be a finite number, and an allowed one. None only where the type of the field has it."""
    value = getattr(solver, name)
    if value is None and matches(None, typing.get_type_hints(type(solver))[name]):
        return
    if not matches(value, float) or not allowed(value):
        refuse(solver, name, possible)


def check_types(solver: Any) -> None:
    """Every field must be of its annotated type; annotations that say nothing to this module allow anything."""
    try:
        hints = typing.get_type_hints(type(solver))
    except NameError:  # a name that only a type checker sees, in somebody's own solver
        return
    for field in dataclasses.fields(solver):
        if not matches(getattr(solver, field.name), hints[field.name]):
            refuse(solver, field.name, in_words(hints[field.name]))


def matches(value: Any, hint: Any) -> bool:
    """Whether a value may stand in a field annotated so: a whole number is a number, a list stands for a tuple."""
    if isinstance(hint, types.UnionType):
        return any(matches(value, option) for option in hint.__args__)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(matches(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint in (bool, int, str, types.NoneType):
        return type(value) is hint
    if hint is typing.Any:
        return True
    if getattr(hint, "_is_protocol", False):
        return not isinstance(value, bool | int | float | str | list | dict | None)
    return not isinstance(hint, type) or isinstance(value, hint)


WORDS = {bool: "true, false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


def in_words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return ", or ".join(in_words(option) for option in hint.__args__)
    if typing.get_origin(hint) is tuple:
        return "a list of whole numbers" if typing.get_args(hint)[0] is int else "a list"
    return WORDS.get(hint) or f"a {hint.__name__}"
