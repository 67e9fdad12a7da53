"""Trackers: records go in, a dashboard comes out. A tracker is a view; the records stay on disk."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from evodiff.experiment import Record


class Tracker(Protocol):
    """What a `configs/tracker/*.yaml` builds."""

    def publish(self, name: str, records: "list[Record]") -> None:
        """Show the records of one run or table called `name`."""
        ...


class Silent:
    """Publishes nothing."""

    def publish(self, name: str, records: "list[Record]") -> None:
        pass
