"""What was recorded of the official networks, computed with ours: one function per architecture."""

import json
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evodiff.guidance import Classifier
from evodiff.models.adapter import ContinuousTime, DiscreteTime, NetworkDenoiser, Process, process
from evodiff.models.guided_diffusion import NoisyClassifier
from evodiff.models.pretrained import Pretrained
from evodiff.schedule import EDM, DiscreteVP, LinearVP, Node
from evodiff.verify.recorded import architecture_of, arguments, network_of

Arrays = Mapping[str, Tensor]
Outputs = Mapping[str, Callable[[], Tensor]]
"""Name of a recorded output -> how to compute it."""


def outputs_of(net: Any, arrays: Arrays, description: Mapping[str, Any]) -> Outputs:
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

    def std() -> Tensor:
        schedule = LinearVP(model["beta_min"], model["beta_max"])
        return a["std"] if "std" in a else torch.tensor([schedule.node(t).sigma for t in a["t"].tolist()])

    @cache
    def out() -> Tensor:
        return net(x, labels)

    return {
        "out": out,
        "eps": out,
        "score": lambda: out() if net.scale_by_sigma else -out() / std().view(-1, 1, 1, 1),
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
