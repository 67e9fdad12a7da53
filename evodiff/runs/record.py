"""What is written down of a finished run."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evodiff.errors import StoreError
from evodiff.files import whole_file


@dataclass(frozen=True)
class Record:
    """score.json: everything needed to repeat one cell and to judge it.

    `seconds` is what sampling took on `device`, `versions` are those that scored. `asked` are the metrics that were
    asked for, `files` the sha256 of extractor and reference in full.
    """

    key: str
    run: dict[str, Any]
    protocol: dict[str, Any] | None
    metrics: dict[str, float]
    nfe: int
    network_passes: int
    images: int
    seconds: float
    weights: dict[str, str]
    shards: dict[str, str]
    reference_run: str | None
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises StoreError for a file that is no record, or one of another version of this project."""
        try:
            record = cls(**json.loads(path.read_text()))
            of_type = {"metrics": dict, "run": dict, "shards": dict, "versions": dict, "asked": list, "files": dict}
            if wrong := [name for name, kind in of_type.items() if not isinstance(getattr(record, name), kind)]:
                raise TypeError(f"{wrong[0]} is of another type")
            if not isinstance(record.protocol, dict | None):
                raise TypeError("protocol is of another type")
            return record
        except (OSError, ValueError, TypeError) as e:
            raise StoreError(f"{path} cannot be read as a record ({e}). Remove it: it is made anew by scoring.") from e

    def write(self, path: Path) -> None:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("evodiff", "torch", "numpy")}
