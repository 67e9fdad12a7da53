"""`evodiff verify networks`: outputs recorded from the official networks, repeated with ours.

A golden is NAME.json and NAME.npz: the official class, its arguments, the inputs and the outputs for weights that a
rule draws from the keys of the state_dict (`fill`). Of full-size networks only slices and moments are recorded.
"""

import argparse
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evodiff.errors import ConfigError, EvodiffError
from evodiff.paths import ROOT
from evodiff.verify.network_outputs import Arrays, guidance_outputs, outputs_of
from evodiff.verify.recorded import MALFORMED, golden_files, inputs_of, network_of, state_sha256

GOLDEN = ROOT / "tests" / "golden" / "networks"
TOLERANCE = 2e-5
"""Relative L2. float32 noise is some 2e-6; a wrong epsilon in one kind of norm already shows as 7e-5."""


@dataclass(frozen=True)
class Result:
    """Outputs compared in one file; the one that differs most, and by how much.

    `same_state`: the weights are bit for bit those of the recording. It alone decides nothing: constants that the
    constructor computes (iDDPM's `u`) differ in the last bit from one CPU's sine to another's.
    """

    compared: int
    worst: float
    where: str
    same_state: bool = True

    @property
    def ok(self) -> bool:
        return self.compared > 0 and self.worst <= TOLERANCE


def verify(path: Path) -> Result:
    """One golden, given its json. Raises ConfigError for files that are no golden."""
    try:
        description = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as file:
            arrays = {key: torch.from_numpy(value) for key, value in dict(file).items()}
        same_state = True
        if "classifier" in description:
            outputs = guidance_outputs(path, description, arrays)
        else:
            net = network_of(description)
            outputs = outputs_of(net, inputs_of(arrays, description), description)
            same_state = state_sha256(net) == description.get("state_sha256")
    except MALFORMED as e:
        raise ConfigError(f"no golden of a network ({type(e).__name__}: {e}); expected NAME.json and NAME.npz") from e
    errors: dict[str, float] = {}
    for name, compute in {"x": lambda: arrays["x"], **outputs}.items():
        recorded = [key for key in (name, f"{name}_slice") if key in arrays and (key, name) != ("x", "x")]
        if recorded:
            try:
                with torch.no_grad():
                    errors[name] = _compare(name, compute(), arrays)
            except MALFORMED as e:
                raise ConfigError(
                    f"{name} cannot be computed from the recorded inputs ({type(e).__name__}: {e})"
                ) from e
    where = max(errors, key=lambda name: errors[name], default="nothing to compare")
    return Result(len(errors.keys() - {"x"}), errors.get(where, float("inf")), where, same_state)


def _compare(name: str, ours: Tensor, arrays: Arrays) -> float:
    """Relative L2 of an output; of its recorded slice and moments where only those exist. nan counts as inf."""
    errors = []
    if name in arrays:
        errors.append(_relative(ours, arrays[name]))
    if f"{name}_slice" in arrays:
        part = arrays[f"{name}_slice"]
        errors.append(_relative(ours[tuple(slice(n) for n in part.shape)], part))
        exact = ours.double()
        std, norm = exact.std(correction=0), exact.norm()
        for moment, value, unit in (("mean", exact.mean(), std), ("std", std, std), ("l2", norm, norm)):
            if f"{name}_{moment}" in arrays:
                errors.append(((value - arrays[f"{name}_{moment}"]).abs() / unit).item())
    return max(e if e == e else float("inf") for e in errors)


def _relative(ours: Tensor, expected: Tensor) -> float:
    if ours.shape != expected.shape:
        return float("inf")
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evodiff verify networks", description=__doc__)
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="folder of NAME.json and NAME.npz, or one of them")
    golden: Path = parser.parse_args(argv).golden
    paths = sorted(golden.glob("*.json")) if golden.is_dir() else [golden_files(golden)[0]]
    if not paths:
        raise ConfigError(f"{golden} holds no goldens of networks. Expected NAME.json and NAME.npz beside it.")
    failed = False
    for path in paths:
        try:
            r = verify(path)
            ok, text = (
                r.ok,
                f"{r.compared} outputs  worst relative L2 {r.worst:.1e} in {r.where} (allowed {TOLERANCE:.0e})",
            )
            text += "" if r.same_state else "  weights not bit for bit the recorded ones"
        except EvodiffError as e:
            ok, text = False, str(e)
        failed |= not ok
        print(f"{'ok  ' if ok else 'FAIL'}  {path.stem:<40} {text}", flush=True)
        gc.collect()  # one full-size network at a time
    return int(failed)
