"""Where the project keeps what it reads and writes."""

import os
from pathlib import Path

from evodiff.errors import ConfigError

ROOT = Path(os.environ.get("EVODIFF_ROOT") or Path(__file__).resolve().parent.parent).expanduser().absolute()
CONFIGS = ROOT / "configs"
CHECKPOINTS = ROOT / "checkpoints"
_STARTED_IN = Path.cwd()


def results_folder() -> Path:
    """Where runs and tables are: EVODIFF_RESULTS, from where the program was started, or results/."""
    return _STARTED_IN / Path(os.environ.get("EVODIFF_RESULTS") or ROOT / "results").expanduser()


def resolve(path: str | Path) -> Path:
    """A file or folder that a configuration names: as it is from here if it exists, else from the project's root, or
    for results/... from the folder of results."""
    path = Path(path).expanduser()
    if path.exists():
        return path
    return results_folder() / Path(*path.parts[1:]) if path.parts[:1] == ("results",) else ROOT / path


def check_checkout() -> None:
    """Raises ConfigError where configs/ is not there: a wheel holds the package only."""
    if not CONFIGS.is_dir():
        raise ConfigError(
            f"there is no folder {CONFIGS}: evodiff runs from its checkout, so clone it and run `pip install -e .` "
            f"there, or set EVODIFF_ROOT to the checkout."
        )
