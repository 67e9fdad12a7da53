"""The model of a run is loaded once for all runs of a table that share it, and no two are held at a time."""

import dataclasses
import json
import os
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evodiff.models.wrap import wrap
from evodiff.runs.job import Job
from evodiff.runs.sample import sample_run
from evodiff.schedule import EDM
from evodiff.tables import trajectory

alive: list[weakref.ref] = []
"""Of each network made: itself."""


class Network(nn.Conv2d):
    def __init__(self):
        super().__init__(1, 1, 1)
        self.cycle = [self]  # as a compiled one has
        self.fails = False

    def forward(self, x, t):
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0 * super().forward(x)


def model(weights=None, pipeline=None, version=0, device="cpu"):
    assert not any(network() for network in alive), "the one before is still there"
    network = Network()
    alive.append(weakref.ref(network))
    return wrap(network, shape=(1, 4, 4), predicts="x0", schedule=EDM(), weights=weights, check=False, device=device)


@pytest.fixture
def cell(results):
    """A run of `model` with some NFE."""
    alive.clear()
    job = Job.compose(["model=mixture", "protocol=none", "solver=ddim", "seeds=0-3", "device=cpu", "metrics=[]"])

    def make(nfe, precision="fp32", **fields):
        config = {"name": "mine", "_target_": f"{__name__}.model", **fields}
        return dataclasses.replace(
            job, run=dataclasses.replace(job.run, model=config, nfe=nfe, precision=precision), batch=4
        )

    return make


def test_runs_of_one_model_load_it_once_also_for_a_trajectory(cell):
    assert all(sample_run(cell(nfe)) for nfe in (2, 3, 4))
    trajectory.make(cell(3))
    assert (cell(3).run.folder / "trajectory.npz").exists()
    assert len(alive) == 1


@pytest.mark.parametrize("other", [{"version": 1}, {"precision": "bf16"}])
def test_another_model_is_loaded_after_the_one_before_is_let_go_of(cell, other):
    assert sample_run(cell(2)) and sample_run(cell(2, **other)) and sample_run(cell(3))
    assert len(alive) == 3


def test_a_failing_run_leaves_no_model_behind(cell):
    assert sample_run(cell(2))
    alive[0]().fails = True
    with pytest.raises(torch.OutOfMemoryError):
        sample_run(cell(3))
    assert sample_run(cell(3)) and len(alive) == 2


def test_weights_that_change_between_runs_are_read_again(cell, tmp_path):
    weights = tmp_path / "net.safetensors"

    def noted(nfe, value, time):
        save_file({"weight": torch.full((1, 1, 1, 1), value), "bias": torch.zeros(1)}, weights)
        os.utime(weights, ns=(time, time))
        job = cell(nfe, weights=str(weights))
        assert sample_run(job)
        return json.loads((job.run.folder / "manifest.json").read_text())["weights"]

    first, changed, touched = noted(2, 1.0, time=1), noted(3, 2.0, time=2), noted(4, 3.0, time=2)
    assert first != changed and len(alive) == 2
    assert changed == touched, "a change that nothing shows is not read, and what is noted is what was read"


def test_a_file_that_changes_in_a_folder_is_read_again(cell, tmp_path):
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    for nfe, content in ((2, "a"), (3, "ab"), (4, "ab")):
        (tmp_path / "pipe" / "unet" / "weights.bin").write_text(content)
        os.utime(tmp_path / "pipe" / "unet" / "weights.bin", ns=(1, 1))
        assert sample_run(cell(nfe, pipeline=str(tmp_path / "pipe")))
    assert len(alive) == 2
