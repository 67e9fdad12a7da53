"""Files that a configuration names are found from any folder: here first, then in the project."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from safetensors.torch import save_file

from evodiff import ems, paths
from evodiff.checkpoints import load
from evodiff.errors import CheckpointError, ConfigError
from evodiff.grid import FromFile
from evodiff.models.latent import latent, read_prompts
from evodiff.schedule import EDM


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project's root; the current folder is another one."""
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(paths, "ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def times(path):
    return FromFile(path).times(2, EDM(), 80, 0.002)


def test_a_grid_file(project, tmp_path):
    (project / "grid.json").write_text("[80, 1, 0.002]")
    assert times("grid.json") == [80, 1, 0.002]
    (tmp_path / "elsewhere" / "grid.json").write_text("[80, 2, 0.002]")
    assert times("grid.json") == [80, 2, 0.002]
    assert times(str(project / "grid.json")) == [80, 1, 0.002]


def test_prompts(project):
    (project / "prompts.txt").write_text("a cat\n")
    assert read_prompts("prompts.txt") == ["a cat"]


def test_statistics(project):
    ones = np.ones((3, 1, 2, 2))
    (project / "ems").mkdir()
    np.savez(project / "ems" / "l.npz", l=ones, lambdas=np.array([-1.0, 0.0, 1.0]))
    np.savez(project / "ems" / "sb.npz", s=ones, b=ones)
    assert ems.load("ems").l.shape == (3, 1, 2, 2)


def test_a_pipeline_with_its_prompts(project):
    pipelines.text_conditional(project)
    model = latent("sd", prompts="prompts.txt")
    assert model.num_classes == 2
    assert "prompts.txt" in model.files and any("unet" in name for name in model.files)


def test_a_checkpoint_and_what_is_at_home(project, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file({"a": torch.zeros(1)}, project / "net.safetensors")
    with pytest.raises(CheckpointError, match="unknown network"):  # so it was found
        load("net.safetensors")
    with pytest.raises(ConfigError, match=r"^other\.safetensors does not exist"):
        load("other.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert read_prompts("~/prompts.txt") == ["a cat"]


def test_results_are_where_the_folder_of_results_is(project, tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path / "mine"))
    assert paths.resolve("results/grids/a.json") == tmp_path / "mine" / "grids" / "a.json"


@pytest.mark.parametrize(("given", "meant"), [("", "results"), ("~/kept", "~/kept")])
def test_an_empty_variable_is_none_and_a_tilde_the_home(given, meant):
    code = "from evodiff.paths import ROOT, results_folder; print(results_folder(), ROOT, sep=chr(10))"
    told = {**os.environ, "EVODIFF_RESULTS": given, "EVODIFF_ROOT": ""}
    out = subprocess.run([sys.executable, "-c", code], env=told, check=True, capture_output=True, text=True).stdout
    assert out.splitlines() == [str(paths.ROOT / Path(meant).expanduser()), str(paths.ROOT)]


def test_a_relative_results_folder_stays_where_it_was_when_the_program_changes_its_own(tmp_path):
    code = "import os; from evodiff.paths import results_folder; os.chdir('/'); print(results_folder())"
    environment = os.environ | {"EVODIFF_RESULTS": "mine", "PYTHONPATH": str(paths.ROOT)}
    pipes = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **pipes).stdout == f"{tmp_path / 'mine'}\n"
