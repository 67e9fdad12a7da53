"""The figure of a report: a metric against NFE, drawn in the reader's browser from the numbers beside it."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from evodiff.plots import COLOURS, Curve


def chart(
    curves: dict[str, Curve],
    lines: dict[str, float],
    label: str,
    fallback: str,
    named: Collection[str] | None = None,
    one_set: bool = False,
) -> str:
    """A block that chart.js fills; `fallback` is shown where no script runs.

    Of methods that are not `named` (None: all are) the legend has a name alone, which shows them. `one_set` of seeds
    has no spread between runs: the confidence is then that of its images.
    """
    first = [name for name in curves if named is None or name in named] or list(curves)
    looks = [*first, *(name for name in curves if name not in first)]  # the plainest are of those shown
    rows: list[dict[str, Any]] = []
    for name, curve in curves.items():
        look = looks.index(name)
        points = [[n, curve.values[n], curve.half_widths.get(n, 0)] for n in sorted(curve.values)]
        papers = [[n, curve.papers[n]] for n in sorted(curve.papers)]
        row = {"name": name, "colour": COLOURS[look % 10], "dash": look // 10, "ours": points, "papers": papers}
        rows.append(row | ({} if name in first else {"off": True}))
    data = json.dumps({"label": label, "rows": rows, "lines": lines}).replace("</", "<\\/")
    budgets = [n for curve in curves.values() for n in (*curve.values, *curve.papers)]
    wide = bool(budgets) and max(budgets) > 8 * min(budgets)
    idle = {"bands": not any(c.half_widths for c in curves.values()), "papers": not any(row["papers"] for row in rows)}
    names = SWITCHES | ({"bands": OF_IMAGES} if one_set else {})
    switches = "".join(
        f'<label><input type="checkbox" name="{name}"{" checked" if wide or name != "logx" else ""}> {text}</label>'
        for name, text in names.items()
        if not idle.get(name)
    )
    return (
        f'<div class="chart"><script type="application/json">{data}</script>'
        f'<div class="switches">{switches}</div><figure></figure><div class="legend"></div>'
        f"<noscript>{fallback}</noscript></div>"
    )


SWITCHES = {
    "logy": "logarithmic axis",
    "logx": "logarithmic NFE",
    "bands": "95 % confidence, between runs",
    "papers": "papers (hollow)",
}
OF_IMAGES = "±1.96 standard errors, from one run's images"
"""No confidence of 95 %: sets of seeds differ by more (docs/results.md)."""

CHART_CSS = """
.chart figure { margin: .3rem 0; } .chart figure svg { width: 100%; height: auto; }
.chart svg text { font: 12px system-ui, sans-serif; fill: #555; }
.switches label { margin-right: 1.2rem; font-size: .85rem; white-space: nowrap; }
.legend button { border: 0; background: none; font: .85rem system-ui, sans-serif; padding: .1rem .5rem; }
.legend { margin-bottom: .8rem; } .legend button { cursor: pointer; } .legend button.off { opacity: .35; }
.legend svg { width: 2.4rem; height: .3rem; vertical-align: middle; margin-right: .35rem; }
.chart g.row { transition: opacity .1s; } .chart figure.dim g.row:not(.lit) { opacity: .15; }
"""

CHART_JS = Path(__file__).with_name("chart.js").read_text(encoding="utf-8")
