"""Sample and score a run: `python scripts/run.py model=mnist_tiny solver=evodiff nfe=10`; -m sweeps."""

import sys

from evodiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
