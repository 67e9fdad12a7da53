"""Tables: the runs that fill one, what papers report beside them, and the pages made from both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from statistics import fmean

import numpy as np
from omegaconf import DictConfig

from evodiff.config import build, compose
from evodiff.errors import ConfigError, EvodiffError, StoreError
from evodiff.locks import locked
from evodiff.metrics.distances import AGAINST_REFERENCE
from evodiff.metrics.score import reference_of
from evodiff.paths import results_folder
from evodiff.plots import Curve
from evodiff.runs.job import Job
from evodiff.runs.record import Record
from evodiff.runs.run import Run
from evodiff.runs.sample import sample_run
from evodiff.runs.score import check_scorable, score_run
from evodiff.tables import inputs, pages, text, trajectory
from evodiff.tables.cells import Cell, Row, with_seeds
from evodiff.tables.content import PAPER_METRICS, checked
from evodiff.tables.failures import Failures
from evodiff.tables.published import Published, Verdict, matching, read, unmatched
from evodiff.tracking import Tracker


@dataclass(frozen=True)
class Table:
    """Rows of methods, columns of NFE: each cell is one run, or one for each range of seeds, with its records."""

    config: str
    title: str
    base: list[str]
    rows: Mapping[str, Row]
    tracker: Tracker
    device: str = "auto"
    seeds: tuple[range, ...] = ()
    limit: int | None = None
    published: str | None = None
    metric: str | None = None

    @classmethod
    def of_file(cls, name: str, overrides: Sequence[str] = ()) -> "Table":
        """The table of configs/table/NAME.yaml. Raises ConfigError for a file that cannot be read, or is another's."""
        cfg = compose("table", [f"table={name}", *overrides])
        if cfg.table.name != name:  # its results would take the place of the other's
            raise ConfigError(
                f"configs/table/{name}.yaml says name: {cfg.table.name}, but a table has the name of its file: leave "
                f"that line out, or write name: {name}."
            )
        return cls.from_config(cfg)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Table":
        """Raises ConfigError for what is no table."""
        content, rows, seeds = checked(cfg)
        where = (cfg.device, seeds, cfg.limit, content.get("published"), content.get("metric"))
        return cls(content["name"], content["title"], content["base"], rows, build(cfg.tracker), *where)

    @property
    def name(self) -> str:
        """A trial has pages of its own."""
        return self.config if self.limit is None else f"{self.config}-{self.limit}"

    @property
    def nfe(self) -> list[int]:
        """All columns."""
        return sorted({nfe for row in self.rows.values() for nfe in row.nfe})

    @property
    def papers(self) -> tuple[Published, ...]:
        """All published numbers of this table."""
        return read(self.published) if self.published else ()

    @property
    def papers_only(self) -> list[Published]:
        """Those that no cell reproduces."""
        return unmatched(self.papers, (paper for cell in self.cells.values() for paper in cell.papers))

    @cached_property
    def cells(self) -> dict[tuple[str, int], Cell]:
        """Every cell by (row, NFE). Raises ConfigError if two are one run, or their protocols differ."""
        cells: dict[tuple[str, int], Cell] = {}
        composed = cache(lambda *overrides: Job.compose([*self.base, f"device={self.device}", *overrides]))
        for row in self.rows.values():
            found = [matching(self.papers, words) for words in row.published]
            for nfe in row.nfe:
                overrides = row.overrides(nfe)
                job = composed(*overrides).with_nfe(nfe)
                jobs = tuple(with_seeds(job, seeds) for seeds in self._seeds_of(job))
                papers = tuple(by_nfe[nfe] for by_nfe in found if nfe in by_nfe)
                cells[row.name, nfe] = Cell(row.name, nfe, tuple(overrides), jobs, papers)
        keys: dict[str, Cell] = {}
        for cell in cells.values():
            for job in cell.jobs:
                if (other := keys.setdefault(f"{job.run.model['name']}/{job.run.key()}", cell)) is not cell:
                    raise ConfigError(
                        f"table {self.config}: cells {other.label} and {cell.label} are the same run {job.run.key()}"
                    )
        protocols = {job.protocol.hash if job.protocol else None for cell in cells.values() for job in cell.jobs}
        if len(protocols) > 1:
            raise ConfigError(f"table {self.config} mixes {len(protocols)} scoring protocols; one table has one")
        return cells

    def _seeds_of(self, job: Job) -> list[range]:
        whole = self.seeds or (job.run.seed_range,)
        return [seeds if self.limit is None else seeds[: self.limit] for seeds in whole]

    @cached_property
    def jobs(self) -> dict[tuple[str, int, int], Job]:
        """Every run by (row, NFE, k), k the range of seeds; all cells of the first range come first."""
        found = {(c.row, c.nfe, k): job for c in self.cells.values() for k, job in enumerate(c.jobs)}
        return dict(sorted(found.items(), key=lambda item: item[0][2]))

    @cached_property
    def references(self) -> dict[str, tuple[Job, Run]]:
        """By key, the converged runs that the cells' rmse compares with, and a job that can make each."""
        found: dict[str, tuple[Job, Run]] = {}
        for job in self.jobs.values():
            if job.reference_run is not None:
                found.setdefault(job.reference_run.key(), (job, job.reference_run))
        return found

    def make(self) -> int:
        """Sample and score what is missing, picture a trajectory of each method, write the pages and print the table.

        A failing cell does not end the others, whatever it raises; its reason is printed and the exit code is 1. What
        cells read and can be computed is made first, and what cannot be scored is not sampled.
        """
        failures = Failures()
        self.make_inputs(failures)
        cells = [(f"{row}, NFE {nfe}", job) for (row, nfe, _), job in self.jobs.items()]
        cells = [(label, job) for label, job in cells if failures.attempt(label, check_scorable, job)]
        todo: list[tuple[str, Job, Run | None]] = [(label, job, None) for label, job in cells]
        if cells:
            todo += [("reference run", job, run) for job, run in self.references.values()]
        for stage in (_sample, score_run):
            todo = [(label, job, run) for label, job, run in todo if failures.attempt(label, stage, job, run)]
        failures.tell()
        pictures = Failures()  # without which a table is no less complete
        for row, job in trajectory.shown(self).items():
            pictures.attempt(f"trajectory of {row}", trajectory.make, job)
        pictures.tell()
        self.show()
        return int(bool(failures.reasons))

    @property
    def computable(self) -> list[inputs.Missing]:
        """What cells read, is not here and can be computed: statistics of the model, searched grids. Nothing for a
        trial, which is not to take that long."""
        return [m for m in inputs.missing_inputs(self) if m.argv] if self.limit is None else []

    def make_inputs(self, failures: Failures) -> None:
        """Compute them. Of processes that share the table one does it, and the others wait for its lock."""
        if not self.computable:
            return
        model = next(iter(self.jobs.values())).run.model["name"]
        with locked(results_folder() / "runs" / model, "inputs.lock"):
            for missing in self.computable:
                failures.attempt(missing.what, inputs.make, missing)

    def show(self) -> None:
        """Write the pages, publish them and print the table, of what there is."""
        if self.records:
            self.write()
            self.publish(self.tracker)
            print(self.text())

    def publish(self, tracker: Tracker) -> bool:
        """Show the records by a tracker, beside the papers' numbers; False if that did not work."""
        records = self.records
        papers = {row: curve.papers for row, curve in self.curves(self.metrics[0]).items() if curve.papers}
        return tracker.publish(self.name, list(records.values()), labels=[row for row, *_ in records], published=papers)

    @property
    def records(self) -> dict[tuple[str, int, int], Record]:
        """The records there are, of this table's protocol."""
        found = {}
        for place, job in self.jobs.items():
            record = self.record_of(job, self.keys[place])
            if record is not None:
                found[place] = record
        return found

    @cached_property
    def keys(self) -> dict[tuple[str, int, int], str]:
        return {place: job.run.key() for place, job in self.jobs.items()}

    def record_of(self, job: Job, key: str | None = None) -> Record | None:
        """A run's score.json in its folder, or the copy committed with the table; None if neither is there, or if it
        was scored by another protocol, or lacks a metric."""
        key = key or job.run.key()
        wanted = job.protocol.hash if job.protocol else None
        run_folder = results_folder() / "runs" / job.run.model["name"] / key
        for path in (run_folder / "score.json", self.folder / "records" / f"{key}.json"):
            if path.exists():
                record = _read_record(path, path.stat().st_mtime_ns)
                same = record is not None and (record.protocol or {}).get("hash") == wanted
                if record is not None and same and {*job.metrics} <= {*record.asked}:
                    return record
        return None

    @property
    def folder(self) -> Path:
        return results_folder() / "tables" / self.name

    @property
    def main_metric(self) -> str | None:
        """What comes first, and is compared with papers: `fid`, `fd_mnist`, `rmse`, ..., without its N."""
        if self.metric is not None:
            return PAPER_METRICS[self.metric]
        names = dict.fromkeys(name.split("@")[0] for r in self.records.values() for name in r.metrics)
        protocol = next(iter(self.jobs.values())).protocol
        return protocol.metric if protocol and protocol.metric in names else next(iter(names), None)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics of the records, the main one first; errors stand beside what they are of.

        A run may be in two tables, and its record then has the distance to a reference run for one that asks for none.
        """
        found = dict.fromkeys(
            name
            for record in self.records.values()
            for name in self.measures(record)
            if not name.split("@")[0].endswith(("_se", "_std"))
            and (name.split("@")[0] not in AGAINST_REFERENCE or self.references)
        )
        if not found and self.metric is not None:
            found = {f"{self.main_metric}@{self.images}": None}
        return sorted(found, key=lambda name: name.split("@")[0] != self.main_metric)

    @property
    def images(self) -> int:
        """Images of each run."""
        return len(next(iter(self.jobs.values())).run.seed_range)

    def measures(self, record: Record) -> dict[str, float]:
        """A record's metrics, and the mean squared error where papers report that."""
        squared = {f"mse@{record.images}": record.metrics.get(f"rmse@{record.images}", np.nan) ** 2}
        return (squared if self.metric == "latent MSE" else {}) | record.metrics

    def verdicts(self, metric: str) -> dict[tuple[str, int], Verdict]:
        """Ours beside the paper's, for every cell."""
        compared = metric.split("@")[0] == self.main_metric and self.metric is not None
        records = self.records
        found = {}
        for place, cell in self.cells.items():
            done = [self.measures(records[*place, k]) for k in range(len(cell.jobs)) if (*place, k) in records]
            values = tuple(measured[metric] for measured in done if metric in measured)
            paper = cell.papers[0] if compared and cell.papers else None
            errors = [measured[key] for measured in done if (key := metric.replace("@", "_se@")) in measured]
            error = math.sqrt(fmean(e**2 for e in errors)) if errors else None
            found[place] = Verdict(values, self.images, self.proxy, paper, error)
        return found

    @property
    def proxy(self) -> bool:
        """Whether these runs have another number of images than the papers' or the protocol's."""
        protocol = next(iter(self.jobs.values())).protocol
        wanted = protocol.n if protocol is not None and self.published else None
        return self.limit is not None or wanted not in (None, self.images)

    def curves(self, metric: str) -> dict[str, Curve]:
        """For the figures: ours with their confidence, and the papers'."""
        curves = {row: Curve({}, {}, {}) for row in self.rows}
        for (row, nfe), verdict in self.verdicts(metric).items():
            if verdict.values:
                curves[row].values[nfe] = verdict.mean
                if (half := verdict.confidence) is not None:
                    curves[row].half_widths[nfe] = half
            if verdict.paper is not None:
                curves[row].papers[nfe] = verdict.paper.number
        return {row: curve for row, curve in curves.items() if curve.values or curve.papers}

    def levels(self, metric: str) -> dict[str, float]:
        """What else a metric has: the noise floor (real against real), and the value of the converged sampler, the mean
        over the ranges of seeds."""
        job = next(iter(self.jobs.values()))
        found = {}
        if job.protocol is not None and metric.split("@")[0] == job.protocol.metric and self.records:
            try:
                floor = reference_of(job.protocol).provenance.get("noise_floor")
            except EvodiffError:  # the records came without the reference file
                floor = None
            if floor is not None:
                found["noise floor"] = floor["distance"]
        runs = [run for _, run in self.references.values()]
        if all(replace(run, seeds=runs[0].seeds) == runs[0] for run in runs):
            records = [record for key in self.references if (record := self.record_of(job, key)) is not None]
            if values := [record.metrics[metric] for record in records if metric in record.metrics]:
                found[f"{records[0].run['solver']['name']} at NFE {records[0].nfe}"] = fmean(values)
        return found

    def stem(self, metric: str) -> str:
        prefix = metric.split("@")[0]
        return "fid_vs_nfe" if prefix == self.main_metric else f"{prefix}_vs_nfe"

    def write(self) -> None:
        """All pages into results/tables/<name>."""
        pages.write(self)

    def text(self) -> str:
        return text.markdown(self)


@lru_cache(maxsize=4096)
def _read_record(path: Path, written: int) -> Record | None:
    """Pages ask for the same records many times. None for one of another version, which scoring replaces."""
    try:
        return Record.read(path)
    except StoreError:
        return None


def _sample(job: Job, run: Run | None) -> None:
    if not sample_run(job, run):
        raise EvodiffError("another process still works on it")
