"""Train a shipped network: `python scripts/train.py mnist_tiny` or `python scripts/train.py mnist_classifier`."""

import argparse

from evodiff.paths import CHECKPOINTS
from evodiff.training import train_classifier, train_denoiser

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=["mnist_tiny", "mnist_classifier"])
    network = parser.parse_args().network
    train = train_denoiser if network == "mnist_tiny" else train_classifier
    train(CHECKPOINTS / network)
