"""What docs/results.md says about its numbers, each taken from the records; a claim that they do not bear out stops it."""

import csv
from collections.abc import Iterable

from evodiff.config import compose
from evodiff.data import mnist_digits
from evodiff.paths import RESULTS
from evodiff.report import Table

METRICS = {"fd": "fd_mnist", "rmse": "rmse", "contrast": "contrast", "saturated": "saturated"}


class Numbers:
    """The means of a table by row and NFE, and its converged value."""

    def __init__(self, name: str):
        self.table = Table.from_config(compose("table", [f"table={name}"]))
        self.verdicts = {short: self.table.verdicts(f"{long}@{self.table.images}") for short, long in METRICS.items()}

    def of(self, metric: str, row: str, nfe: int) -> float:
        return self.verdicts[metric][row, nfe].mean

    def converged(self, metric: str) -> float:
        levels = self.table.levels(f"{METRICS[metric]}@{self.table.images}")
        return next(value for label, value in levels.items() if "NFE" in label)

    def ranked(self, metric: str, nfe: int, rows: Iterable[str] | None = None) -> list[str]:
        """Rows with this NFE, the least first."""
        found = {row: v.mean for (row, n), v in self.verdicts[metric].items() if n == nfe and v.values}
        return sorted((row for row in found if rows is None or row in rows), key=found.__getitem__)


def matched(table: str) -> dict[tuple[str, int], tuple[float, float, float]]:
    """(plain, gain, matched) by row and NFE."""
    with (RESULTS / "tables" / table / "matched.csv").open(newline="") as file:
        return {
            (line["solver"], int(line["nfe"])): (float(line["plain"]), float(line["gain"]), float(line["matched"]))
            for line in csv.DictReader(file)
        }


def real() -> tuple[float, float]:
    """Contrast and share of 0 and 255 of the 5,000 digits."""
    images, _ = mnist_digits()
    return images.double().flatten(1).std(1, correction=0).mean().item(), (
        (images == 0) | (images == 255)
    ).double().mean().item()
