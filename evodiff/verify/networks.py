"""`evodiff verify networks`: outputs recorded from the official networks, repeated with ours.

A golden is NAME.json and NAME.npz: the official class, its arguments, the inputs and the outputs for weights that a
rule draws from the keys of the state_dict (`fill`). Of full-size networks only slices and moments are recorded.
"""

import argparse
import gc
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evodiff.errors import ConfigError, EvodiffError
from evodiff.guidance import Classifier
from evodiff.models.adapter import ContinuousTime, DiscreteTime, NetworkDenoiser, Process, process
from evodiff.models.guided_diffusion import NoisyClassifier
from evodiff.models.networks import build
from evodiff.models.pretrained import Pretrained
from evodiff.paths import ROOT
from evodiff.schedule import EDM, DiscreteVP, LinearVP, Node

GOLDEN = ROOT / "tests" / "golden" / "networks"
TOLERANCE = 2e-5
"""Relative L2. float32 noise is some 2e-6; a wrong epsilon in one kind of norm already shows as 7e-5."""

Arrays = Mapping[str, Tensor]
Outputs = Mapping[str, Callable[[], Tensor]]
"""Name of a recorded output -> how to compute it."""


def architecture_of(cls: str) -> str:
    """The architecture of `evodiff.models.networks.build` for an official class name."""
    architectures = {
        "DDPM": "score_sde",
        "NCSNpp": "score_sde",
        "Model": "ddim",
        "UNetModel": "guided_diffusion",
        "EncoderUNetModel": "guided_diffusion_classifier",
    }
    name = cls.rsplit(".", 1)[-1]
    if name.endswith("Precond"):
        return "edm"
    if name not in architectures:
        raise ConfigError(f"official class {cls} is unknown")
    return architectures[name]


def arguments(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the official constructor was given."""
    return dict(description.get("constructor_kwargs") or description["config"])


def network_of(description: Mapping[str, Any]) -> Any:
    """The filled network of a golden's or manifest's json, in eval mode."""
    architecture = architecture_of(description["cls"])
    config = arguments(description)
    if architecture == "edm":
        config["class_name"] = description["cls"].rsplit(".", 1)[-1]
    with torch.device("meta"):
        net = build(architecture, config)
    net.load_state_dict({key: fill(key, value) for key, value in net.state_dict().items()}, assign=True)
    return net.eval().requires_grad_(False)


def fill(key: str, value: Tensor) -> Tensor:
    """The weights of rule `pcg64-crc32-v1`; constants of the constructor stay as they are."""
    if key.endswith(".resample_filter") or key in ("sigmas", "u") or not value.is_floating_point():
        return value
    random = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    z = random.standard_normal(tuple(value.shape), dtype=np.float32)
    if key.endswith(".map_noise.freqs") or (key == "all_modules.0.W" and value.ndim == 1):
        z *= np.float32(16)
    else:
        z *= np.float32(0.05)
        if key.endswith(".weight") and value.ndim == 1:
            z += np.float32(1)
    return torch.from_numpy(z)


def state_sha256(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        array = np.ascontiguousarray(value.numpy())
        digest.update(f"{key}\0{array.dtype}\0{tuple(array.shape)!r}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()


def inputs_of(arrays: dict[str, Tensor], description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arrays with what only a rule gives: x, and the label of a full-size conditional network."""
    rule, config = description.get("x_rule", ""), arguments(description)
    if "x" not in arrays:
        data = config.get("data", {})
        named = {**data, **config}
        size = next(named[key] for key in ("img_resolution", "image_size") if key in named)
        channels = next(
            named[key] for key in ("img_channels", "in_channels", "num_channels", "channels") if key in named
        )
        z = np.random.Generator(np.random.PCG64(0)).standard_normal((1, channels, size, size), dtype=np.float32)
        x = torch.from_numpy(z)
        if "sqrt(sigma^2" in rule:
            x = x * (arrays["sigma"].reshape(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
        arrays["x"] = x
    index = re.search(r"(?:index|y\s*=)\s*(\d+)", rule)
    if index and config.get("label_dim") and "class_labels" not in arrays:
        arrays["class_labels"] = torch.eye(config["label_dim"])[[int(index[1])]]
    if index and "y" not in arrays:
        arrays["y"] = torch.tensor([int(index[1])])
    return arrays


def edm_outputs(net: Any, a: Arrays) -> Outputs:
    x, sigma, y = a["x"], a["sigma"], a.get("class_labels")
    c = net.coefficients(sigma.reshape(-1, 1, 1, 1))
    return {
        "F_x_in": lambda: c.in_ * x,
        "F_noise_labels": lambda: c.noise.flatten(),
        "F": lambda: net.model(c.in_ * x, c.noise.flatten(), y),
        "D": lambda: net(x, sigma, y),
        "D_scalar_sigma": lambda: net(x, sigma[1], y),
        "D_no_label": lambda: net(x, sigma),
        "D_augment": lambda: net(x, sigma, y, a["augment_labels"]),
    }


def score_sde_outputs(net: Any, a: Arrays, model: Mapping[str, Any]) -> Outputs:
    x = a["x"]
    if "labels" in a:
        labels = a["labels"]
    elif net.fourier:
        labels = model["sigma_min"] * (model["sigma_max"] / model["sigma_min"]) ** a["t"]
    else:
        labels = a["t"] * 999

    @cache
    def out() -> Tensor:
        return net(x, labels)

    return {
        "out": out,
        "eps": out,
        "score": lambda: out() if net.scale_by_sigma else -out() / a["std"].view(-1, 1, 1, 1),
        "out_labels_int": lambda: net(x, a["labels_int"]),
    }


def ddim_outputs(net: Any, a: Arrays) -> Outputs:
    return {
        "eps": lambda: net(a["x"], a["t"]),
        "eps_fractional": lambda: net(a["x"], a["t_fractional"]),
    }


def adm_outputs(net: Any, a: Arrays) -> Outputs:
    y = a["y"] if net.config.num_classes is not None else None

    @cache
    def out() -> Tensor:
        return net(a["x"], a["t"], y)

    return {
        "out": out,
        "eps": lambda: out()[:, : a["x"].shape[1]],
        "out_fractional": lambda: net(a["x"], a["t_fractional"], y),
    }


def classifier_outputs(net: Any, a: Arrays) -> Outputs:
    @cache
    def log_probs(t: str) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x = a["x"].clone().requires_grad_()
            logits = net(x, a[t])
            selected = logits.log_softmax(dim=1)[torch.arange(len(x)), a["y"]]
            return logits, selected, torch.autograd.grad(selected.sum(), x)[0]

    return {
        "logits": lambda: log_probs("t")[0],
        "log_prob_selected": lambda: log_probs("t")[1],
        "grad": lambda: log_probs("t")[2],
        "grad_fractional_t": lambda: log_probs("t_fractional")[2],
    }


def guidance_outputs(path: Path, description: Mapping[str, Any], a: Arrays) -> Outputs:
    """Guided predictions of released samplers, whose two networks are goldens of the same folder.

    `dpm_*`: DPM-Solver's wrapper on a discrete schedule; `cg_*`: diff-sampler's, on EDM's with a continuous one.
    """
    net, classifier = (
        network_of(json.loads(path.with_name(f"{description[part]}.json").read_text()))
        for part in ("model", "classifier")
    )
    x, y, times = a["x"].double(), a["y"], a["t_continuous"].tolist()
    native = DiscreteVP.from_betas(a["betas"].tolist())
    own = process(native, DiscreteTime(len(a["betas"])))
    scaled = process(LinearVP(), ContinuousTime(999), "edm")

    def guided(seen: Process, scale: float) -> Callable[[Tensor, Node, Tensor], Tensor]:
        model = Pretrained(
            lambda labels: NetworkDenoiser(lambda x, t: net(x, t, labels), "eps", seen),
            shape=(x.shape[1], x.shape[2], x.shape[3]),
            classifier=NoisyClassifier(classifier, seen),
        )
        return lambda x, node, y: Classifier(scale)(model, y)(x, node)

    def eps(scale: float) -> Tensor:
        denoise, parts = guided(own, scale), []
        for i, t in enumerate(times):
            node = native.node(t)
            D = denoise(x[i : i + 1], node, y[i : i + 1])
            parts.append((x[i : i + 1] - node.alpha * D) / node.sigma)
        return torch.cat(parts)

    def cg() -> Tensor:
        denoise, rows = guided(scaled, 2.0), zip(a["cg_x"].double(), a["cg_sigma"].tolist(), y, strict=True)
        return torch.cat([denoise(x[None], EDM().node(s), label[None]) for x, s, label in rows]).clamp(-1, 1)

    def of_nodes(value: Callable[[Node], float], nodes: list[Node]) -> Tensor:
        return torch.tensor([value(node) for node in nodes], dtype=torch.float64)

    nodes = [native.node(t) for t in times]
    scaled_nodes = [scaled.native.node(scaled.native.t_at(-math.log(s))) for s in a["cg_sigma"].tolist()]
    return {
        **{f"dpm_eps_scale{scale}": partial(eps, scale) for scale in (0, 2, 8)},
        "dpm_eps_unguided": partial(eps, 0),
        "dpm_alpha": partial(of_nodes, lambda node: node.alpha, nodes),
        "dpm_sigma": partial(of_nodes, lambda node: node.sigma, nodes),
        "dpm_lambda": partial(of_nodes, lambda node: node.lam, nodes),
        "dpm_t_input": partial(of_nodes, own.label, nodes),
        "dpm_inverse_lambda": partial(of_nodes, lambda node: native.t_at(node.lam), nodes),
        "cg_D_guidance2": cg,
        "cg_c_noise": partial(of_nodes, scaled.label, scaled_nodes),
    }


@dataclass(frozen=True)
class Result:
    """Outputs compared in one file; the one that differs most, and by how much.

    `same_state`: the weights are bit for bit those of the recording. It alone decides nothing: constants that the
    constructor computes (iDDPM's `u`) differ in the last bit from one CPU's sine to another's.
    """

    compared: int
    worst: float
    where: str
    same_state: bool = True

    @property
    def ok(self) -> bool:
        return self.compared > 0 and self.worst <= TOLERANCE


def verify(path: Path) -> Result:
    """One golden, given its json. Raises ConfigError for files that are no golden."""
    try:
        description = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as file:
            arrays = {key: torch.from_numpy(value) for key, value in dict(file).items()}
        same_state = True
        if "classifier" in description:
            outputs = guidance_outputs(path, description, arrays)
        else:
            net = network_of(description)
            outputs = _outputs(net, inputs_of(arrays, description), description)
            same_state = state_sha256(net) == description.get("state_sha256")
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"no golden of a network ({type(e).__name__}: {e}); expected NAME.json and NAME.npz") from e
    errors: dict[str, float] = {}
    for name, compute in {"x": lambda: arrays["x"], **outputs}.items():
        recorded = [key for key in (name, f"{name}_slice") if key in arrays and (key, name) != ("x", "x")]
        if recorded:
            with torch.no_grad():
                errors[name] = _compare(name, compute(), arrays)
    where = max(errors, key=lambda name: errors[name], default="nothing to compare")
    return Result(len(errors.keys() - {"x"}), errors.get(where, float("inf")), where, same_state)


def _outputs(net: Any, arrays: Arrays, description: Mapping[str, Any]) -> Outputs:
    match architecture_of(description["cls"]):
        case "edm":
            return edm_outputs(net, arrays)
        case "score_sde":
            return score_sde_outputs(net, arrays, arguments(description)["model"])
        case "ddim":
            return ddim_outputs(net, arrays)
        case "guided_diffusion":
            return adm_outputs(net, arrays)
        case _:
            return classifier_outputs(net, arrays)


def _compare(name: str, ours: Tensor, arrays: Arrays) -> float:
    """Relative L2 of an output; of its recorded slice and moments where only those exist. nan counts as inf."""
    errors = []
    if name in arrays:
        errors.append(_relative(ours, arrays[name]))
    if f"{name}_slice" in arrays:
        part = arrays[f"{name}_slice"]
        errors.append(_relative(ours[tuple(slice(n) for n in part.shape)], part))
        exact = ours.double()
        std, norm = exact.std(correction=0), exact.norm()
        for moment, value, unit in (("mean", exact.mean(), std), ("std", std, std), ("l2", norm, norm)):
            if f"{name}_{moment}" in arrays:
                errors.append(((value - arrays[f"{name}_{moment}"]).abs() / unit).item())
    return max(e if e == e else float("inf") for e in errors)


def _relative(ours: Tensor, expected: Tensor) -> float:
    if ours.shape != expected.shape:
        return float("inf")
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evodiff verify networks", description=__doc__)
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="folder of NAME.json and NAME.npz, or one of them")
    golden: Path = parser.parse_args(argv).golden
    paths = sorted(golden.glob("*.json")) if golden.is_dir() else [golden.with_suffix(".json")]
    if not paths:
        raise ConfigError(f"{golden} holds no goldens of networks. Expected NAME.json and NAME.npz beside it.")
    failed = False
    for path in paths:
        try:
            r = verify(path)
            ok, text = (
                r.ok,
                f"{r.compared} outputs  worst relative L2 {r.worst:.1e} in {r.where} (allowed {TOLERANCE:.0e})",
            )
            text += "" if r.same_state else "  weights not bit for bit the recorded ones"
        except EvodiffError as e:
            ok, text = False, str(e)
        failed |= not ok
        print(f"{'ok  ' if ok else 'FAIL'}  {path.stem:<40} {text}", flush=True)
        gc.collect()  # one full-size network at a time
    return int(failed)
