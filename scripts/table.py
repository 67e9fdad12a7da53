"""Make a table: `python scripts/table.py demo`."""

import sys

from evodiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", *sys.argv[1:]]))
