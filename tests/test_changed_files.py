"""A run is found again by its configuration; the files that this only names may have changed in the meantime."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evodiff.errors import StoreError
from evodiff.metrics import score as scoring
from evodiff.metrics.reference import Reference
from evodiff.paths import CHECKPOINTS
from evodiff.runs.job import Job
from evodiff.runs.sample import sample_run

RUN = ["run", "seeds=0-5", "shard=2", "device=cpu", "metrics=[contrast]"]


def only(paths):
    (path,) = paths
    return path


@pytest.fixture
def times(tmp_path):
    def write(middle):
        (tmp_path / "times.json").write_text(json.dumps([80.0, middle, 0.002]))
        return [*RUN, "model=mixture", "protocol=none", "solver=ddim", "nfe=2", "grid=file", f"grid.path={path}"]

    path = tmp_path / "times.json"
    return write


@pytest.mark.parametrize("left", [3, 1])
def test_a_run_of_other_times_is_neither_taken_nor_filled_up(evodiff_command, results, times, left):
    assert evodiff_command(*times(2.0))[0] == 0
    shards = sorted(results.glob("runs/mixture/*/shard-*.npz"))
    for shard in shards[left:]:
        shard.unlink()
    code, out, err = evodiff_command(*times(5.0))
    assert code == 1 and "contrast" not in out
    assert "was sampled with other files" in err and "times.json" in err and "Remove the folder" in err
    assert evodiff_command(*times(2.0))[0] == 0


def test_the_record_says_which_times_they_were(evodiff_command, results, times):
    arguments = times(2.0)
    assert evodiff_command(*arguments)[0] == 0
    weights = json.loads(only(results.glob("runs/mixture/*/score.json")).read_text())["weights"]
    assert list(weights) == [arguments[-1].removeprefix("grid.path=")]


def test_a_run_made_before_files_were_noted_is_taken(evodiff_command, results, times):
    assert evodiff_command(*times(2.0))[0] == 0
    manifest = only(results.glob("runs/mixture/*/manifest.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"weights": {}}))
    assert evodiff_command(*times(2.0))[0] == 0


def test_other_statistics_of_the_model_are_noticed(evodiff_command, tmp_path):
    shutil.copytree(CHECKPOINTS / "mnist_tiny" / "ems", tmp_path / "ems")
    statistics = f"solver.statistics={{_target_: evodiff.ems.load, folder: {tmp_path / 'ems'}}}"
    arguments = [*RUN, "model=mnist_tiny", "protocol=none", "solver=dpm_v3", statistics, "nfe=2"]
    assert evodiff_command(*arguments)[0] == 0
    with np.load(tmp_path / "ems" / "l.npz") as file:
        np.savez(tmp_path / "ems" / "l.npz", **{**file, "l": file["l"] * 1.01})
    code, _, err = evodiff_command(*arguments)
    assert code == 1 and "ems/l.npz" in err and "sb.npz" not in err


def test_files_deep_in_a_solver_are_noticed(evodiff_command, tmp_path):
    """Like the Gaussian of teleport, or the statistics of its base."""
    file = tmp_path / "gaussian.npz"
    guess = f"solver.gaussian={{_target_: evodiff.gaussian.load, path: {file}}}"
    arguments = [*RUN, "model=mixture", "protocol=none", "solver=teleport", guess, "nfe=2"]
    for mean in (0.0, 0.5):
        np.savez(file, mean=np.full((3, 8, 8), mean), cov=0.25 * np.eye(192))
        code, _, err = evodiff_command(*arguments)
        assert code == (1 if mean else 0), err
    assert "gaussian.npz" in err and "Remove the folder to sample anew" in err


class Network(nn.Conv2d):
    def __init__(self):
        super().__init__(1, 1, 1)

    def forward(self, x, t):
        return super().forward(x)


@pytest.mark.parametrize("named", ["{home}/net.safetensors", "~/net.safetensors"])
def test_a_network_trained_on_is_not_taken_for_the_one_before(results, tmp_path, monkeypatch, named):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = tmp_path / "net.safetensors"
    network = {"_target_": f"{__name__}.Network"}
    model = {"name": "mine", "_target_": "evodiff.wrap", "model": network, "shape": [1, 8, 8], "predicts": "x0"}
    model |= {"schedule": {"_target_": "evodiff.schedule.EDM"}, "weights": named.format(home=tmp_path), "check": False}
    job = Job.compose([*RUN[1:], "model=mixture", "protocol=none", "solver=ddim", "nfe=2"])
    job = dataclasses.replace(job, run=dataclasses.replace(job.run, model=model))

    def trained(seed):
        torch.manual_seed(seed)
        save_file(Network().state_dict(), weights)
        return sample_run(job)

    assert trained(0)
    with pytest.raises(StoreError, match=r"was sampled with other files \(net.safetensors\)"):
        trained(1)
    assert trained(0)


def test_another_reference_is_scored_anew(evodiff_command, results, tmp_path):
    path = tmp_path / "mine.npz"
    shipped = Reference.load(CHECKPOINTS / "mnist_reference" / "fd_mnist.npz")
    shipped.save(path)
    arguments = [*RUN[:-1], "metrics=[fid]", "model=mnist_tiny", "nfe=2", "solver=ddim"]
    arguments += [f"protocol.reference={path}", "protocol.reference_sha256=null"]

    def scored():
        assert evodiff_command(*arguments)[0] == 0
        return json.loads(only(results.glob("runs/mnist_tiny/*/score.json")).read_text())

    first = scored()
    assert scored() == first
    moved = dataclasses.replace(shipped.gaussian, mean=shipped.gaussian.mean + 1)
    Reference(moved, shipped.provenance).save(path)
    scoring.reference_of.cache_clear()
    second = scored()
    assert second["metrics"] != first["metrics"] and second["files"]["reference"] != first["files"]["reference"]
    assert second["shards"] == first["shards"]
