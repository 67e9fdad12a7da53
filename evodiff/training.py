"""Training of the two small networks that ship with the project: the MNIST diffusion model and the digit classifier.

Both are trained on the 5,000 real digits of `checkpoints/mnist_digits`. The recipes are the dataclasses below.
"""

import csv
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from evodiff.data import mnist_digits
from evodiff.files import whole_file
from evodiff.models.networks.digit_classifier import DigitClassifier
from evodiff.models.networks.tiny import tiny_denoiser
from evodiff.plots import save_loss_curve


@dataclass(frozen=True)
class DenoiserRecipe:
    """EDM training (arXiv 2206.00364, table 1 and algorithm box of appendix F.3) of a small DDPM++ U-Net."""

    images: int = 1_200_000
    batch: int = 128
    lr: float = 2e-3
    warmup_images: int = 20_000
    ema_decay: float = 0.999
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    seed: int = 0
    snapshots: tuple[int, ...] = (50_000, 200_000)


def edm_loss(net: nn.Module, x: Tensor, sigma: Tensor, z: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) |D(x + sigma z) - x|^2 per pixel, lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    sigma, weight = sigma.view(-1, 1, 1, 1), weight.view(-1, 1, 1, 1)
    return (weight * (net(x + sigma * z, sigma) - x) ** 2).mean()


def train_denoiser(folder: Path, recipe: DenoiserRecipe | None = None) -> None:
    """Write `ema.safetensors`, `training.json` and `loss.csv` to `folder`, and EMA snapshots on the way."""
    recipe = recipe or DenoiserRecipe()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    images, _ = mnist_digits()
    data = images.float() / 127.5 - 1
    net = tiny_denoiser()
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    random = torch.Generator().manual_seed(recipe.seed)
    started, log, losses = time.time(), [], []

    for batch, x in enumerate(_batches(data, recipe.batch, random), start=1):
        seen = batch * recipe.batch
        for group in optimizer.param_groups:
            ramp = min(1.0, seen / recipe.warmup_images)
            group["lr"] = recipe.lr * ramp * 0.5 * (1 + math.cos(math.pi * min(1.0, seen / recipe.images)))
        sigma = (torch.randn(len(x), generator=random) * recipe.p_std + recipe.p_mean).exp()
        loss = edm_loss(net, x, sigma, torch.randn(x.shape, generator=random), recipe.sigma_data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(recipe.ema_decay, (1 + batch) / (10 + batch))
        for name, value in net.state_dict().items():
            ema[name].lerp_(value, 1 - decay)

        losses.append(loss.item())
        if batch % 100 == 0:
            log.append((seen, sum(losses) / len(losses), round(time.time() - started)))
            losses.clear()
            print(f"{seen:>9} images  loss {log[-1][1]:.4f}  {seen / (time.time() - started):.0f} images/s", flush=True)
        for mark in recipe.snapshots:
            if seen - recipe.batch < mark <= seen:
                _save(ema, folder / f"ema-{mark}.safetensors")
        if seen >= recipe.images:
            break

    _save(ema, folder / "ema.safetensors")
    _write_log(folder, ("images", "loss", "seconds"), log)
    _write_json(folder / "training.json", asdict(recipe) | {"seconds": round(time.time() - started)})


@dataclass(frozen=True)
class ClassifierRecipe:
    """Cross-entropy with small random shifts; 1,000 of the 5,000 digits are held out for the stated accuracy."""

    epochs: int = 30
    batch: int = 100
    lr: float = 2e-3
    max_shift: int = 2
    held_out: int = 1000
    seed: int = 0


def train_classifier(folder: Path, recipe: ClassifierRecipe | None = None) -> None:
    """Write `classifier.safetensors`, `training.json` (with the test accuracy) and `loss.csv` to `folder`."""
    recipe = recipe or ClassifierRecipe()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    images, labels = mnist_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed))
    test, train = order[: recipe.held_out], order[recipe.held_out :]
    net = DigitClassifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr)
    steps = recipe.epochs * len(train) // recipe.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(recipe.seed)
    started, log = time.time(), []

    for epoch in range(1, recipe.epochs + 1):
        total = 0.0
        for rows in train[torch.randperm(len(train), generator=random)].split(recipe.batch):
            dy, dx = torch.randint(-recipe.max_shift, recipe.max_shift + 1, (2,), generator=random).tolist()
            loss = F.cross_entropy(net(images[rows].roll((dy, dx), dims=(2, 3)))[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        log.append((epoch, total / len(train), round(time.time() - started)))
        print(f"epoch {epoch}  loss {log[-1][1]:.4f}", flush=True)

    net.eval()
    with torch.no_grad():
        accuracy = (net(images[test])[1].argmax(1) == labels[test]).double().mean().item()
    print(f"accuracy on {len(test)} held-out digits: {accuracy:.4f}")
    _save(net.state_dict(), folder / "classifier.safetensors")
    _write_log(folder, ("epoch", "loss", "seconds"), log)
    _write_json(folder / "training.json", asdict(recipe) | {"test_accuracy": accuracy})


def _batches(data: Tensor, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Endless epochs of shuffled batches; the incomplete one at the end of an epoch is left out."""
    while True:
        order = torch.randperm(len(data), generator=random)
        for rows in order.split(size):
            if len(rows) == size:
                yield data[rows]


def _save(state: dict[str, Tensor], path: Path) -> None:
    with whole_file(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary)


def _write_log(folder: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    save_loss_curve(folder / "loss.png", [row[:2] for row in rows], xlabel=header[0])
    with whole_file(folder / "loss.csv") as temporary, temporary.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def _write_json(path: Path, content: dict) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
