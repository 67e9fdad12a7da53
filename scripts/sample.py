"""Make the images of a run: `python scripts/sample.py model=mnist_tiny solver=evodiff nfe=10`."""

import sys

from evodiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
