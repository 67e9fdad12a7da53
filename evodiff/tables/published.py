"""What papers report: results/published/*.csv, how a table finds its numbers there, and how far ours may differ."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from evodiff.config import nearest
from evodiff.errors import ConfigError
from evodiff.paths import ROOT

FOLDER = ROOT / "results" / "published"
RELATIVE_SD = 0.01
"""Standard deviation of one FID of 50,000 images, as a part of its value: EDM (arXiv 2206.00364) puts the random
variation between runs at +-2 %. For N images it is sqrt(50,000 / N) times that."""
MIN_OF_3 = 0.559
"""Variance of the least of three standard normal numbers."""
MEAN_ABOVE_MIN_OF_3 = 0.846
"""How far the least of three lies below their mean, in standard deviations: 3 / (2 sqrt(pi))."""
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's 97.5 % quantile of 2, 3, ... values."""
STATES = ("missing", "proxy", "ok", "off", "done")
"""missing: not run; proxy: on fewer images than the paper's; ok, off: within, beyond the tolerance; done: no paper
to compare with."""


@dataclass(frozen=True)
class Published:
    """One number of a paper; `value` as printed there, with all its digits."""

    model: str
    method: str
    variant: str
    nfe: int | None
    metric: str
    value: str
    images: str
    guidance: str
    source: str
    table: str
    confidence: str

    @property
    def number(self) -> float:
        return float(self.value)

    @property
    def decimals(self) -> int:
        return len(self.value.partition(".")[2])

    @property
    def rounding(self) -> float:
        """Half a unit of the last digit printed."""
        return 0.5 * 10.0**-self.decimals

    @property
    def least_of_3(self) -> bool:
        """The source reports the least of three runs."""
        return "min of 3" in self.variant

    @property
    def cite(self) -> str:
        return f"{self.source}, {self.table}"


@cache
def read(name: str) -> tuple[Published, ...]:
    """All numbers of results/published/NAME.csv. Raises ConfigError for an unknown name."""
    known = sorted(path.stem for path in FOLDER.glob("*.csv"))
    if name not in known:
        raise ConfigError(
            f"no published numbers are called {name}.{nearest(name, known)} Possible: {', '.join(known)}."
        )
    found = []
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            nfe = line.pop("nfe")
            line.pop("dataset", None)
            found.append(Published(**line, nfe=int(nfe) if nfe else None))
    return _as_printed(found)


def _as_printed(found: Sequence[Published]) -> tuple[Published, ...]:
    """The files drop zeros at the end (3.5 for 3.50): every number gets as many decimals as its table has."""

    def table(p: Published) -> tuple[str, ...]:
        return p.source, p.table, p.model, p.metric, p.guidance

    decimals: dict[tuple[str, ...], int] = {}
    for p in found:
        decimals[table(p)] = max(decimals.get(table(p), 0), p.decimals)
    return tuple(replace(p, value=f"{p.number:.{decimals[table(p)]}f}") for p in found)


def matching(published: Sequence[Published], words: Mapping[str, Any]) -> dict[int, Published]:
    """By NFE, the numbers that `words` describe: equal in every column named, except that `source` may be cut short.

    `plus` is added to the source's NFE (a source that counts steps of a method that spends more); a list `nfe` leaves
    out the others. Raises ConfigError if nothing is described, or one NFE twice.
    """
    columns, plus = {k: str(v) for k, v in words.items() if k not in ("plus", "nfe")}, words.get("plus", 0)
    only = words.get("nfe")
    if only is not None and not (isinstance(only, list) and all(type(n) is int for n in only)):
        raise ConfigError(f"published: nfe={only!r} is impossible; expected a list like [12, 15]")
    if type(plus) is not int:
        raise ConfigError(f"published: plus={plus!r} is impossible; expected the evaluations that a source leaves out")
    unknown = sorted(columns.keys() - {"model", "method", "variant", "source", "table", "metric", "guidance"})
    if unknown:
        raise ConfigError(f"published: {', '.join(unknown)} is no column; see results/published/README.md")
    found: dict[int, Published] = {}
    for p in published:
        equal = all(getattr(p, k) == v or (k == "source" and p.source.startswith(v)) for k, v in columns.items())
        if equal and p.nfe is not None and (only is None or p.nfe + plus in only):
            nfe = p.nfe + plus
            if nfe in found:
                raise ConfigError(f"published: {dict(columns)} describes two numbers at NFE {p.nfe}; add a column")
            found[nfe] = p
    if not found:
        raise ConfigError(f"published: nothing is described by {dict(columns)}")
    return found


@dataclass(frozen=True)
class Verdict:
    """Our values of one cell (one for each range of seeds done) beside the paper's."""

    values: tuple[float, ...]
    images: int
    proxy: bool
    paper: Published | None
    standard_error: float | None = None
    """Of one run, where it was measured (metrics=[..., ci]): the root mean square over our runs."""
    fewer: bool = False
    """Other cells of the table have more sets of seeds: a mean of these is no match for theirs."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def scatter(self) -> float | None:
        """The standard deviation of one run: between ours, or of a single one from its own images."""
        return self.sd if self.sd is not None else self.standard_error if self.values else None

    @property
    def confidence(self) -> float | None:
        """Half the width of the mean's 95 % interval: Student's between runs, or from one run's standard error."""
        if self.sd is not None:
            return STUDENT[min(len(self.values), len(STUDENT) + 1) - 2] * self.sd / math.sqrt(len(self.values))
        return 1.96 * self.standard_error if self.values and self.standard_error is not None else None

    @property
    def ours(self) -> float | None:
        """What stands beside the paper's number: the least of three where the paper takes it, otherwise the mean."""
        if not self.values:
            return None
        least = self.paper is not None and self.paper.least_of_3 and len(self.values) > 2
        return min(self.values) if least else self.mean

    @property
    def difference(self) -> float | None:
        """None for a proxy as well, which is not compared."""
        if self.proxy or self.ours is None or self.paper is None:
            return None
        return self.ours - self.paper.number

    @property
    def tolerance(self) -> float | None:
        """Two standard deviations of the difference of two such numbers, and half a digit.

        That of one run is measured between our seeds, but not taken below RELATIVE_SD: three seeds may agree by chance.
        The variance of the mean of k runs is 1/k of one run's, of the least of three 0.559 of it; the paper's number is
        one run unless it says more. Fewer than three of ours have no least of three: their mean lies above it.
        """
        if self.proxy or self.paper is None or not self.values:
            return None
        assumed = RELATIVE_SD * abs(self.paper.number) * math.sqrt(50_000 / self.images)
        one = max(assumed, self.sd or 0.0, self.standard_error or 0.0)
        least, enough = self.paper.least_of_3, len(self.values) > 2
        parts = (MIN_OF_3 if least else 1.0) + (MIN_OF_3 if least and enough else 1 / len(self.values))
        above = MEAN_ABOVE_MIN_OF_3 if least and not enough else 0.0
        return one * (2 * math.sqrt(parts) + above) + self.paper.rounding

    @property
    def state(self) -> str:
        """One of STATES."""
        if not self.values:
            return "missing"
        if self.proxy:
            return "proxy"
        if self.difference is None or self.tolerance is None:
            return "done"
        return "ok" if abs(self.difference) <= self.tolerance else "off"


def unmatched(published: Iterable[Published], matched: Iterable[Published]) -> list[Published]:
    """The numbers that no cell has: methods without a solver here (trained, searched), or settings not known."""
    seen = set(matched)
    return [p for p in published if p not in seen]
