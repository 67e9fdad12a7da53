"""A table's values by row and budget, and what follows of them: who is first, and who cannot be told from whom."""

import math
from functools import cache

from evodiff.metrics.contrast import Matched, read_matched
from evodiff.metrics.paired import Paired, read_paired
from evodiff.tables.published import Verdict
from evodiff.tables.table import Table
from evodiff.tables.text import show

METRICS = {"fd": "fd_mnist", "rmse": "rmse", "images": "rmse_images", "contrast": "contrast", "saturated": "saturated"}


@cache
def table_of(name: str) -> Table:
    return Table.of_file(name)


class Numbers:
    """A table's values by row and NFE."""

    def __init__(self, name: str):
        self.table = table_of(name)
        protocol = next(iter(self.table.jobs.values())).protocol
        self.matched = read_matched(self.table.folder / "matched.csv", protocol)
        self.paired = read_paired(self.table.folder / "paired.csv", protocol)
        self.verdicts = {short: self.table.verdicts(f"{long}@{self.table.images}") for short, long in METRICS.items()}

    @property
    def nfe(self) -> list[int]:
        """The budgets at which every row is done."""
        unfinished = {nfe for (_, nfe), verdict in self.verdicts["fd"].items() if not verdict.values}
        return [nfe for nfe in self.table.nfe if nfe not in unfinished]

    @property
    def gained(self) -> list[int]:
        """The budgets at which every row was scored with gains, on some set of seeds."""
        scored = {(row, nfe) for (row, nfe, _), key in self.table.keys.items() if key in self.matched}
        without = {nfe for _, nfe in self.table.cells.keys() - scored}
        return [nfe for nfe in self.nfe if nfe not in without]

    def __call__(self, metric: str, row: str, nfe: int) -> float:
        return self.verdicts[metric][row, nfe].mean

    def with_gain(self, row: str, nfe: int) -> Matched:
        """The distance of half of the images, without and with the gain that suits best, of the first seeds that were
        scored so."""
        keys = (self.table.keys[row, nfe, k] for k in range(len(self.table.cells[row, nfe].jobs)))
        return next(self.matched[key] for key in keys if key in self.matched)

    def less(self, row: str, other: str, nfe: int) -> Paired:
        """The distance of a row less another's, on the first seeds."""
        return self.paired[self.table.keys[row, nfe, 0], self.table.keys[other, nfe, 0]]

    def column(self, metric: str, nfe: int) -> dict[str, Verdict]:
        """Rows with this NFE, the least first."""
        found = {row: v for (row, n), v in self.verdicts[metric].items() if n == nfe and v.values}
        return dict(sorted(found.items(), key=lambda item: item[1].mean))

    def converged(self, metric: str) -> float:
        levels = self.table.levels(f"{METRICS[metric]}@{self.table.images}")
        return next(value for label, value in levels.items() if "NFE" in label)


def sd(verdict: Verdict) -> float:
    """Of one run; not below what its own images say, for a few sets of seeds may agree by chance."""
    assert verdict.standard_error is not None
    return max(verdict.standard_error, verdict.sd or 0.0)


def told_apart(a: Verdict, b: Verdict, wider: float) -> bool:
    """Whether two scores differ by more than 1.96 standard deviations of their difference, as if from other seeds; of
    one set of seeds each is taken `wider` than its own images tell."""
    return abs(a.mean - b.mean) > 1.96 * wider * math.hypot(sd(a), sd(b))


def leads(numbers: Numbers, wider: float) -> str:
    """By distance: who is best at which NFE, and where the next one cannot be told from it."""
    budgets: dict[str, list[int]] = {}
    for nfe in numbers.nfe:
        (first, best), (second, next_best), *_ = numbers.column("fd", nfe).items()
        label = first if told_apart(best, next_best, wider) else f"{first}, not told apart from {second},"
        budgets.setdefault(label, []).append(nfe)
    return "; ".join(f"{row} at {runs_of(found)}" for row, found in budgets.items())


def runs_of(numbers: list[int]) -> str:
    """5, 7 to 25."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def between_over_within(numbers: Numbers) -> tuple[float, int]:
    """The standard deviation between sets of seeds by the one found within them, root mean square, and of how many
    cells."""
    cells = numbers.verdicts["fd"].values()
    ratios = [v.sd / v.standard_error for v in cells if v.sd is not None and v.standard_error]
    return math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)), len(ratios)


def first_places(numbers: Numbers) -> dict[int, set[str]]:
    """By NFE, the rows that have the least distance in some set of seeds, where all sets are done."""
    sets = sets_of(numbers)
    columns = {nfe: numbers.column("fd", nfe) for nfe, n in sets.items() if n == max(sets.values())}
    return {
        nfe: {min(column, key=lambda row: column[row].values[k]) for k in range(sets[nfe])}
        for nfe, column in columns.items()
    }


def sets_of(numbers: Numbers) -> dict[int, int]:
    """By NFE, of how many sets of seeds every row is done."""
    return {nfe: min(len(v.values) for v in numbers.column("fd", nfe).values()) for nfe in numbers.nfe}


def places(*tables: Numbers) -> str:
    """By NFE, who comes first by distance and by the error of the images, and where EVODiff is; each from the first
    table that has it."""
    lines = ["| NFE | first by distance | first by error of the images | `evodiff` is number |", "|---:|---|---|---|"]
    of_nfe = {nfe: numbers for numbers in reversed(tables) for nfe in numbers.nfe}
    for nfe, numbers in sorted(of_nfe.items()):
        samplers = distinct(numbers, nfe)
        first, place = [], []
        for metric, by in (("fd", "distance"), ("images", "error")):
            column = numbers.column(metric, nfe)
            ranked = sorted(samplers, key=lambda rows: column[rows[0]].mean)
            first.append(", ".join(f"{named(rows)} {show(column[rows[0]].mean)}" for rows in ranked[:4]))
            place.append(f"{number(ranked, 'evodiff')} by {by}")
        lines.append(f"| {nfe} | {' | '.join(first)} | {', '.join(place)}, of {len(samplers)} |")
    return "\n".join(lines)


def by_gain(numbers: Numbers, nfe: int) -> list[list[str]]:
    """The samplers at one NFE, the one with the least distance after its best gain first."""
    return sorted(distinct(numbers, nfe), key=lambda rows: numbers.with_gain(rows[0], nfe).free)


def gained_places(numbers: Numbers) -> str:
    """By NFE, who comes first by distance after its best gain, and where EVODiff is without one and with it."""
    lines = ["| NFE | first by distance with a gain | `evodiff` is number |", "|---:|---|---|"]
    for nfe in numbers.gained:
        ranked = by_gain(numbers, nfe)
        cells = [(rows, numbers.with_gain(rows[0], nfe)) for rows in ranked[:4]]
        first = ", ".join(f"{named(rows)} {show(c.free)} ({show(c.plain)}, {show(c.free_gain)})" for rows, c in cells)
        own, place = numbers.with_gain("evodiff", nfe), number(distinct(numbers, nfe), "evodiff")
        told = f"{place} without, {number(ranked, 'evodiff')} with, of {len(ranked)}"
        lines.append(f"| {nfe} | {first} | {told}: {show(own.free)} ({show(own.plain)}, {show(own.free_gain)}) |")
    return "\n".join(lines)


def distinct(numbers: Numbers, nfe: int) -> list[list[str]]:
    """The rows at one NFE, those together that are one sampler there: equal in distance and error to 4 digits."""
    found: dict[tuple[str, str], list[str]] = {}
    errors = numbers.column("rmse", nfe)
    for row, verdict in numbers.column("fd", nfe).items():
        found.setdefault((f"{verdict.mean:.4g}", f"{errors[row].mean:.4g}"), []).append(row)
    return list(found.values())


def named(rows: list[str]) -> str:
    return " = ".join(f"`{row}`" for row in rows)


def number(ranked: list[list[str]], row: str) -> int:
    """The place of a row, from 1."""
    return next(i for i, rows in enumerate(ranked, 1) if row in rows)
