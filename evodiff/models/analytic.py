"""Exact denoisers: a mixture of isotropic Gaussians, whose posterior mean is known in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evodiff.device import widest_float
from evodiff.errors import ConfigError
from evodiff.models.pretrained import Pretrained
from evodiff.schedule import EDM, Node, NoiseSchedule


class GaussianMixture:
    """D(x, t) = E[x_0 | x_t = x] for x_0 ~ sum_k weight_k N(mean_k, std_k^2 I).

    D = sum_k w_k(x) (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)), v_k = alpha^2 s_k^2 + sigma^2, with
    w_k(x) proportional to weight_k N(x; alpha mu_k, v_k I). means [K, C, H, W], stds [K], weights [K].
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor, schedule: NoiseSchedule | None = None):
        self.means, self.stds, self.weights = means, stds, weights
        self.schedule = schedule or EDM()
        if not hasattr(self.schedule, "node"):
            raise ConfigError(
                f"schedule={schedule!r} is no noise schedule; expected an object of evodiff.schedule, in a "
                f"configuration like model.schedule={{_target_: evodiff.schedule.LinearVP}}"
            )

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        means = self.means.to(x.device, x.dtype).flatten(1)
        stds, weights = self.stds.to(x.device, x.dtype), self.weights.to(x.device, x.dtype)
        flat = x.flatten(1)
        v = node.alpha**2 * stds**2 + node.sigma**2
        # |x|^2 - 2 x.mu + |mu|^2 is one matrix product, but in float32 it cancels what a small v then amplifies.
        mode = "use_mm_for_euclid_dist" if x.dtype == torch.float64 else "donot_use_mm_for_euclid_dist"
        square = torch.cdist(flat, node.alpha * means, compute_mode=mode) ** 2
        w = torch.softmax(weights.log() - 0.5 * flat.shape[1] * v.log() - 0.5 * square / v, dim=1)
        gain = node.alpha * stds**2 / v
        D = (w @ (means * (1 - gain * node.alpha)[:, None])) + (w @ gain)[:, None] * flat
        return D.view_as(x)


def mixture(
    shape: Sequence[int] = (3, 8, 8),
    components: int = 10,
    std: float = 0.1,
    seed: int = 0,
    schedule: NoiseSchedule | None = None,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """A mixture of `components` Gaussians with random means in [-1, 1]: every solver's error can be known exactly."""
    if components < 1 or std <= 0:
        raise ConfigError(f"mixture: components={components} must be at least 1 and std={std} above 0")
    random = torch.Generator("cpu").manual_seed(seed)
    means = 2 * torch.rand(components, *shape, generator=random, dtype=torch.float64, device="cpu") - 1
    means = means.to(device, widest_float(device))
    stds = torch.full((components,), std, dtype=means.dtype, device="cpu").to(device)
    denoiser = GaussianMixture(means, stds, torch.full_like(stds, 1 / components), schedule)
    channels, height, width = shape
    return Pretrained(lambda labels: denoiser, shape=(channels, height, width), device=torch.device(device))
