"""What a table's runs read besides weights and references: model statistics, searched grids, prompts, pipelines."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evodiff.paths import resolve
from evodiff.runs.job import has_images
from evodiff.runs.run import Run

if TYPE_CHECKING:
    from evodiff.tables.table import Table


class Missing(NamedTuple):
    """A file or folder that is not here, how to get it, and the arguments of `evodiff` that make it, if it can."""

    what: str
    how: str
    argv: tuple[str, ...] = ()


def missing_inputs(table: "Table") -> list[Missing]:
    """Of the cells that are to be sampled, in the order of the rows, each once."""
    fields = [override for override in table.base if override.startswith("model.")]
    runs = [job.run for job in table.todo.values() if not has_images(job)]
    return list(dict.fromkeys(m for run in runs for m in _of_run(run, [f"model={run.model['name']}", *fields])))


def make(missing: Missing, device: str) -> None:
    """Compute it. Raises EvodiffError."""
    from evodiff import ems, gits

    command, *rest = (*missing.argv, f"device={device}")
    {"stats": lambda argv: ems.main(argv[1:]), "gits": gits.main}[command](rest)


def _of_run(run: Run, model: list[str]) -> Iterator[Missing]:
    """`model` are the overrides that choose its model."""
    for folder in run.named("folder"):
        if resolve(f"{folder}/l.npz").exists():  # written last: a computation may have been broken off
            continue
        what = f"statistics {folder}"
        # the name says how many: NODES-SAMPLES, and the end time where it is not the schedule's
        size = re.search(r"-(\d+)-(\d+)(?:-(1e-\d))?$", folder)
        if run.guidance["name"] != "none" or size is None:
            yield Missing(what, "l.npz and sb.npz of the guided model, as released with DPM-Solver-v3")
        else:
            end = [f"t_end={size[3]}"] if size[3] else []
            argv = ("stats", "ems", *model, f"nodes={size[1]}", f"samples={size[2]}", *end, f"out={resolve(folder)}")
            yield Missing(what, _command(argv), argv)
    if run.grid["name"] == "file" and not resolve(run.grid["path"]).exists():
        what, searched = f"grid {run.grid['path']}", f"gits_{run.model['name']}.json"
        if Path(run.grid["path"]).name == searched:
            argv = ("gits", *model, "steps=4-25", f"out={resolve(run.grid['path'])}")
            yield Missing(what, _command(argv), argv)
        else:  # under a mistyped name of someone's own grid nothing is to be invented
            yield Missing(what, f"a JSON file of times; a table computes only what is called {searched}")
    if (prompts := run.model.get("prompts")) and not resolve(prompts).exists():
        yield Missing(f"prompts {prompts}", "a text file with one prompt per line")
    pipeline = str(run.model.get("pipeline", ""))
    if pipeline.startswith("checkpoints/") and not resolve(pipeline).exists():
        yield Missing(f"model {pipeline}", "a folder that diffusers reads (model_index.json)")


def _command(argv: tuple[str, ...]) -> str:
    return f"`{shlex.join(['evodiff', *argv])}`"
