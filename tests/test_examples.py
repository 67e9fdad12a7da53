"""The examples run as they stand, say what they did, and are short."""

import re
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from evodiff import plugins
from evodiff.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a script in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_registered", dict(plugins._registered))

    def run(name):
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def errors(out, name):
    return [float(value) for value in re.findall(rf"{name} ([\d.]+)", out)]


def test_every_example_is_short_and_says_how_to_run_it():
    assert len(EXAMPLES) >= 6
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) < 60
        assert f"python examples/{path.name}" in text
        assert f"def test_{path.stem}(" in (ROOT / "tests" / "test_examples.py").read_text()


def test_sample_digits(run, tmp_path):
    assert run("sample_digits").count("6 network calls per image") == 3
    rows = np.asarray(Image.open(tmp_path / "digits.png").convert("L")).astype(int)
    assert rows.shape == (2 * (3 * 33 + 1), 2 * (12 * 33 + 1))
    assert len(np.unique(rows)) > 50


def test_own_solver(run):
    out = run("own_solver")
    adams, ddim = errors(out, "adams"), errors(out, "ddim")
    assert all(a < b for a, b in zip(adams, ddim, strict=True))
    assert adams[1] / adams[2] > 2.5  # second order, and DDIM's first
    assert ddim[1] / ddim[2] < 2.5


def test_own_model(run, tmp_path):
    assert "32 images with 10 network calls each" in run("own_model")
    image = np.asarray(Image.open(tmp_path / "own_model.png").convert("L")).astype(float)
    assert image[4:36, 4:36].std() > 20  # a digit, neither black nor noise: dark at its border, bright inside
    assert image[4:8, 4:36].mean() < image[12:28, 12:28].mean()


def test_own_grid(run):
    out = run("own_grid")
    assert len(errors(out, "own")) == 3
    assert errors(out, "own")[0] < errors(out, "logsnr")[0]


def test_diffusers_pipeline(run, tmp_path):
    pytest.importorskip("diffusers")
    assert "EVODiff: 8 images in 8 steps" in run("diffusers_pipeline")
    for i in range(8):
        theirs, ours = (np.asarray(Image.open(tmp_path / f"pipeline_{n}_{i}.png")) for n in ("DDIM", "EVODiff"))
        assert np.corrcoef(theirs.flatten(), ours.flatten())[0, 1] > 0.6  # the same digit
        assert ours.std() > 40


def test_k_diffusion_sampler(run):
    out = run("k_diffusion_sampler")
    assert out.count("contrast of the denoised images") == 14
    assert float(re.search(r"images from (-[\d.]+)", out)[1]) < -0.9
