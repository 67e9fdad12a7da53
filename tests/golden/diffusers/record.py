"""Records runs of the schedulers of the library diffusers: `python tests/golden/diffusers/record.py` writes runs.npz.

Their tables of alpha are replaced by ours in float64, so that results can be compared to rounding. Each run stops at
timestep 0: what the schedulers do after it is their own convention. The predictor-corrector runs on one image, for the
scheduler takes its norms over the batch.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch

from evodiff.schedule import EDM
from evodiff.verify.schedulers import SCHEDULE, mixture

STEPS = 10
TABLE = torch.tensor(SCHEDULE.log_alphas, dtype=torch.float64).mul(2).exp()


SCHEDULERS = {
    "ddpm_small": (diffusers.DDPMScheduler, {"variance_type": "fixed_small"}, {}),
    "ddpm_large": (diffusers.DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    "ddim_0": (diffusers.DDIMScheduler, {}, {"eta": 0.0}),
    "ddim_0.5": (diffusers.DDIMScheduler, {}, {"eta": 0.5}),
    "ddim_1": (diffusers.DDIMScheduler, {}, {"eta": 1.0}),
    "fpndm": (diffusers.PNDMScheduler, {"skip_prk_steps": False}, {}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, {}),
    "sde_dpmpp_1": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "lower_order_final": False},
        {},
    ),
    "sde_dpmpp_2": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": False},
        {},
    ),
}


def run(name: str) -> dict[str, np.ndarray]:
    """x at the start and at timestep 0, the nodes' timesteps, the noise drawn and the number of evaluations."""
    make, config, options = SCHEDULERS[name]
    if make in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        config = {**config, "clip_sample": False}
    scheduler = make(beta_start=1e-4, beta_end=0.02, timestep_spacing="leading", **config)
    scheduler.alphas_cumprod = TABLE
    scheduler.set_timesteps(STEPS)
    sde = name.startswith("sde")
    if sde:
        alpha2 = TABLE[scheduler.timesteps]
        scheduler.sigmas = torch.cat([((1 - alpha2) / alpha2).sqrt(), torch.zeros(1)])
    stochastic = name.startswith(("ddpm", "sde")) or options.get("eta", 0) > 0
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draw, replay = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    options = {**options, "generator": draw} if stochastic else options
    denoise, start, nfe, noise = mixture(), x, 0, []
    timesteps = scheduler.timesteps.tolist()
    last = max(i for i, t in enumerate(timesteps) if t == timesteps[-1])
    for t in timesteps[:last]:
        node = SCHEDULE.node((t + 1) / 1000)
        eps = (x - node.alpha * denoise(x.double(), node)) / node.sigma
        nfe += 1
        x = scheduler.step(eps, t, x, **options).prev_sample
        if stochastic:
            noise.append(torch.randn(x.shape, generator=replay, dtype=torch.float32 if sde else torch.float64))
    nodes = sorted({t for t in timesteps if name != "fpndm" or t % 100 == 0}, reverse=True)
    noise = torch.stack(noise) if noise else torch.zeros(0)
    return {
        "start": start.numpy(),
        "end": x.double().numpy(),
        "timesteps": np.array(nodes),
        "noise": noise.double().numpy(),
        "nfe": np.array(nfe),
    }


def run_predictor_corrector() -> dict[str, np.ndarray]:
    """Score-SDE's on its variance-exploding schedule, whose times are sigma: `times` in place of timesteps."""
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=STEPS, snr=0.16, sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)
    scheduler.discrete_sigmas = scheduler.discrete_sigmas.double()
    sigmas = scheduler.discrete_sigmas.flip(0).tolist()
    denoise = mixture(EDM())
    x = 50.0 * torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draw, replay = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    start, nfe, noise = x, 0, []
    for t, sigma in zip(scheduler.timesteps.tolist()[:-1], sigmas, strict=False):
        for correct in (True, False):
            score = (denoise(x, EDM().node(sigma)) - x) / sigma**2
            nfe += 1
            dtype = torch.float32 if correct else torch.float64
            noise.append(torch.randn(x.shape, generator=replay, dtype=dtype).double())
            step = scheduler.step_correct(score, x, draw) if correct else scheduler.step_pred(score, t, x, draw)
            x = step.prev_sample
    return {
        "start": start.numpy(),
        "end": x.numpy(),
        "times": np.array(sigmas),
        "noise": torch.stack(noise).numpy(),
        "nfe": np.array(nfe),
    }


if __name__ == "__main__":
    runs = {name: run(name) for name in SCHEDULERS} | {"pc": run_predictor_corrector()}
    arrays = {f"{name}/{key}": value for name, one in runs.items() for key, value in one.items()}
    np.savez_compressed(Path(__file__).with_name("runs.npz"), **arrays, version=np.array(diffusers.__version__))
