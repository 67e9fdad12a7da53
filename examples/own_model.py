"""A network of your own, sampled by every solver: `evodiff.wrap` asks what it predicts and on which schedule.

Here a small network learns the straight flow of 8x8 digits in a few seconds.

    python examples/own_model.py [digits.png]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import evodiff
from evodiff.data import mnist_digits
from evodiff.pictures import save_grid
from evodiff.schedule import Flow


class Network(nn.Module):
    """flow(x, t) of images [B, 1, 8, 8] at times [B]."""

    def __init__(self, width: int = 256):
        super().__init__()
        layers = (nn.Linear(64 + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64))
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t):
        waves = torch.outer(t, torch.arange(9) * torch.pi / 2).cos()
        return self.layers(torch.cat([x.flatten(1), waves], dim=1)).view_as(x)


def train(steps: int = 800) -> Network:
    torch.manual_seed(0)
    images = F.avg_pool2d(mnist_digits()[0].float() / 127.5 - 1, 4)
    net = Network()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        x_0 = images[torch.randint(len(images), (128,))]
        z, t = torch.randn_like(x_0), torch.rand(len(x_0))
        s = t.view(-1, 1, 1, 1)
        loss = (net((1 - s) * x_0 + s * z, t) - (z - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def main(path: Path) -> None:
    model = evodiff.wrap(train(), shape=(1, 8, 8), predicts="flow", schedule=Flow())
    out = evodiff.sample(model, "unipc_3", nfe=10, seeds=range(32), grid="time_uniform")
    save_grid(path, out.images.numpy(), columns=16, scale=4)
    print(f"{len(out.images)} images with {out.nfe} network calls each: {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own_model.png"))
