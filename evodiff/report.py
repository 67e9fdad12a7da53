"""Tables: the runs that fill one, and its pages (Markdown, LaTeX, CSV, figures, HTML) made from their records."""

import base64
import csv
import html
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from evodiff.config import build
from evodiff.errors import ConfigError, EvodiffError
from evodiff.experiment import Job, Record, Run, sample_run, score_run, store_of
from evodiff.files import whole_file
from evodiff.metrics.score import reference_of
from evodiff.paths import RESULTS
from evodiff.plots import save_curves, save_sample_sheet
from evodiff.tracking import Tracker


@dataclass(frozen=True)
class Table:
    """Rows of solvers, columns of NFE: each cell is one run with its record."""

    name: str
    title: str
    base: list[str]
    rows: Mapping[str, list[str]]
    nfe: list[int]
    tracker: Tracker

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Table":
        content: Any = OmegaConf.to_container(cfg.table)
        base = [*content["base"], f"device={cfg.device}"]
        return cls(content["name"], content["title"], base, content["rows"], content["nfe"], build(cfg.tracker))

    @cached_property
    def jobs(self) -> dict[tuple[str, int], Job]:
        """Every cell by (row, NFE). Raises ConfigError if two cells are one run or the protocols differ."""
        rows = {row: Job.compose([*self.base, *overrides]) for row, overrides in self.rows.items()}
        jobs = {(row, nfe): job.with_nfe(nfe) for row, job in rows.items() for nfe in self.nfe}
        keys: dict[str, tuple[str, int]] = {}
        for cell, job in jobs.items():
            if (other := keys.setdefault(job.run.key(), cell)) != cell:
                raise ConfigError(f"table {self.name}: cells {other} and {cell} are the same run {job.run.key()}")
        protocols = {job.protocol.hash if job.protocol else None for job in jobs.values()}
        if len(protocols) > 1:
            raise ConfigError(f"table {self.name} mixes {len(protocols)} scoring protocols; one table has one")
        return jobs

    @property
    def reference(self) -> tuple[Job, Run] | None:
        """The converged run that every cell's rmse compares with, and a job that can make it."""
        job = next(iter(self.jobs.values()))
        return (job, job.reference_run) if job.reference_run else None

    def make(self) -> int:
        """Sample and score what is missing, write the pages and print the table.

        A failing cell does not end the others; its reason is printed and the exit code is 1.
        """
        todo: list[tuple[str, Job, Run | None]] = [
            (f"{row}, NFE {n}", job, None) for (row, n), job in self.jobs.items()
        ]
        if self.reference:
            todo.append(("reference run", *self.reference))
        failures = {}
        for label, job, run in todo:
            try:
                if not sample_run(job, run):
                    failures[label] = "another process still works on it"
            except EvodiffError as e:
                failures[label] = str(e)
        for label, job, run in todo:
            try:
                if label not in failures:
                    score_run(job, run)
            except EvodiffError as e:
                failures[label] = str(e)
        for label, reason in failures.items():
            print(f"evodiff: {label}: {reason}", file=sys.stderr)
        if self.records:
            self.write()
            self.tracker.publish(self.name, list(self.records.values()))
            print(self.text())
        return int(bool(failures))

    @property
    def records(self) -> dict[tuple[str, int], Record]:
        """The records there are."""
        found = {}
        for cell, job in self.jobs.items():
            path = self.record_path(job)
            if path is not None:
                found[cell] = Record.read(path)
        return found

    def record_path(self, job: Job, key: str | None = None) -> Path | None:
        """A cell's score.json in its run folder, or the copy committed with the table."""
        key = key or job.run.key()
        places = (job.run.folder.parent / key / "score.json", self.folder / "records" / f"{key}.json")
        return next((path for path in places if path.exists()), None)

    @property
    def folder(self) -> Path:
        return RESULTS / "tables" / self.name

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records.values() for name in record.metrics))

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """row -> NFE -> value."""
        out: dict[str, dict[int, float]] = {row: {} for row in self.rows}
        for (row, nfe), record in self.records.items():
            if metric in record.metrics:
                out[row][nfe] = record.metrics[metric]
        return out

    @cached_property
    def context(self) -> dict[str, dict[str, float]]:
        """Beside each metric: the noise floor (real against real) and the value of the converged sampler."""
        job = next(iter(self.jobs.values()))
        context: dict[str, dict[str, float]] = {metric: {} for metric in self.metrics}
        if job.protocol is not None:
            floor = reference_of(job.protocol).provenance.get("noise_floor")
            for metric in self.metrics:
                if metric.startswith(job.protocol.metric) and floor is not None:
                    context[metric]["noise floor"] = floor["distance"]
        if self.reference and (path := self.record_path(job, self.reference[1].key())):
            record = Record.read(path)
            for metric in self.metrics:
                if metric in record.metrics:
                    context[metric][f"{record.run['solver']['name']} at NFE {record.nfe}"] = record.metrics[metric]
        return context

    def write(self) -> None:
        """All pages into results/tables/<name>, from the records alone; sample sheets where the images are here."""
        if not self.records:
            raise EvodiffError(f"table {self.name} has no records yet. `evodiff table {self.name}` makes them.")
        self._copy_records()
        self._write("table.md", f"# {self.title}\n\n{self.markdown()}")
        self._write("table.tex", self.latex())
        with whole_file(self.folder / "table.csv") as temporary, temporary.open("w", newline="") as f:
            csv.writer(f).writerows(self._csv_rows())
        for metric in self.metrics:
            prefix, n = metric.split("@")
            stem = "fid_vs_nfe" if prefix == self._main_metric() else f"{prefix}_vs_nfe"
            paths = [self.folder / f"{stem}.{kind}" for kind in ("png", "svg")]
            save_curves(paths, self.values(metric), metric, self.context[metric], title=f"{metric} against NFE")
        sheets = self._sheets()
        if sheets:
            save_sample_sheet(self.folder / "samples.png", sheets)
        self._write("report.html", self.html())

    def _main_metric(self) -> str:
        return self.metrics[0].split("@")[0]

    def _copy_records(self) -> None:
        keys = {job.run.key(): job for job in self.jobs.values()}
        if self.reference:
            keys[self.reference[1].key()] = self.reference[0]
        for key, job in keys.items():
            path = self.record_path(job, key)
            if path is not None and path.parent != self.folder / "records":
                Record.read(path).write(self.folder / "records" / f"{key}.json")

    def _sheets(self) -> dict[str, dict[int, np.ndarray]]:
        """The first nine images of each cell whose shards are here."""
        sheets: dict[str, dict[int, np.ndarray]] = {}
        shown = self.nfe if len(self.nfe) <= 8 else [n for n in self.nfe if n in (5, 6, 8, 10, 12, 15, 20, 25)]
        for (row, nfe), job in self.jobs.items():
            if nfe in shown and job.run.folder.exists() and not (store := store_of(job)).missing():
                sheets.setdefault(row, {})[nfe] = store.first(9)
        return sheets

    def _write(self, name: str, text: str) -> None:
        with whole_file(self.folder / name) as temporary:
            temporary.write_text(text)

    def _csv_rows(self) -> Iterator[list[Any]]:
        yield ["solver", "nfe", "metric", "value", "images", "seconds", "run"]
        for (row, nfe), record in self.records.items():
            for metric, value in record.metrics.items():
                yield [row, nfe, metric, repr(value), record.images, record.seconds, record.key]

    def markdown(self) -> str:
        parts = []
        for metric in self.metrics:
            values = self.values(metric)
            best = self._best(metric)
            lines = [f"| {metric} | " + " | ".join(f"NFE {n}" for n in self.nfe) + " |"]
            lines.append("|---" + "|---:" * len(self.nfe) + "|")
            for row, cells in values.items():
                shown = [
                    f"**{show(cells[n])}**" if (row, n) in best else show(cells[n]) if n in cells else "missing"
                    for n in self.nfe
                ]
                lines.append(f"| {row} | " + " | ".join(shown) + " |")
            note = "; ".join(f"{label}: {show(value)}" for label, value in self.context[metric].items())
            parts.append("\n".join(lines) + (f"\n\n{note}" if note else ""))
        return "\n\n".join(parts) + "\n\n" + self._footer() + "\n"

    text = markdown

    def _footer(self) -> str:
        done, total = len(self.records), len(self.jobs)
        job = next(iter(self.jobs.values()))
        scored = f"protocol {job.protocol.name} ({job.protocol.hash})" if job.protocol else "no features"
        return f"{done} of {total} cells done; {scored}; made by `evodiff table {self.name}`."

    def _best(self, metric: str) -> set[tuple[str, int]]:
        """Cells that are lowest in their column; contrast has no best."""
        if metric.startswith("contrast"):
            return set()
        values = self.values(metric)
        best = set()
        for n in self.nfe:
            column = {row: cells[n] for row, cells in values.items() if n in cells}
            if column:
                best.add((min(column, key=column.__getitem__), n))
        return best

    def latex(self) -> str:
        parts = []
        for metric in self.metrics:
            best, values = self._best(metric), self.values(metric)
            lines = [r"\begin{tabular}{l" + "r" * len(self.nfe) + "}", r"\toprule"]
            lines += [f"{_tex(metric)} & " + " & ".join(f"NFE {n}" for n in self.nfe) + r" \\", r"\midrule"]
            for row, cells in values.items():
                shown = [
                    rf"\textbf{{{show(cells[n])}}}" if (row, n) in best else show(cells[n]) if n in cells else "--"
                    for n in self.nfe
                ]
                lines.append(f"{_tex(row)} & " + " & ".join(shown) + r" \\")
            parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """One self-contained page: tables, figures, samples, and the commands that made them."""
        blocks = [f"<h1>{html.escape(self.title)}</h1>", f"<p>{_inline(self._footer())}</p>"]
        for metric in self.metrics:
            prefix = metric.split("@")[0]
            stem = "fid_vs_nfe" if prefix == self._main_metric() else f"{prefix}_vs_nfe"
            blocks.append(f"<h2>{html.escape(metric)}</h2>")
            blocks.append(f"<p>{html.escape(EXPLAINED.get(prefix, ''))}</p>")
            blocks.append(self._html_table(metric))
            blocks.append(f"<figure>{(self.folder / f'{stem}.svg').read_text().partition('<svg')[1]}"
                          f"{(self.folder / f'{stem}.svg').read_text().partition('<svg')[2]}</figure>")  # fmt: skip
        sheet = self.folder / "samples.png"
        if sheet.exists():
            data = base64.b64encode(sheet.read_bytes()).decode()
            blocks.append("<h2>Samples</h2><p>The same nine seeds by every solver at every NFE.</p>")
            blocks.append(f'<figure><img alt="samples" src="data:image/png;base64,{data}"></figure>')
        blocks.append("<h2>How each cell was made</h2>")
        rows = "".join(
            f"<tr><td>{html.escape(row)}</td><td>{nfe}</td><td><code>{html.escape(self.command(row, nfe))}</code></td>"
            f"<td>{record.seconds:.1f}</td><td>{html.escape(record.device)}</td></tr>"
            for (row, nfe), record in self.records.items()
        )
        blocks.append(
            f"<table><tr><th>solver</th><th>NFE</th><th>command</th><th>seconds</th><th>device</th></tr>{rows}</table>"
        )
        return PAGE.format(title=html.escape(self.title), body="\n".join(blocks))

    def command(self, row: str, nfe: int) -> str:
        """What makes one cell by itself."""
        base = [o for o in self.base if not o.startswith("device=")]
        return " ".join(["evodiff run", *base, *self.rows[row], f"nfe={nfe}"])

    def _html_table(self, metric: str) -> str:
        best, values = self._best(metric), self.values(metric)
        head = "".join(f"<th>NFE {n}</th>" for n in self.nfe)
        body = ""
        for row, cells in values.items():
            tds = "".join(
                f'<td class="{"best" if (row, n) in best else ""}">{show(cells[n]) if n in cells else "&ndash;"}</td>'
                for n in self.nfe
            )
            body += f"<tr><td>{html.escape(row)}</td>{tds}</tr>"
        note = "; ".join(f"{label}: {show(value)}" for label, value in self.context[metric].items())
        return f"<table><tr><th></th>{head}</tr>{body}</table><p>{html.escape(note)}</p>"


EXPLAINED = {
    "fd_mnist": "Fréchet distance between features of the samples and of 5,000 real digits, taken from a small digit "
    "classifier. Lower is better. It is not FID. It sees the model's bias as well as the solver's error.",
    "rmse": "Root mean square distance, over pixels in [-1, 1], to the converged solution of the probability-flow ODE "
    "from the same seeds. Lower is better. It sees the solver's error alone.",
    "contrast": "Mean standard deviation of an image's pixels, in grey levels: a solver that adds contrast shows here.",
    "fid": "Fréchet Inception distance under the protocol named above. Lower is better.",
}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; white-space: nowrap; }}
td:has(code) {{ text-align: left; }}
td.best {{ font-weight: 700; background: #eef6ee; }}
code {{ font-size: .8rem; }}
figure {{ margin: 1rem 0; }} img, svg {{ max-width: 100%; height: auto; }}
</style></head><body>
{body}
</body></html>
"""


def show(value: float) -> str:
    """Three significant digits, without an exponent where that reads well."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _tex(text: str) -> str:
    return "".join("\\" + c if c in "_%&#$" else c for c in text)


def _inline(text: str) -> str:
    first, *rest = text.split("`")
    return html.escape(first) + "".join(
        f"<code>{html.escape(part)}</code>" if i % 2 == 0 else html.escape(part) for i, part in enumerate(rest)
    )
