"""The process that speaks to Weights & Biases: what to show comes as JSON on standard input (see tracking.WandB).

Ends with 0, or with 1 after one line on standard output that says what went wrong.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from evodiff.paths import results_folder

NOTE = "evodiff.json"
"""In the folder of a run: where it is to be shown, and its tags. wandb keeps them in its own binary file."""


def push(content: dict[str, Any]) -> None:
    """Write every run, and the table's own; in the online mode its report as well."""
    for run in content["runs"]:
        given = {key: run[key] for key in ("id", "name", "group", "tags", "job_type", "config")}
        with _wandb_run(content, **given) as shown:
            if run["grid"]:
                import wandb

                shown.log({"grid": wandb.Image(run["grid"])}, step=0)  # a step given twice counts once
            shown.summary.update(run["summary"])
    if content["table"]:
        _push_table(content, content["table"])
        if content["mode"] == "online":
            _save_report(content, content["table"])


def _push_table(content: dict[str, Any], table: dict[str, Any]) -> None:
    import wandb

    name = table["name"]
    with _wandb_run(content, id=f"table-{name}", name=name, group=name, job_type="table", config={}) as shown:
        panels: dict[str, Any] = {"cells": wandb.Table(columns=table["columns"], data=table["lines"])}
        for metric, curves in table["curves"].items():
            xs, ys = ([curve[i] for curve in curves.values()] for i in (0, 1))
            panels[chart_key(metric)] = wandb.plot.line_series(
                xs=xs, ys=ys, keys=list(curves), title=f"{name}: {metric} against NFE", xname="NFE"
            )
        shown.log(panels)


def chart_key(metric: str) -> str:
    """A name that W&B can query: letters, digits, underscores."""
    return re.sub(r"\W", "_", f"{metric}_against_nfe")


@contextmanager
def _wandb_run(content: dict[str, Any], tags: Sequence[str] = (), **given: Any) -> Iterator[Any]:
    """A run that keeps the tags it has. Of several offline copies of one run in one project the last is kept: it has
    everything, and `wandb sync` would count each."""
    import wandb

    (folder := results_folder()).mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
    where = {key: content[key] for key in ("project", "entity")}
    how = {"mode": content["mode"], "resume": "allow", "reinit": "finish_previous", "settings": settings}
    with wandb.init(dir=folder, **where, **how, **given) as shown:
        older = _older_copies(shown, where) if shown.settings.mode == "offline" else {}
        shown.tags = all_tags = sorted({*(shown.tags or ()), *chain(*older.values()), *tags})
        (Path(shown.dir).parent / NOTE).write_text(json.dumps({"where": where, "tags": all_tags}))
        yield shown
    for copy in older:
        shutil.rmtree(copy, ignore_errors=True)


def _older_copies(shown: Any, where: dict[str, Any]) -> dict[Path, list[str]]:
    """The other offline copies of a run that are for the same place, with their tags; one without our note may be for
    any."""
    found = {}
    for note in Path(shown.dir).parent.parent.glob(f"offline-run-*-{shown.id}/{NOTE}"):
        with suppress(OSError, ValueError):  # the process that wrote it may have died
            told = json.loads(note.read_text())
            if told["where"] == where:
                found[note.parent] = told["tags"]
    return found


def report(content: dict[str, Any], table: dict[str, Any]) -> Any:
    """A W&B report of a table: its curves and cells, and its runs with their grids. None without wandb-workspaces."""
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        return None
    where = {"project": content["project"], "entity": content["entity"]}
    # by the tag, for the group of a run that is in several tables is one of them
    runs = wr.Runset(**where, name="cells", filters=f"Tags() in ['{table['name']}'] and JobType != 'table'")
    summary = wr.Runset(**where, name="table", filters=f"Group == '{table['name']}' and JobType == 'table'")
    scatter = [wr.ScatterPlot(title=metric, x="s:nfe", y=f"s:{metric}", log_y=True) for metric in table["curves"]]
    fields = {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"}
    curves = [
        wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{chart_key(metric)}_table"}},
            chart_name="wandb/lineseries/v0",
            chart_fields=fields,
            chart_strings={"title": f"{metric} against NFE", "xname": "NFE"},
        )
        for metric in table["curves"]
    ]
    return wr.Report(
        **where,
        title=f"evodiff: {table['name']}",
        description="Made from the records by `evodiff wandb push`.",
        blocks=[
            wr.H1(table["name"]),
            wr.PanelGrid(runsets=[summary], panels=[wr.WeavePanelSummaryTable(table_name="cells"), *curves]),
            wr.PanelGrid(runsets=[runs], panels=[*scatter, wr.MediaBrowser(media_keys=["grid"])]),
        ],
    )


def _save_report(content: dict[str, Any], table: dict[str, Any]) -> None:
    try:
        if (made := report(content, table)) is not None:
            made.save()
    except Exception as e:  # the runs are there, and show the same
        print(f"the report was not saved ({' '.join(f'{type(e).__name__}: {e}'.split())})")


def main() -> int:
    try:
        push(json.load(sys.stdin))
    except ImportError as e:
        print(f"wandb is not installed ({e}): pip install -e '.[wandb]'")
        return 1
    except Exception as e:
        print(" ".join(f"{type(e).__name__}: {e}".split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
