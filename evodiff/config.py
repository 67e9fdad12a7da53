"""Hydra configurations: composing them, building what they name, and saying what was misspelt."""

import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import hydra
import hydra.utils
import yaml
from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evodiff.errors import ConfigError, EvodiffError
from evodiff.launchers import LAUNCHERS, register_launchers
from evodiff.paths import CONFIGS, check_checkout
from evodiff.plugins import publish_solvers, registered

LARGEST_SEED = 2**32 - 1
"""torch's generator on the CPU takes the lower 32 bits: larger ones would repeat the images of others."""


def compose(root: str, overrides: Sequence[str] = ()) -> DictConfig:
    """`configs/<root>.yaml` with overrides in Hydra's syntax, resolved.

    The chosen file of each group is kept as its `name`. Raises ConfigError, naming the nearest valid key or choice.
    """
    return _compose(root, tuple(map(str, overrides)))[0].copy()  # reference_run=[3] gives a number


def compose_hydra(root: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra itself is told by the same configuration and overrides: its launcher and sweeper."""
    return _compose(root, tuple(overrides))[1].copy()


@cache
def _compose(root: str, overrides: tuple[str, ...]) -> tuple[DictConfig, DictConfig]:
    """Our part and Hydra's."""
    check_checkout()
    _check(root, overrides)
    try:
        with _own_hydra(), hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            publish_solvers()
            cfg = hydra_compose(root, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(_explain(root, overrides, e)) from e
    except yaml.YAMLError as e:
        raise ConfigError(f"a configuration cannot be read: {' '.join(str(e).split())}. Mend it.") from e
    return _named(cfg, OmegaConf.to_container(cfg.hydra.runtime.choices)), cfg.hydra


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Inside a sweep, or a program that uses Hydra itself, it is already at work, and allows one at a time."""
    outer, Singleton._instances = Singleton._instances, _singletons()
    try:
        yield
    finally:
        Singleton._instances = outer


@cache
def _singletons() -> dict[type, Any]:
    """Hydra's global state, apart from that of a program that uses it too, with our launchers in place of its own."""
    outer, Singleton._instances = Singleton._instances, Singleton.get_state()["instances"]
    try:
        GlobalHydra.instance().clear()
        Plugins.instance()  # looks for plugins, which register their launchers
        register_launchers()
        return Singleton._instances
    finally:
        Singleton._instances = outer


def _named(cfg: DictConfig, choices: Any) -> DictConfig:
    """The configuration without Hydra's own part, with the chosen file of each group as its `name`."""
    OmegaConf.set_readonly(cfg, False)
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        missing = sorted(OmegaConf.missing_keys(own))
        OmegaConf.resolve(own)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{str(e).splitlines()[0]}. Give its value in place of the ${{...}}.") from e
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, for it has no default. Add {missing[0]}=...")
    OmegaConf.set_struct(own, False)
    for group, choice in choices.items():
        if group in own and choice:
            if not isinstance(own[group], DictConfig):
                raise ConfigError(f"{group}/{choice}.yaml is no mapping of fields: expected `_target_: ...`, ...")
            own[group] = {"name": choice, **own[group]}
    return own


def build(config: Any, *args: Any, **kwargs: Any) -> Any:
    """What a configuration's `_target_` makes of its fields. Raises ConfigError."""
    fields: Any = OmegaConf.to_container(config) if isinstance(config, DictConfig) else dict(config)
    name = fields.pop("name", fields.get("_target_"))
    if not isinstance(fields.get("_target_"), str):
        raise ConfigError(f"{name} has no _target_: its configuration must name a class or function to build.")
    try:
        return hydra.utils.instantiate(fields, *args, _convert_="all", **kwargs)
    except HydraException as e:
        cause: BaseException = e
        while cause.__cause__ is not None and not isinstance(cause, EvodiffError):
            cause = cause.__cause__
        if isinstance(cause, EvodiffError):
            raise cause from None
        raise ConfigError(f"{name} cannot be built: {' '.join(str(cause).split())}") from e


def essential(config: Any) -> Any:
    """A configuration without the fields that only repeat the defaults of their `_target_`.

    What remains names a run, so that a new field with a default leaves the runs of yesterday where they are.
    """
    if isinstance(config, Mapping):
        defaults: Mapping[str, inspect.Parameter] = {}
        if "_target_" in config:
            defaults = _parameters(config["_target_"])
        return {
            key: essential(value)
            for key, value in config.items()
            if key not in defaults or _plain(defaults[key].default) != _plain(value)
        }
    return [essential(value) for value in config] if isinstance(config, list | tuple) else config


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(pkgutil.resolve_name(target)).parameters
    except (ImportError, AttributeError, ValueError, TypeError) as e:
        raise ConfigError(
            f"_target_: {target} is no class or function that can be imported ({e}). Install its package, or name its "
            f"folder in PYTHONPATH."
        ) from e


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def choices(group: str) -> list[str]:
    """The files of a config group, without extension, and the solvers of other packages. Raises ConfigError without
    a checkout."""
    check_checkout()
    others = registered() if group == "solver" else ()
    return sorted({*(path.stem for path in (CONFIGS / group).glob("*.yaml")), *others})


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean ...?`, or an empty string if nothing is near; as papers write it, in capitals or with a hyphen."""

    def plain(name: str) -> str:
        return name.lower().replace("-", "_")

    by_plain = {plain(name): name for name in known}
    close = difflib.get_close_matches(plain(word), by_plain, n=1, cutoff=0.5)
    return f" Did you mean {by_plain[close[0]]}?" if close else ""


def parse_range(text: str) -> range:
    """`first-last` or a single number: an inclusive range of seeds. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(text).strip())
    if not match:
        raise ConfigError(f"seeds={text} is no range of seeds. Expected first-last, both at least 0, like seeds=0-999.")
    first = int(match[1])
    last = int(match[2] or first)
    if last < first:
        raise ConfigError(f"seeds={text} is empty: {last} is before {first}. Expected first-last, like seeds=0-999.")
    if last > LARGEST_SEED:
        raise ConfigError(f"seeds={text} is impossible: {last} is too large. Seeds are at most {LARGEST_SEED}.")
    return range(first, last + 1)


def _check(root: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for what Hydra lets through, or answers with a traceback."""
    known = keys(root)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            continue
        key = override.key_or_group
        head = key.split(".")[0]
        if not key or key == "hydra":
            raise ConfigError(f"{text!r} is no override. Expected key=value, like nfe=10 or hydra/launcher=joblib.")
        if override.is_delete() and key in known:
            raise ConfigError(f"{text} takes away what a run needs. Leave it out, or set {key}=...")
        named = [part for part in key.split(".")[1:] if part == "name" or (part[:1] == "_" and part != "_target_")]
        if override.package is not None or ((CONFIGS / head).is_dir() and named):
            raise ConfigError(f"{text} cannot be set. What is chosen of a group is group=choice, like solver=ddim.")
        if (override.is_add() or override.is_force_add()) and "/" not in head and head not in known | {"hydra"}:
            raise ConfigError(f"{head} is no key of the configuration.{nearest(head, known)}")
        if ((CONFIGS / key).is_dir() or key == "hydra/launcher") and not override.is_sweep_override():
            value, possible = text.partition("=")[2], choices(key) if key != "hydra/launcher" else list(LAUNCHERS)
            if override.value() not in possible:
                raise ConfigError(
                    f"{key}={value} does not exist.{nearest(value, possible)} Possible: {', '.join(possible)}."
                )


def _explain(root: str, overrides: Sequence[str], error: Exception) -> str:
    """One line on what is wrong with the overrides: Hydra's own words only where nothing better is known."""
    known = keys(root)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            return (
                f"{text!r} is no override. Expected key=value, like nfe=10 or solver=ddim; what holds a = itself needs "
                f"quotes, like reference_run=['solver=unipc_3','nfe=200']."
            )
        key = override.key_or_group
        if override.is_sweep_override() and "Ambiguous value" in str(error):
            listed = f"write '{key}=[{text.partition('=')[2]}]'"
            if root == "table":
                is_list = key in ("rows", "nfe") or key.startswith("table.")
                return f"{text} are several values: {listed if is_list else f'{key} takes one'}."
            if key.split(".")[0] == "hydra":
                return f"{text} are several values: {key} takes one."
            default: Any = OmegaConf.load(CONFIGS / f"{root}.yaml")
            is_list = isinstance(default.get(key), ListConfig)
            or_list = f", or for a list {listed}" if is_list else ""
            return f"{text} are several values: add -m to sweep over them{or_list}."
        if (CONFIGS / key).is_dir() and key not in known:
            if root == "table":
                return (
                    f"{key} is a key of runs, which a table has in its base and rows: give these in whole, like "
                    f"'table.base=[{text},...]', or make a run of a cell by what `evodiff show` prints."
                )
            return f"{key} is no key of a run: `evodiff {key} {text.partition('=')[2]}` takes its name."
        if override.is_add() or (CONFIGS / key).is_dir() or key == "hydra/launcher":
            continue
        if key.startswith("hydra.launcher."):
            _check_launcher_field(key.split(".")[2], overrides)
        if key.split(".")[0] == "hydra":
            continue
        head = key.split(".")[0]
        if key not in known and not (head in known and "." not in key):
            fields = _fields(root, overrides, head) if "." in key else known
            if key not in fields:
                possible = ", ".join(sorted(fields)) or f"{head} has no fields"
                hint = nearest(key, fields) or _choice_with(key)
                return f"{key} is no key of the configuration.{hint} Possible: {possible}."
    return " ".join(str(error).split())


def _check_launcher_field(name: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for what the chosen launcher does not have, or has as a mapping to add to."""
    chosen = next((text.partition("=")[2] for text in overrides if text.startswith("hydra/launcher=")), "basic")
    known = asdict(LAUNCHERS[chosen if chosen in LAUNCHERS else "basic"])  # of several, Hydra's words follow
    if name not in known:
        possible = ", ".join(known)
        raise ConfigError(
            f"hydra.launcher.{name} is no field of hydra/launcher={chosen}.{nearest(name, known)} Possible: {possible}."
        )
    if isinstance(known[name], Mapping):
        raise ConfigError(f"hydra.launcher.{name} is a mapping: add to it, like +hydra.launcher.{name}.key=value.")


def _choice_with(key: str) -> str:
    """Which choices of the group have such a field."""
    group, _, field = key.partition(".")
    having = [path.stem for path in sorted((CONFIGS / group).glob("*.yaml")) if field in OmegaConf.load(path)]
    return f" It is one of {group}={' or '.join(having[:3])}: set that, too." if having else ""


@cache
def keys(root: str) -> frozenset[str]:
    """The keys of configs/<root>.yaml, those of its groups included. Raises ConfigError without a checkout."""
    check_checkout()
    raw = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{root}.yaml"))
    assert isinstance(raw, dict)
    groups = {key for entry in raw["defaults"] if isinstance(entry, dict) for key in entry if " " not in str(key)}
    return frozenset(({str(key) for key in raw} | groups) - {"defaults", "hydra"})


def _fields(root: str, overrides: Sequence[str], group: str) -> Set[str]:
    """Valid `group.field` keys under the chosen file of a group."""
    raw = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{root}.yaml"))
    assert isinstance(raw, dict)
    choice = {k: v for entry in raw["defaults"] if isinstance(entry, dict) for k, v in entry.items()}.get(group)
    for text in overrides:
        key, _, value = text.partition("=")
        choice = value if key == group else choice
    path = CONFIGS / group / f"{choice}.yaml"
    if not path.exists() and (group != "solver" or choice not in registered()):
        return keys(root)
    fields = OmegaConf.load(path) if path.exists() else registered()[str(choice)]
    return {f"{group}.{key!s}" for key in fields if key != "_target_"}
