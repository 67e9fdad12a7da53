"""The DDPM networks of ermongroup/ddim as denoisers (arXiv 2006.11239, 2010.02502)."""

from pathlib import Path

import torch

from evodiff.models.adapter import DiscreteTime, NetworkDenoiser, process
from evodiff.models.loading import discrete_schedule_of, load_network
from evodiff.models.pretrained import Pretrained


def ddim(
    checkpoint: str, schedule: str = "own", whole_labels: bool = False, device: torch.device | str = "cpu"
) -> Pretrained:
    """CelebA, CIFAR-10 or LSUN by name or file. `schedule`: `own`, or `edm` for the same noise levels on EDM's.

    `whole_labels` rounds the network's time label to a trained one, as DDIM's own sampler has them.
    """
    net, file = load_network(checkpoint, "ddim", device)
    native, model, size = discrete_schedule_of(file.schedule), file.config["model"], file.config["data"]["image_size"]
    label = DiscreteTime(len(native.log_alphas), whole_labels)
    denoiser = NetworkDenoiser(net, "eps", process(native, label, schedule))
    return Pretrained(
        lambda labels: denoiser,
        shape=(model["in_channels"], size, size),
        files={Path(checkpoint).name: file.sha256},
        device=torch.device(device),
        networks=(net,),
    )
