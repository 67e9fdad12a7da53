"""Fixtures shared by the tests."""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch: the cores are shared, also by subprocesses
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from small_tables import small_table

import evodiff.runs.loaded
from evodiff.cli import main
from evodiff.tables import pages


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder instead of the project's own, and no model kept from another test."""
    monkeypatch.setattr(evodiff.runs.loaded, "_kept", {})
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(results, monkeypatch):
    """Makes small tables; their curves are empty files, for drawing takes long and is tested in test_page.py."""
    monkeypatch.setattr(pages, "save_curves", lambda paths, *_: [path.touch() for path in paths])
    return small_table


@pytest.fixture
def mps(monkeypatch):
    """The name of a device that has no float64, as MPS; what is moved there stays, so that any machine has one."""
    tensor_to, module_to = torch.Tensor.to, torch.nn.Module.to

    def is_it(where):
        return isinstance(where, str | torch.device) and torch.device(where).type == "mps"

    def move_tensor(tensor, *where):
        rest = [each for each in where if not is_it(each)]
        moved = tensor_to(tensor, *rest) if rest else tensor
        if len(rest) < len(where) and moved.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return moved

    def move_module(module, where):
        if not is_it(where):
            return module_to(module, where)
        for tensor in module.state_dict().values():
            move_tensor(tensor, where)
        return module

    monkeypatch.setattr(torch.Tensor, "to", move_tensor)
    monkeypatch.setattr(torch.nn.Module, "to", move_module)
    return "mps"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for what is fetched and converted instead of the project's own."""
    monkeypatch.setenv("EVODIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def evodiff_command(results, capsys):
    """The command line: arguments in, (exit code, standard output, standard error) out."""

    def run(*argv):
        code = main(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    return run
