"""What a table is made of: methods with their overrides, and cells with their runs and published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evodiff.errors import ConfigError
from evodiff.runs.job import Job
from evodiff.tables.published import Published


@dataclass(frozen=True)
class Row:
    """One method: its overrides, its budgets, overrides at some of them, and what describes its published numbers."""

    name: str
    run: tuple[str, ...]
    nfe: tuple[int, ...]
    at: tuple[Mapping[str, Any], ...] = ()
    published: tuple[Mapping[str, Any], ...] = ()
    everywhere: tuple[Mapping[str, Any], ...] = ()
    """The table's own `at`."""

    @classmethod
    def of(cls, name: str, content: Any, nfe: Sequence[int], at: Sequence[Mapping[str, Any]]) -> "Row":
        """From a table's YAML: a list of overrides, or a mapping with `run`, and `nfe`, `at`, `published` as needed."""
        fields = dict(content) if isinstance(content, Mapping) else {"run": content}
        if unknown := sorted(fields.keys() - {"run", "nfe", "at", "published"}):
            raise ConfigError(f"row {name}: {', '.join(unknown)} is no key; possible: run, nfe, at, published")
        if not isinstance(fields.get("run"), Sequence) or isinstance(fields["run"], str):
            raise ConfigError(f"row {name}: expected a list of overrides like [solver=ddim], not {fields.get('run')!r}")
        own = tuple(fields.get("at") or ())
        wrong = [
            entry
            for entry in (*at, *own)
            if entry.keys() not in ({"nfe", "run"}, {"above", "run"}) or type(entry.get("above", 0)) not in (int, float)
        ]
        if wrong:
            raise ConfigError(f"row {name}: at: expected nfe (a list) or above (a number), and run, not {wrong[0]}")
        budgets, papers = tuple(fields.get("nfe") or nfe), tuple(fields.get("published") or ())
        return cls(name, tuple(fields["run"]), budgets, own, papers, tuple(at))

    def overrides(self, nfe: int) -> list[str]:
        """At one NFE: the table's, the row's, the row's at this NFE; what comes later is stronger."""
        first, last = (
            [o for at in entries if (nfe > at["above"] if "above" in at else nfe in at["nfe"]) for o in at["run"]]
            for entries in (self.everywhere, self.at)
        )
        return [*first, *self.run, *last]


@dataclass(frozen=True)
class Cell:
    """One method at one NFE: a job for each range of seeds, and published numbers, of which the first is compared."""

    row: str
    nfe: int
    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]
    papers: tuple[Published, ...]

    @property
    def label(self) -> str:
        return f"{self.row}, NFE {self.nfe}"


def with_seeds(job: Job, seeds: range) -> Job:
    """The same run, and its reference, of other seeds."""
    span = (seeds.start, seeds.stop - 1)
    reference = job.reference_run and replace(job.reference_run, seeds=span)
    return replace(job, run=replace(job.run, seeds=span), reference_run=reference)
