"""Score the images of a run: `python scripts/score.py model=mnist_tiny solver=evodiff nfe=10`."""

import sys

from evodiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
