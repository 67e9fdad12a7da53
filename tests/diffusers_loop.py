"""What a diffusers pipeline does with a scheduler, on a perfect network of a mixture."""

import torch

from evodiff.interop.process import Preconditioned
from evodiff.models.analytic import GaussianMixture
from evodiff.noise import SeededNoise

MEANS = 2 * torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
STDS, WEIGHTS = torch.full((4,), 0.1).double(), torch.full((4,), 0.25).double()
MIXTURE = GaussianMixture(MEANS, STDS, WEIGHTS)


def network(scheduler):
    """A perfect network of the mixture: from what a pipeline gives it, in the scheduler's prediction."""
    process = scheduler.process

    def output(x, timestep):
        node = process.schedule.node(process.t_of_timestep(float(timestep)))
        state = x.double() / process.input_scale(node)
        D = MIXTURE(state, node)
        if isinstance(process, Preconditioned):
            at_0 = process.data(state, torch.zeros_like(state), node)
            at_1 = process.data(state, torch.ones_like(state), node)
            return (D - at_0) / (at_1 - at_0)
        eps = (state - node.alpha * D) / node.sigma
        outputs = {"eps": eps, "x0": D, "v": node.alpha * eps - node.sigma * D, "flow": eps - D}
        return outputs[process.predicts]

    return output


def noise(seeds=range(3)):
    return SeededNoise(seeds).latents((2, 3, 3)).double()


def loop(scheduler, x, n=8, generator=None, **nodes):
    """What a pipeline does."""
    scheduler.set_timesteps(**(nodes or {"num_inference_steps": n}))
    model = network(scheduler)
    for t in scheduler.timesteps:
        out = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x
