"""The networks of score_sde as denoisers (Song et al., arXiv 2011.13456)."""

from collections.abc import Callable
from pathlib import Path

import torch

from evodiff.models.adapter import ContinuousTime, NetworkDenoiser, NoiseLevel, NoiseLevelIndex, process
from evodiff.models.loading import load_network, schedule_of
from evodiff.models.pretrained import Pretrained
from evodiff.schedule import EDM, Node


def score_sde(checkpoint: str, schedule: str = "own", device: torch.device | str = "cpu") -> Pretrained:
    """A VP network (it predicts the noise at label 999 t), or a VE one (the score at label sigma, or with a positional
    embedding at the index of sigma), by name or file.

    `schedule`: `own`, or `edm` for the same noise levels on EDM's.
    """
    net, file = load_network(checkpoint, "score_sde", device)
    data, native = file.config["data"], schedule_of(file.schedule)
    data_range = (-1.0, 1.0) if data["centered"] else (0.0, 1.0)
    label: Callable[[Node], float] = ContinuousTime(999)
    if isinstance(native, EDM):
        label = NoiseLevel() if net.fourier else NoiseLevelIndex(native.t_end, native.t_start, len(net.sigmas))
    predicts = "score" if file.config["model"].get("scale_by_sigma") else "eps"
    denoiser = NetworkDenoiser(net, predicts, process(native, label, schedule, data_range))
    return Pretrained(
        lambda labels: denoiser,
        shape=(data["num_channels"], data["image_size"], data["image_size"]),
        files={Path(checkpoint).name: file.sha256},
        device=torch.device(device),
        networks=(net,),
    )
