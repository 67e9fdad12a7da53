"""Where the project keeps what it reads and writes."""

import os
from pathlib import Path

ROOT = Path(os.environ.get("EVODIFF_ROOT", Path(__file__).resolve().parent.parent))
CONFIGS = ROOT / "configs"
CHECKPOINTS = ROOT / "checkpoints"
RESULTS = Path(os.environ.get("EVODIFF_RESULTS", ROOT / "results"))
