"""A table's report.html: one page that needs nothing else, neither files nor a network."""

import base64
import html as markup
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evodiff.config import compose
from evodiff.plots import foremost
from evodiff.runs.job import without_solver
from evodiff.runs.run import Run
from evodiff.tables import samples
from evodiff.tables.chart import CHART_CSS, CHART_JS, chart
from evodiff.tables.published import STATES, Verdict
from evodiff.tables.text import best, commands, footer, notes, ours_and_paper

if TYPE_CHECKING:
    from evodiff.tables.table import Table

EXPLAINED = {
    "fd_mnist": "Fréchet distance between features of the samples and of 5,000 real digits, taken from a small digit "
    "classifier. Lower is better. It is not FID. It sees the model's bias as well as the solver's error.",
    "rmse": "Root mean square distance, over pixels in [-1, 1] and beyond, to the converged solution of the "
    "probability-flow ODE from the same seeds. Lower is better. It sees the solver's error alone.",
    "rmse_images": "The same of the images: without what was clipped at black and white.",
    "saturated": "Share of pixels at 0 or 255: what a solver pushes beyond the range ends there.",
    "contrast": "Mean standard deviation of an image's pixels, in grey levels: a solver that adds contrast shows here.",
    "fid": "Fréchet Inception distance under the protocol named below. Lower is better.",
    "is": "Inception Score. Higher is better.",
    "mse": "Mean squared distance of the latents to the converged ones of the same seeds. Lower is better.",
}
STATES_EXPLAINED = {
    "ok": "within the tolerance of the paper's number",
    "off": "beyond it",
    "proxy": "on fewer images than the whole table's or the paper's, not comparable",
    "missing": "not run yet",
    "done": "no paper to compare with",
}
MISSING = "–"
TOLERANCE = (
    "Below a number with a published one: that, how surely it was read, and Δ, ours less the paper's, beside the "
    "tolerance. That is two standard deviations of the difference (of one run: as between our seeds, but at least 1 % "
    "of the value at 50,000 images, growing like 1/√N), and half a digit of the paper's number. Where a paper reports "
    "the least of three runs, so do we. Point at a cell for its source."
)
ALWAYS = ("model", "guidance", "noise", "dtype", "precision", "rounding", "threshold")
"""Of a run, what the protocol tells although it be the default; solver, grid, NFE and seeds are told elsewhere."""
ELSEWHERE = ("solver", "grid", "nfe", "seeds")


def page(table: "Table") -> str:
    """The page of the records there are."""
    blocks = [f"<h1>{_text(table.title)}</h1>", f"<p>{_inline(footer(table))}</p>", _states(table)]
    named = foremost(table.curves(table.metrics[0])) if table.metrics else []
    for metric in table.metrics:
        blocks += _metric(table, metric, named)
    sheet = table.folder / "samples.png"
    blocks += _picture(sheet, "Samples", samples.caption(sheet, table))
    blocks += _picture(
        table.folder / "trajectories.png",
        "Trajectories",
        "What the network predicts of one seed's image at each evaluation, from noise on the left to the sample.",
    )
    blocks += _papers_only(table) + _protocol(table) + _commands(table)
    head, middle, end = re.split("TITLE|BODY", PAGE)
    return "".join([head, _text(table.title), middle, "\n".join(blocks), end])


def _states(table: "Table") -> str:
    if table.metric is None:
        return ""
    counts = Counter(v.state for v in table.verdicts(table.metrics[0]).values())
    chips = " ".join(
        f'<span class="chip {state}" title="{_text(STATES_EXPLAINED[state])}">{counts[state]} {state}</span> '
        f"<small>{_text(STATES_EXPLAINED[state])}</small>"
        for state in STATES
        if counts[state]
    )
    return f"<p>{chips}</p>"


def _metric(table: "Table", metric: str, named: Collection[str]) -> list[str]:
    prefix, verdicts = metric.split("@")[0], table.verdicts(metric).values()
    fallback = _image(table.folder / f"{table.stem(metric)}.svg", metric)
    compared, one_set = any(v.paper for v in verdicts), all(len(v.values) < 2 for v in verdicts)
    return [
        f"<h2>{_text(metric)}</h2><p>{_text(EXPLAINED.get(prefix, ''))}</p>",
        chart(table.curves(metric), table.levels(metric), metric, fallback, named, one_set),
        f"<p>{_text(TOLERANCE)}</p>" if compared else "",
        _grid(table, metric),
        f"<p>{_text('; '.join(notes(table, metric, MISSING, 'below ours')))}</p>",
    ]


def _grid(table: "Table", metric: str) -> str:
    lead, verdicts = best(table, metric), table.verdicts(metric)
    head = "".join(f"<th scope=col>NFE {n}</th>" for n in table.nfe)
    body = ""
    for row in table.rows:
        tds = ""
        for nfe in table.nfe:
            verdict = verdicts.get((row, nfe))
            if verdict is None:
                tds += "<td></td>"
                continue
            classes = f"{verdict.state}{' best' if (row, nfe) in lead else ''}"
            tds += f'<td class="{classes}" title="{_text(_told(table, row, nfe, verdict))}">{_cell(verdict)}</td>'
        body += f"<tr><th scope=row>{_text(row)}</th>{tds}</tr>"
    return f"<div class=scroll><table><tr><td></td>{head}</tr>{body}</table></div>"


def _cell(verdict: Verdict) -> str:
    """Ours, and in small lines the paper's number with its confidence, the difference and the state."""
    ours = _text(ours_and_paper(verdict, MISSING).partition(" (")[0])
    if verdict.paper is None:
        return ours
    apart = ""
    if verdict.difference is not None and verdict.tolerance is not None:
        apart = f"Δ {verdict.difference:+.2g} / ±{verdict.tolerance:.2g} "
    lines = (f"{verdict.paper.value} {verdict.paper.confidence}", f"{apart}{verdict.state}")
    return ours + "".join(f"<small>{_text(line)}</small>" for line in lines)


def _told(table: "Table", row: str, nfe: int, verdict: Verdict) -> str:
    told = [f"{row}, NFE {nfe}: {verdict.state}, {STATES_EXPLAINED[verdict.state]}"]
    if verdict.values:
        told.append(f"{len(verdict.values)} of {len(table.cells[row, nfe].jobs)} runs")
    if verdict.difference is not None and verdict.tolerance is not None:
        told.append(f"difference {verdict.difference:+.3g}, tolerance {verdict.tolerance:.2g}")
    if verdict.paper is not None:
        told += [f"{p.value}: {p.cite} ({p.confidence}{', ' if p.variant else ''}{p.variant})"
                 for p in table.cells[row, nfe].papers]  # fmt: skip
    return "\n".join(told)


def _picture(path: Path, title: str, explained: str) -> list[str]:
    if not path.exists():
        return []
    return [f"<h2>{title}</h2><p>{explained}</p>", f"<figure>{_image(path, title.lower())}</figure>"]


def _image(path: Path, alt: str) -> str:
    if not path.exists():
        return ""
    kind = {"png": "image/png", "svg": "image/svg+xml"}[path.suffix[1:]]
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(alt)}" src="data:{kind};base64,{data}">'


def _papers_only(table: "Table") -> list[str]:
    found = table.papers_only
    if not found:
        return []
    grouped: dict[tuple[str, ...], list[str]] = {}
    for p in found:
        value = p.value if p.nfe is None else f"{p.value}&#8239;@{p.nfe}"
        about = (p.method, p.variant, p.metric, p.cite, p.confidence, p.model)
        grouped.setdefault(about, []).append(value)
    rows = [[*map(_text, about[:2]), ", ".join(values), *map(_text, about[2:])] for about, values in grouped.items()]
    return [
        "<h2>Published only</h2><p>Numbers without a cell above: trained or searched methods, settings that are not "
        "stated, other networks of the same data, other ways of scoring.</p>",
        _details(
            f"{len(found)} number{'s' * (len(found) > 1)}",
            _rows(["method", "variant", "value @NFE", "metric", "source", "confidence", "network"], rows),
        ),
    ]


def _protocol(table: "Table") -> list[str]:
    protocol = next(iter(table.jobs.values())).protocol
    records = list(table.records.values())
    facts: list[tuple[str, Any]] = [*protocol.describe().items()] if protocol else [("features", "none are taken")]
    facts += dict.fromkeys(
        (f"sha256 of {name}", digest) for r in records for name, digest in (r.weights | r.files).items()
    )
    facts += _settings(table)
    seeds = sorted({job.run.seeds for job in table.jobs.values()})
    facts += [("seeds", ", ".join(f"{first}-{last}" for first, last in seeds))]
    facts += [("reference run", command) for command in _references(table)]
    made_by = sorted({", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records})
    made_on = sorted({r.device for r in records})
    facts += [("versions", "; ".join(made_by) or "–"), ("device", "; ".join(made_on) or "–")]
    return ["<h2>Protocol</h2>", _rows([], [[_text(str(k)), f"<code>{_text(str(v))}</code>"] for k, v in facts])]


def _settings(table: "Table") -> list[tuple[str, str]]:
    """What the runs were made with besides solver, grid and seeds: what differs between them, with the cells it is of,
    the most common last."""
    runs = {place[:2]: job.run.as_dict() for place, job in table.jobs.items()}  # of its sets of seeds one is as another
    common = compose("run", [])
    facts = []
    for key in (field.name for field in fields(Run) if field.name not in ELSEWHERE):
        cells: dict[str, list[tuple[str, int]]] = {}
        for place, run in runs.items():
            cells.setdefault(_setting(run[key]), []).append(place)
        *others, (usual, _) = sorted(cells.items(), key=lambda item: len(item[1]))
        facts += [(key, f"{value}, of {_places(table, places)}") for value, places in others]
        if others or key in ALWAYS or usual != _setting(common[key]):
            facts.append((key, f"{usual}{', of all others' * bool(others)}"))
    return facts


def _setting(value: Any) -> str:
    """A group by its name and fields."""
    if not isinstance(value, Mapping):
        return str(value)
    return f"{value['name']} ({', '.join(f'{k}={v}' for k, v in value.items() if k != 'name')})"


def _places(table: "Table", places: Iterable[tuple[str, int]]) -> str:
    """Rows, and those of which these are only some of the cells with their NFE."""
    budgets: dict[str, list[int]] = {}
    for row, nfe in places:
        budgets.setdefault(row, []).append(nfe)
    return "; ".join(
        row if len(found) == len(table.rows[row].nfe) else f"{row} at NFE {' and '.join(map(str, found))}"
        for row, found in budgets.items()
    )


def _references(table: "Table") -> list[str]:
    """The commands of the converged runs."""
    of = {job.reference_run.key(): (row, nfe) for (row, nfe, _), job in table.jobs.items() if job.reference_run}
    found = []
    for key, job in table.references.items():
        overrides = [*table.base, *table.cells[of[key]].overrides]
        own = compose("run", overrides).reference_run
        kept = [text for text in without_solver(overrides) if not text.startswith("seeds=")]
        words = ["evodiff", "run", *kept, *map(str, own), "seeds={}-{}".format(*job.run.seeds)]
        found.append(shlex.join(words))
    return found


def _commands(table: "Table") -> list[str]:
    records = table.records
    rows = []
    for (row, nfe), cell in table.cells.items():
        for k, command in enumerate(commands(table, cell)):
            record = records.get((row, nfe, k))
            seconds = f"{record.seconds:.1f}" if record is not None else "&ndash;"
            rows.append([_text(row), str(nfe), f"<code>{_text(command)}</code>", seconds])
    listing = _rows(["method", "NFE", "command", "seconds"], rows)
    return ["<h2>How each cell is made</h2>", _details(f"{len(rows)} commands", listing, len(rows) <= 30)]


def _details(summary: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{_text(summary)}</summary>{content}</details>"


def _rows(head: Collection[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th scope=col>{_text(name)}</th>" for name in head)
    first = f"<tr>{titles}</tr>" if head else ""
    body = "".join(
        f"<tr><th scope=row>{name}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>" for name, *cells in rows
    )
    return f"<div class=scroll><table class=facts>{first}{body}</table></div>"


def _text(words: str) -> str:
    return markup.escape(words, quote=True)


def _inline(words: str) -> str:
    """Text whose `code` is marked."""
    parts = [f"<code>{_text(part)}</code>" if i % 2 else _text(part) for i, part in enumerate(words.split("`"))]
    return "".join(parts)


PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>TITLE</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; }} h2 {{ font-size: 1.25rem; margin-top: 2.2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff; }}
th[scope=row] {{ font-weight: 400; }} td.best {{ font-weight: 700; }}
td small {{ display: block; color: #777; font-weight: 400; line-height: 1.1; }}
td.ok, .chip.ok {{ background: #e7f4e8; }} td.off, .chip.off {{ background: #fbe3dd; }}
td.proxy, .chip.proxy {{ background: #fdf3d6; }} td.missing {{ color: #999; }} .chip.missing {{ background: #eee; }}
.chip {{ padding: .15rem .6rem; border-radius: 1rem; margin-right: .5rem; font-size: .85rem; background: #eef; }}
table.facts td, table.facts th {{ text-align: left; white-space: normal; }}
table.facts th[scope=row] {{ width: min(17.5rem, 35vw); overflow-wrap: anywhere; }}
table.facts code {{ white-space: normal; word-break: break-word; }}
code {{ font-size: .8rem; }} summary {{ cursor: pointer; }}
figure {{ margin: 1rem 0; }} img {{ max-width: 100%; height: auto; }}
{CHART_CSS}</style></head><body>
BODY
<script>{CHART_JS}</script>
</body></html>
"""
