"""Work beside the sampling: the next noise is drawn and the last shard written while the network computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def one_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """make(item) of every item in order, each made on a thread while the one before is used.

    Left before its end it waits for nothing: the garbage collector may close it while a thread is being started, and
    waiting for another one there never ends. The thread goes when nobody has its executor.
    """
    thread = ThreadPoolExecutor(1)
    ready: Future[Made] | None = None
    for item in items:
        next_one = thread.submit(make, item)
        if ready is not None:
            yield ready.result()
        ready = next_one
    if ready is not None:
        yield ready.result()


class OneBehind:
    """Calls done on a thread, one at a time: a new one waits for the last, so no more than one piece of work is held.

    An error of a call is raised by the next one, or at the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __call__(self, function: Callable[..., None], *args: Any) -> None:
        self._wait()
        self._last = self._thread.submit(function, *args)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self._wait()
