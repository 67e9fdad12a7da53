"""`evodiff stats` and `evodiff score path=...`."""

import argparse

from evodiff.data import mnist_digits
from evodiff.files import sha256
from evodiff.metrics.build import build_reference
from evodiff.metrics.features import extractor
from evodiff.paths import CHECKPOINTS


def stats_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evodiff stats", description="Reference statistics")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make reference statistics of real images")
    build.add_argument("dataset")
    args = parser.parse_args(argv)
    images, _ = mnist_digits()
    reference = build_reference(
        images.split(500), extractor("mnist_classifier"), dataset="mnist_digits", crop="none", resize="pad 28 to 32"
    )
    path = CHECKPOINTS / "mnist_reference" / "fd_mnist.npz"
    reference.save(path)
    print(f"{path}: {reference.gaussian.n} images, sha256 {sha256(path)}, noise floor {reference.provenance['noise_floor']}")
    return 0
