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
    if class_name == "EDMPrecond":  # limits of the network that no sampler of ours reads
        settings.pop("sigma_min", None), settings.pop("sigma_max", None)
    out_channels = 2 * channels if class_name == "iDDPMPrecond" else channels
    model = _call(networks[model_type], settings | {"in_channels": channels, "out_channels": out_channels})
    return wrapper(model, **for_wrapper)


def _score_sde(config: Config) -> nn.Module:
    from evodiff.models.networks.ncsnpp import NCSNpp

    model, data = dict(config["model"]), config["data"]
    shape = {key: data[key] for key in ("image_size", "num_channels", "centered")}
    training_only = {"beta_min", "beta_max", "ema_rate", "nonlinearity", "normalization", "init_scale", "conv_size"}
    unread = training_only | {"attention_type", "sigma_begin", "sigma_end"}
    return _call(NCSNpp, {key: value for key, value in model.items() if key not in unread} | shape)


def _ddim(config: Config) -> nn.Module:
    from evodiff.models.networks.ddpm_unet import DDPMUNet

    unread = {"type", "var_type", "ema_rate", "ema"}
    settings = {key: value for key, value in config["model"].items() if key not in unread}
    return _call(DDPMUNet, settings | {"image_size": config["data"]["image_size"]})


def _adm(network: str) -> Callable[[Config], nn.Module]:
    def make(config: Config) -> nn.Module:
        from evodiff.models.networks import adm

        unread = {"use_checkpoint", "use_fp16", "dims"}
        settings = {key: value for key, value in config.items() if key not in unread}
        return getattr(adm, network)(_call(adm.ADMConfig, settings))

    return make


BUILDERS: dict[str, Callable[[Config], nn.Module]] = {
    "edm": _edm,
    "score_sde": _score_sde,
    "ddim": _ddim,
    "guided_diffusion": _adm("UNetModel"),
    "guided_diffusion_classifier": _adm("EncoderUNetModel"),
}


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
