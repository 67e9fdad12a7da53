"""A time grid of your own: a class with `times`, here denser where the noise level is middling.

python examples/own_grid.py
"""

import math
from dataclasses import dataclass

import torch

import evodiff


@dataclass(frozen=True)
class Arctan:
    """Uniform in atan((lam - middle) / width), lam the half-log-SNR: steps grow towards both ends."""

    middle: float = 0.5
    width: float = 4.0

    def times(self, n, schedule, t_start, t_end):
        a, b = (math.atan((schedule.node(t).lam - self.middle) / self.width) for t in (t_start, t_end))
        inner = [self.middle + self.width * math.tan(a + (b - a) * i / n) for i in range(1, n)]
        return [t_start, *(schedule.t_at(lam) for lam in inner), t_end]


def main() -> None:
    truth = evodiff.sample("mixture", "heun", nfe=400, seeds=range(64), grid="karras").x
    print("root mean square distance to the exact solution, DPM-Solver++ 2M")
    for nfe in (8, 12, 20):
        errors = []
        for name, grid in (("logsnr", "logsnr"), ("karras", "karras"), ("own", Arctan())):
            x = evodiff.sample("mixture", "dpmpp_2m", nfe, range(64), grid=grid).x
            errors.append(f"{name} {(x - truth).square().mean().sqrt().item():.4f}")
        print(f"nfe {nfe:>2}: ", ", ".join(errors))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
