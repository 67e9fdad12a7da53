"""Measure the metrics beside pytorch-fid and torch-fidelity: results/bench/metrics.json and .md.

`python scripts/bench_metrics.py [--quick]`; the work is in `evodiff.metrics.bench`.
"""

import argparse

from evodiff.metrics.bench import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5,000 features instead of 50,000")
    main(parser.parse_args().quick)
