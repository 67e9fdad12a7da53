"""Files that are no checkpoints, or were cut short, are refused with what they are."""

import json
import pickle

import pytest
import torch
from checkpoint_files import ADM, equal, saved, weights
from safetensors.torch import save_file

from evodiff.checkpoints import load
from evodiff.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x86\xa4step\x01\xa9optimizer\x81\xa6target\xc0", "JAX checkpoint.*begins with the letters PK"),
        (b"\xde\x00\x10\xa4step\x01", "JAX checkpoint"),
        (b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"", "is empty"),
        (b"\x00" * 100, "cannot be read"),
        (b"PK\x03\x04" + b"\x00" * 100, "cannot be read"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),
        (pickle.dumps({"weights": [1.0]}), "not one of NVlabs/edm"),
        (pickle.dumps("text"), "not one of NVlabs/edm"),
    ],
)
def test_other_files_are_explained(tmp_path, content, said):
    path = tmp_path / "checkpoint_8.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_files_that_were_cut_short(tmp_path, zipped, part):
    path = saved(tmp_path / "a.pt", weights("guided_diffusion", ADM), zipped)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="cut short"):
        load(path)


def test_safetensors_that_were_cut_short(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(weights("guided_diffusion", ADM), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short"):
        load(path)


def test_safetensors_of_another_version_are_refused(tmp_path):
    for about in ("{}", '{"format": "evodiff-checkpoint-0"}', "[1]", "{"):
        path = tmp_path / "a.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata={"evodiff": about})
        with pytest.raises(CheckpointError, match=r"not written by this version|cannot be read"):
            load(path)


def test_safetensors_of_others_are_converted(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(weights("guided_diffusion", ADM), path)
    (tmp_path / "a.json").write_text(json.dumps({"config": ADM}))
    assert equal(load(path).tensors, weights("guided_diffusion", ADM))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}, "epoch": 1}, "Lightning checkpoint"),
        ({"layer.weight": torch.zeros(2)}, "unknown network"),
        ({"epoch": 3}, "holds a dict of epoch"),
        ([], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
    ],
)
def test_other_torch_files_are_explained(tmp_path, content, said):
    with pytest.raises(CheckpointError, match=said):
        load(saved(tmp_path / "a.pt", content))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = weights("guided_diffusion", ADM)
    model["out.2.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"out\.2\.bias holds NaN"):
        load(saved(tmp_path / "a.pt", model))
