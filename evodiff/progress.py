"""Progress of long work: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evodiff.ranks import rank

LINE_EVERY = 60.0
"""Seconds between two lines where the output is no terminal."""


@contextmanager
def progress(label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`; shows the rate and the time left on standard error, of torchrun's ranks on that of rank 0."""
    if rank() > 0:
        yield lambda n: None
        return
    with (_bar if sys.stderr.isatty() else _lines)(label, total, unit) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, started = bar.add_task(label, total=total, rate=""), time.monotonic()

        def advance(n: int) -> None:
            bar.advance(task, n)
            done = bar.tasks[0].completed
            bar.update(task, rate=f"{done / max(time.monotonic() - started, 1e-9):.0f} {unit}/s")

        yield advance


@contextmanager
def _lines(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY and done < total:
            rate = done / (now - started)
            left = (total - done) / rate
            print(
                f"{label}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left", file=sys.stderr, flush=True
            )
            last = now

    yield advance
    seconds = max(time.monotonic() - started, 1e-9)
    rate = done / seconds
    print(f"{label}: {done}/{total} {unit} in {seconds:.1f} s, {rate:.0f} {unit}/s", file=sys.stderr, flush=True)
