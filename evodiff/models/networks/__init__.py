"""The published networks, rebuilt: the same mathematics and the same `state_dict` keys."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from evodiff.errors import ConfigError

Config = Mapping[str, Any]


def build(architecture: str, config: Config) -> nn.Module:
    """The network of a published checkpoint, with random weights; under `torch.device("meta")`, with none.

    `config` holds the official constructor's arguments:

    - `edm`: keywords of NVlabs/edm's preconditioning class and of its network, and `class_name`, that class
      (EDMPrecond if absent): the `_init_kwargs` of a pickle;
    - `score_sde`, `ddim`: the nested configuration of yang-song/score_sde_pytorch and of ermongroup/ddim: `model` and
      `data` are read;
    - `guided_diffusion`, `guided_diffusion_classifier`: keywords of `UNetModel` and of `EncoderUNetModel`.

    Raises ConfigError for an unknown architecture, or arguments that a network does not have or lacks.
    """
    if architecture not in BUILDERS:
        raise ConfigError(f"architecture={architecture} does not exist; possible: {', '.join(BUILDERS)}.")
    try:
        return BUILDERS[architecture](config)
    except KeyError as e:
        raise ConfigError(f"the configuration of this {architecture} network lacks {e}.") from e


def _edm(config: Config) -> nn.Module:
    from evodiff.models.networks import precond
    from evodiff.models.networks.dhariwal_unet import DhariwalUNet
    from evodiff.models.networks.song_unet import SongUNet

    wrappers = {
        "EDMPrecond": (precond.EDMPrecond, "DhariwalUNet"),
        "VPPrecond": (precond.VPPrecond, "SongUNet"),
        "VEPrecond": (precond.VEPrecond, "SongUNet"),
        "iDDPMPrecond": (precond.IDDPMPrecond, "DhariwalUNet"),
    }
    networks = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
    settings = dict(config)
    settings.pop("use_fp16", None)  # the run's precision decides
    class_name = settings.pop("class_name", "EDMPrecond")
    if class_name not in wrappers:
        raise ConfigError(f"edm: class_name={class_name} does not exist; possible: {', '.join(wrappers)}.")
    wrapper, default = wrappers[class_name]
    model_type = settings.pop("model_type", default)
    if model_type not in networks:
        raise ConfigError(f"edm: model_type={model_type} does not exist; possible: {', '.join(networks)}.")
    channels = settings.pop("img_channels")
    for_wrapper = {key: settings.pop(key) for key in _parameters(wrapper) & set(settings)}
    out_channels = 2 * channels if class_name == "iDDPMPrecond" else channels
    model = _call(networks[model_type], settings | {"in_channels": channels, "out_channels": out_channels})
    return wrapper(model, **for_wrapper)


def _score_sde(config: Config) -> nn.Module:
    from evodiff.models.networks.ncsnpp import NCSNpp

    model, data = dict(config["model"]), config["data"]
    shape = {key: data[key] for key in ("image_size", "num_channels", "centered")}
    _check_only(model, nonlinearity="swish", normalization="GroupNorm", conv_size=3)
    unread = {"attention_type", "beta_min", "beta_max", "ema_rate", "init_scale", "sigma_begin", "sigma_end"}
    return _call(NCSNpp, {key: value for key, value in model.items() if key not in unread} | shape)


def _ddim(config: Config) -> nn.Module:
    from evodiff.models.networks.ddpm_unet import DDPMUNet

    unread = {"type", "var_type", "ema_rate", "ema"}
    settings = {key: value for key, value in config["model"].items() if key not in unread}
    return _call(DDPMUNet, settings | {"image_size": config["data"]["image_size"]})


def _adm(network: str) -> Callable[[Config], nn.Module]:
    def make(config: Config) -> nn.Module:
        from evodiff.models.networks import adm

        settings = {key: value for key, value in config.items() if key not in ("use_checkpoint", "use_fp16")}
        _check_only(settings, dims=2)
        return getattr(adm, network)(_call(adm.ADMConfig, settings))

    return make


BUILDERS: dict[str, Callable[[Config], nn.Module]] = {
    "edm": _edm,
    "score_sde": _score_sde,
    "ddim": _ddim,
    "guided_diffusion": _adm("UNetModel"),
    "guided_diffusion_classifier": _adm("EncoderUNetModel"),
}


def _check_only(settings: dict[str, Any], **only: Any) -> None:
    """Take out what has one value here. Raises ConfigError for a network that was built with another."""
    for key, value in only.items():
        if settings.pop(key, value) != value:
            raise ConfigError(f"{key} of this network differs; only {key}={value} is known here.")


def _parameters(target: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(target).parameters)


def _call(target: Callable[..., Any], settings: Config) -> Any:
    """`target(**settings)`, with arguments it does not have or lacks reported by name."""
    known = inspect.signature(target).parameters
    unknown: Collection[str] = sorted(set(settings) - set(known))
    lacking = [key for key, p in known.items() if p.default is p.empty and key not in settings]
    if unknown or lacking:
        name = getattr(target, "__name__", str(target))
        what = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(lacking)}"
        raise ConfigError(f"{name} {what}; its arguments are {', '.join(known)}.")
    return target(**settings)
