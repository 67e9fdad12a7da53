"""Digits of the shipped network by three solvers, from the same noise and with the same number of network calls.

python examples/sample_digits.py [digits.png]
"""

import sys
from pathlib import Path

import torch

import evodiff
from evodiff.pictures import save_grid

SOLVERS = ("ddim", "dpmpp_3m", "evodiff")


def main(path: Path) -> None:
    rows = []
    for solver in SOLVERS:
        out = evodiff.sample("mnist_tiny", solver=solver, nfe=6, seeds=range(12))
        rows.append(out.images)
        print(f"{solver:<9} {out.nfe} network calls per image, {len(out.images)} images")
    save_grid(path, torch.cat(rows).numpy(), columns=12)
    print(f"one row for each solver: {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits.png"))
