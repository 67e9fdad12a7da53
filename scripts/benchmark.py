"""What the benchmark scripts share: the machine, the record, and peak memory."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from evodiff.device import finished
from evodiff.files import whole_file


def machine(device: str) -> dict[str, Any]:
    """Where figures were taken, and how busy it was."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def on(where: Mapping[str, Any]) -> str:
    """The machine as a line of text."""
    return f"{where['device']}, {where['threads']} threads, load {where['load']}, torch {where['torch']}."


def seconds(device: str, call: Callable[..., object], /, *args: Any, **kwargs: Any) -> float:
    """What call(*args, **kwargs) takes, until the device has done all of it."""
    finished(device)
    started = time.perf_counter()
    call(*args, **kwargs)
    finished(device)
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "quartiles": [low, high]}


def memory(field: str) -> float:
    """GB of this process, from Linux's account of it: VmRSS is held now, VmHWM was the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9


def forget_peak() -> None:
    """From here on VmHWM counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Findings:
    """results/bench/<name>.json and .md: each part is measured by itself, and the others stay as they were recorded."""

    def __init__(self, folder: Path, name: str, markdown: Callable[[dict[str, Any]], str]):
        self.json, self.md, self.markdown = folder / f"{name}.json", folder / f"{name}.md", markdown
        self.found: dict[str, Any] = json.loads(self.json.read_text()) if self.json.exists() else {}

    def add(self, part: str, content: Any) -> None:
        self.found[part] = content
        for path, text in ((self.json, json.dumps(self.found, indent=1) + "\n"), (self.md, self.markdown(self.found))):
            with whole_file(path) as temporary:
                temporary.write_text(text)
