"""Tables: the runs that fill one, what papers report beside them, and the pages made from both."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import numpy as np
from omegaconf import DictConfig

from evodiff.config import build, compose
from evodiff.errors import ConfigError, EvodiffError, StoreError
from evodiff.locks import locked
from evodiff.metrics.distances import AGAINST_REFERENCE, OF_IMAGES
from evodiff.metrics.score import METRICS, reference_of, result_names
from evodiff.paths import results_folder
from evodiff.plots import Curve
from evodiff.runs.job import Job
from evodiff.runs.record import Record
from evodiff.runs.sample import sample_run
from evodiff.runs.score import check_scorable, current_record, score_files, score_run
from evodiff.tables import inputs, pages, text, trajectory
from evodiff.tables.cells import Cell, Row, with_seeds
from evodiff.tables.content import PAPER_METRICS, checked, chosen
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
    chosen: Set[tuple[str, int]]
    """The cells that `make` makes, (row, NFE)."""
    tracker: Tracker
    device: str
    seeds: tuple[range, ...]
    limit: int | None
    repeats: int | None
    """How many ranges of seeds, where these are not all; so is `limit`, the images of each range."""
    published: str | None
    metric: str | None
    changes: tuple[str, ...] = ()
    """Overrides of what its file says."""

    @classmethod
    def of_file(cls, name: str, overrides: Sequence[str] = ()) -> "Table":
        """The table of configs/table/NAME.yaml. Raises ConfigError for a file that cannot be read, or is another's."""
        if any(text.lstrip("+~").split("=")[0] == "table.name" for text in overrides):
            raise ConfigError("table.name cannot be changed: a table has the name of its file. Leave it out.")
        cfg = compose("table", [f"table={name}", *overrides])
        if cfg.table.name != name:  # its results would take the place of the other's
            raise ConfigError(
                f"configs/table/{name}.yaml says name: {cfg.table.name}, but a table has the name of its file: leave "
                f"that line out, or write name: {name}."
            )
        return cls.from_config(cfg, tuple(text for text in overrides if text.lstrip("+~").startswith("table.")))

    @classmethod
    def from_config(cls, cfg: DictConfig, changes: Sequence[str] = ()) -> "Table":
        """`changes` are the overrides of what its file says. Raises ConfigError for what is no table."""
        content, rows, seeds = checked(cfg)
        spans = seeds or ([Job.compose(content["base"]).run.seed_range] if cfg.limit else [])
        return cls(
            config=content["name"],
            title=content["title"],
            base=content["base"],
            rows=rows,
            chosen=chosen(cfg, rows),
            tracker=build(cfg.tracker),
            device=cfg.device,
            seeds=seeds,
            limit=cfg.limit if any(len(span) > (cfg.limit or len(span)) for span in spans) else None,
            repeats=cfg.repeats if len(seeds) < len(content.get("seeds") or ()) else None,
            published=content.get("published"),
            metric=content.get("metric"),
            changes=tuple(sorted(changes)),
        )

    @property
    def name(self) -> str:
        """A trial has pages of its own, and so has a part of the seeds, or another content than the file's."""
        trial = "" if self.limit is None else f"-{self.limit}"
        part = "" if self.repeats is None else f"-repeats{self.repeats}"
        digest = sha256(" ".join(self.changes).encode()).hexdigest()[:6]
        return self.config + trial + part + (f"-{digest}" if self.changes else "")

    @property
    def overrides(self) -> list[str]:
        """Those that make it another than the table of its file."""
        numbers = (("limit", self.limit), ("repeats", self.repeats))
        return [*self.changes, *(f"{key}={n}" for key, n in numbers if n is not None)]

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

    @property
    def todo(self) -> dict[tuple[str, int, int], Job]:
        """The jobs of the cells that are to be made."""
        return {place: job for place, job in self.jobs.items() if place[:2] in self.chosen}

    @cached_property
    def references(self) -> dict[str, Job]:
        """By key, what makes the converged runs that the cells' rmse compares with."""
        references = [job.reference for job in self.jobs.values()]
        return {reference.run.key(): reference for reference in references if reference is not None}

    def make(self) -> int:
        """Make what is missing, write the pages and print the table.

        A failing cell does not end the others, whatever it raises; its reason is printed and the exit code is 1.
        """
        failures = Failures()
        self.make_inputs(failures)
        self.make_runs(failures)
        failures.tell()
        self.show()
        return int(bool(failures.reasons))

    def make_runs(self, failures: Failures) -> None:
        """Sample and score what cells are compared with, then the cells, and picture a trajectory of each method.

        What cannot be scored is not sampled. A trajectory that fails is told, and is no failure of the table.
        """
        cells = [(f"{row}, NFE {nfe}", job) for (row, nfe, _), job in self.todo.items()]
        cells = [(label, job) for label, job in cells if failures.attempt(label, check_scorable, job)]
        for reference in self._references_of([job for _, job in cells]):
            failures.attempt("reference run", _sample_and_score, reference)
        for label, job in cells:
            failures.attempt(label, _sample_and_score, job)
        pictures = Failures()
        for row, job in trajectory.shown(self).items():
            pictures.attempt(f"trajectory of {row}", trajectory.make, job)
        pictures.tell()

    @property
    def unfinished(self) -> bool:
        """Whether `make_runs` has something to do when the cells are done: reference runs without a score, or
        trajectories."""
        return bool(self._references_of([*self.todo.values()])) or any(
            map(trajectory.is_missing, trajectory.shown(self).values())
        )

    def _references_of(self, jobs: Sequence[Job]) -> list[Job]:
        """The converged runs that jobs without a current record are compared with, and those without a record."""
        pairs = [(job, reference) for job in jobs if (reference := job.reference) is not None]
        return list(
            {
                reference.run.key(): reference
                for job, reference in pairs
                if current_record(job) is None or self.record_of(reference) is None
            }.values()
        )

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
                failures.attempt(missing.what, inputs.make, missing, self.device)

    def show(self) -> None:
        """Write the pages, publish them and print the table, of what there is."""
        if self.records:
            self.write()
            self.publish(self.tracker)
            print(self.text())

    def publish(self, tracker: Tracker) -> bool:
        """Show the records by a tracker, beside the papers' numbers; False if that did not work."""
        found = self.records
        records = [replace(record, metrics=self.measures(record)) for record in found.values()]
        papers = {metric: {row: curve.papers for row, curve in self.curves(metric).items()} for metric in self.metrics}
        return tracker.publish(self.name, records, labels=[row for row, *_ in found], published=papers)

    @property
    def records(self) -> dict[tuple[str, int, int], Record]:
        """The records there are, of this table's protocol."""
        found = {}
        for place, job in self.jobs.items():
            record = self.record_of(job)
            if record is not None:
                found[place] = record
        return found

    @property
    def keys(self) -> dict[tuple[str, int, int], str]:
        return {place: job.run.key() for place, job in self.jobs.items()}

    def record_of(self, job: Job) -> Record | None:
        """The record in a run's folder, or the copy committed with the table, also with the whole one of which this
        is a part; None if none is there, or if it was scored by another protocol, lacks a metric, or has its errors
        from another reference run."""
        wanted = job.protocol.hash if job.protocol else None
        reference = job.reference_run.key() if job.reference_run else None
        name = f"{job.run.key()}.json"
        copies = [folder / "records" / name for folder in (self.folder, self.folder.with_name(self.config))]
        for path in filter(Path.exists, (*score_files(job), *copies)):
            record = _read_record(path, path.stat().st_mtime_ns)
            if (
                record is not None
                and (record.protocol or {}).get("hash") == wanted
                and job.measured <= {*record.asked}
                and reference in (None, record.reference_run)
            ):
                return record
        return None

    @property
    def folder(self) -> Path:
        return results_folder() / "tables" / self.name

    @property
    def main_metric(self) -> str | None:
        """What comes first, and is compared with papers: `fid@50000`, `fd_mnist@1000`, `rmse@64`, ..."""
        if self.metric is not None:
            return f"{PAPER_METRICS[self.metric]}@{self.images}"
        protocol = next(iter(self.jobs.values())).protocol
        wanted = f"{protocol.metric}@{self.images}" if protocol else None
        return wanted if wanted in self._measured else next(iter(self._measured), None)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics of the records, the main one first; errors stand beside what they are of."""
        main = self.main_metric
        return ([] if main is None else [main]) + [name for name in self._measured if name != main]

    @property
    def _measured(self) -> dict[str, None]:
        """What the cells ask for, as far as there are records. A run may be in two tables, and its record then has more
        than one of them asks for."""
        asked = {name for job in self.jobs.values() for name in _results(job)}
        names = dict.fromkeys(name for record in self.records.values() for name in self.measures(record))
        shown = asked | ({self.main_metric} if self.metric is not None else set())
        return {name: None for name in names if name in shown}

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
        compared = self.metric is not None and metric == self.main_metric
        images = int(metric.split("@")[1])
        records = self.records
        found = {}
        for place, cell in self.cells.items():
            done = [self.measures(records[*place, k]) for k in range(len(cell.jobs)) if (*place, k) in records]
            values = tuple(measured[metric] for measured in done if metric in measured)
            paper = cell.papers[0] if compared and cell.papers else None
            errors = [measured[key] for measured in done if (key := metric.replace("@", "_se@")) in measured]
            error = math.sqrt(fmean(e**2 for e in errors)) if errors else None
            found[place] = Verdict(values, images, self.is_proxy(images), paper, error)
        most = max((len(verdict.values) for verdict in found.values()), default=0)
        return {place: replace(v, fewer=0 < len(v.values) < most) for place, v in found.items()}

    def is_proxy(self, images: int) -> bool:
        """Whether a metric of so many images has another number of them than the papers' or the protocol's."""
        protocol = next(iter(self.jobs.values())).protocol
        wanted = protocol.n if protocol is not None and self.published else None
        return images == self.limit or wanted not in (None, images)

    def curves(self, metric: str) -> dict[str, Curve]:
        """For the figures: ours with their confidence, and the papers'. A point of fewer sets of seeds than others have
        would bend its curve."""
        curves = {row: Curve({}, {}, {}) for row in self.rows}
        for (row, nfe), verdict in self.verdicts(metric).items():
            if verdict.values and not verdict.fewer:
                curves[row].values[nfe] = verdict.mean
                if (half := verdict.confidence) is not None:
                    curves[row].half_widths[nfe] = half
            if verdict.paper is not None:
                curves[row].papers[nfe] = verdict.paper.number
        return {row: curve for row, curve in curves.items() if curve.values or curve.papers}

    def levels(self, metric: str) -> dict[str, float]:
        """What else a metric has: the noise floor (real against real, and how many of these), and the value of the
        converged sampler, the mean over the ranges of seeds."""
        job = next(iter(self.jobs.values()))
        found = {}
        if job.protocol is not None and metric.split("@")[0] == job.protocol.metric and self.records:
            try:
                floor = reference_of(job.protocol).provenance.get("noise_floor")
            except EvodiffError:  # the records came without the reference file
                floor = None
            if floor is not None:
                found[f"noise floor at {floor['n']:,}"] = floor["distance"]
        runs = [job.run for job in self.references.values()]
        if all(replace(run, seeds=runs[0].seeds) == runs[0] for run in runs):
            jobs = self.references.values()
            records = [record for reference in jobs if (record := self.record_of(reference)) is not None]
            if values := [record.metrics[metric] for record in records if metric in record.metrics]:
                found[f"{records[0].run['solver']['name']} at NFE {records[0].nfe}"] = fmean(values)
        return found

    def stem(self, metric: str) -> str:
        """What a metric's figure is called: the main one's always the same; others have their N if it is not the runs',
        or if they would take the main one's name."""
        prefix, _, images = metric.partition("@")
        if metric == self.main_metric:
            return "fid_vs_nfe"
        alone = images == str(self.images) and prefix != "fid"
        return f"{prefix}_vs_nfe" if alone else f"{prefix}_{images}_vs_nfe"

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


def _results(job: Job) -> Set[str]:
    """What a table shows of the metrics that a job asks for."""
    n = len(job.run.seed_range)
    of_samples = job.measured & {*OF_IMAGES, *AGAINST_REFERENCE}
    scored = result_names([name for name in job.metrics if name in METRICS], job.protocol, n) if job.protocol else set()
    return {f"{name}@{n}" for name in of_samples} | scored


def _sample_and_score(job: Job) -> None:
    """A record after every run: of a table that is broken off, what was made is seen. The network stays loaded, and so
    does the extractor (evodiff.runs.loaded, evodiff.metrics.score)."""
    if not sample_run(job):
        raise EvodiffError("another process still works on it")
    score_run(job)
