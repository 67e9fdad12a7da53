"""Empirical model statistics: against closed forms and direct regression, interrupted, and their files."""

import gc
import json
import math
import os
import weakref

import numpy as np
import pytest
import torch
from exact import MEAN, SHORT_EDM, STD, gaussian, grid, mixture

import evodiff.ems as ems
from evodiff.config import build
from evodiff.errors import ConfigError
from evodiff.models.pretrained import Pretrained
from evodiff.noise import SeededNoise
from evodiff.sampling import integrate
from evodiff.solvers.dpmpp import DPMSolverPP


def pretrained(denoiser, shape):
    return Pretrained(lambda labels: denoiser, shape=shape)


def test_a_gaussians_statistics_in_closed_form(tmp_path):
    """l is the share of the noise, f = -mu l is the same for every image: s = 0 and b = f'."""
    fine = grid(200)
    model = pretrained(gaussian(), (1, 2, 2))
    s = ems.compute(model, fine, samples=8, batch=4, partial=tmp_path / "p.npz", identity={})
    kappa2 = torch.exp(-2 * s.lambdas)[:, None, None, None].expand_as(s.l)
    l = kappa2 / (kappa2 + STD**2)  # noqa: E741
    torch.testing.assert_close(s.l, l, rtol=1e-9, atol=1e-9)
    assert s.s.abs().max() == 0
    torch.testing.assert_close(s.b[5:-5], (2 * MEAN * l * (1 - l))[5:-5], rtol=2e-3, atol=1e-4)


def test_s_and_b_are_the_regression_of_the_derivative_on_f(tmp_path):
    """The sums give what a least-squares fit gives on f and its finite difference, sample by sample."""
    denoiser, shape, n = mixture(), (2, 3, 3), 64
    fine = grid(120)
    s = ems.compute(pretrained(denoiser, shape), fine, samples=n, batch=n, partial=tmp_path / "p.npz", identity={})

    seen = []

    class Keeping:
        schedule = SHORT_EDM

        def __call__(self, x, node):
            D = denoiser(x, node)
            seen.append((x / node.alpha, D))
            return D

    x = SeededNoise(range(n)).latents(shape).double() * SHORT_EDM.t_start
    integrate(DPMSolverPP(order=2, lower_order_final=False), Keeping(), x, fine, denoise_final=True)
    for j in (30, 60, 90):
        f = [(1 - s.l[k]) * y - D for k, (y, D) in ((k, seen[k]) for k in (j - 1, j, j + 1))]
        df = (f[2] - f[0]) / (s.lambdas[j + 1] - s.lambdas[j - 1])
        for pixel in ((0, 0, 0), (1, 2, 1)):
            slope, intercept = np.polyfit(f[1][:, *pixel].numpy(), df[:, *pixel].numpy(), 1)
            assert s.s[j, *pixel].item() == pytest.approx(slope, rel=0.03, abs=0.02)
            assert s.b[j, *pixel].item() == pytest.approx(intercept, rel=0.03, abs=0.02)


def test_l_is_the_mean_diagonal_of_the_noises_jacobian(tmp_path):
    """Random signs against every entry of the Jacobian, on the same trajectory."""
    denoiser, shape = mixture(), (2, 3, 3)
    fine, n = grid(12), 400
    s = ems.compute(pretrained(denoiser, shape), fine, samples=n, batch=n, partial=tmp_path / "p.npz", identity={})
    seen = []

    class Keeping:
        schedule = SHORT_EDM

        def __call__(self, x, node):
            seen.append(x)
            return denoiser(x, node)

    x = SeededNoise(range(n)).latents(shape).double() * SHORT_EDM.t_start
    integrate(DPMSolverPP(order=2, lower_order_final=False), Keeping(), x, fine)
    for j in (0, 5, 9):
        node, x = fine.nodes[j], seen[j]
        rows = [row_of_jacobian(denoiser, x, node, k) for k in range(18)]
        diagonal = torch.stack([row.mean(0).flatten()[k] for k, row in enumerate(rows)]).view(shape)
        torch.testing.assert_close(s.l[j], 1 - diagonal, rtol=0.05, atol=0.05)


def row_of_jacobian(denoiser, x, node, k):
    """dD_k/dx of each sample: samples do not touch each other, so their sum has the gradient of each."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(denoiser(x, node).flatten(1)[:, k].sum(), x)[0]


class Stopped(Exception):
    pass


def test_an_interrupted_computation_goes_on_bit_for_bit(tmp_path):
    model, fine, calls = mixture(), grid(10), []

    def failing(labels):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return model

    whole = ems.compute(pretrained(model, (2, 3, 3)), fine, 12, 4, tmp_path / "whole.npz", {"a": 1})
    with pytest.raises(Stopped):
        ems.compute(Pretrained(failing, shape=(2, 3, 3)), fine, 12, 4, tmp_path / "p.npz", {"a": 1})
    resumed = ems.compute(Pretrained(failing, shape=(2, 3, 3)), fine, 12, 4, tmp_path / "p.npz", {"a": 1})
    assert len(calls) == 4
    for name in ("l", "s", "b"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name))


def test_partial_sums_of_another_computation_are_refused(tmp_path):
    model = pretrained(gaussian(), (1, 2, 2))
    ems.compute(model, grid(4), 2, 2, tmp_path / "p.npz", {"nodes": 4})
    with pytest.raises(ConfigError, match="another computation"):
        ems.compute(model, grid(4), 2, 2, tmp_path / "p.npz", {"nodes": 5})


def write_published(folder, nodes=4, shape=(1, 2, 2), **extra):
    folder.mkdir()
    ones = np.ones((nodes + 1, *shape), dtype=np.float32)
    np.savez(folder / "l.npz", l=ones, **extra)
    np.savez(folder / "sb.npz", s=0 * ones, b=2 * ones)


def test_the_published_layout_needs_its_range(tmp_path):
    write_published(tmp_path / "ems")
    with pytest.raises(ConfigError, match=r"set statistics.lambdas .* \[-4.382, 6.2146\] for EDM"):
        ems.load(str(tmp_path / "ems"))
    s = ems.load(str(tmp_path / "ems"), lambdas=[-1, 3])
    assert s.lambdas.tolist() == [-1, 0, 1, 2, 3]
    assert s.b.dtype == torch.float64 and s.b.max() == 2


def test_our_layout_names_its_range_and_refuses_another(tmp_path):
    write_published(tmp_path / "ems", lambdas=np.linspace(-1, 1, 5))
    assert ems.load(str(tmp_path / "ems")).lambdas[-1] == 1
    with pytest.raises(ConfigError, match="says -1 to 1"):
        ems.load(str(tmp_path / "ems"), lambdas=[-1, 2])
    with pytest.raises(ConfigError, match=r"lambdas=\[-1, 0, 1\], but .* says -1 to 1"):
        ems.load(str(tmp_path / "ems"), lambdas=[-1, 0, 1])


def test_statistics_are_shared_until_others_are_loaded_or_their_files_change(tmp_path):
    for name in ("a", "b"):
        write_published(tmp_path / name)
    first = ems.load(str(tmp_path / "a"), lambdas=[-1, 3])
    assert ems.load(str(tmp_path / "a"), lambdas=[-1, 3]) is first
    assert ems.load(str(tmp_path / "a"), lambdas=[-1, 2]).lambdas[-1] == 2

    kept = weakref.ref(first)
    del first
    ems.load(str(tmp_path / "b"), lambdas=[-1, 3])
    gc.collect()
    assert kept() is None

    ones = np.ones((5, 1, 2, 2))
    np.savez(tmp_path / "b" / "sb.npz", s=ones, b=3 * ones)
    os.utime(tmp_path / "b" / "sb.npz", ns=(0, 1))
    assert ems.load(str(tmp_path / "b"), lambdas=[-1, 3]).b.max() == 3


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="evodiff stats ems model=... out=.*computes them"):
        ems.load(str(tmp_path / "nowhere"))
    write_published(tmp_path / "ems")
    np.savez(tmp_path / "ems" / "sb.npz", s=np.ones(3))
    with pytest.raises(ConfigError, match="b is not a file"):
        ems.load(str(tmp_path / "ems"), lambdas=[0, 1])
    for content in (b"", (tmp_path / "ems" / "l.npz").read_bytes()[:200]):
        (tmp_path / "ems" / "sb.npz").write_bytes(content)
        with pytest.raises(ConfigError, match=f"statistics.folder={tmp_path / 'ems'}: .*Expected l.npz with l"):
            ems.load(str(tmp_path / "ems"), lambdas=[0, 1])
    with (tmp_path / "ems" / "sb.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ConfigError, match="Expected l.npz with l"):
        ems.load(str(tmp_path / "ems"), lambdas=[0, 1])


def test_as_many_half_log_snrs_as_statistics(tmp_path):
    write_published(tmp_path / "ems", lambdas=np.linspace(-1, 1, 4))
    with pytest.raises(ConfigError, match=f"statistics.folder={tmp_path / 'ems'}: statistics: l has shape"):
        ems.load(str(tmp_path / "ems"))
    write_published(tmp_path / "none", lambdas=np.zeros(0))
    with pytest.raises(
        ConfigError, match=f"statistics.folder={tmp_path / 'none'}: statistics: lambdas must be at least"
    ):
        ems.load(str(tmp_path / "none"), lambdas=[-1, 1])


def test_the_command_writes_what_the_solver_loads(tmp_path, evodiff_command):
    out = tmp_path / "ems"
    arguments = ("model=mixture", "nodes=12", "samples=6", "batch=4", f"out={out}", "device=cpu")
    code, text, err = evodiff_command("stats", "ems", *arguments)
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["ems.json", "l.npz", "sb.npz"]
    assert json.loads((out / "ems.json").read_text())["samples"] == 6
    statistics = {"_target_": "evodiff.ems.load", "folder": str(out)}
    solver = build({"_target_": "evodiff.solvers.dpm_solver_v3.DPMSolverV3", "statistics": statistics})
    assert solver.statistics.l.shape == (13, 3, 8, 8)
    assert solver.statistics.lambdas[0].item() == pytest.approx(-math.log(80))
    assert np.load(out / "l.npz")["l"].dtype == np.float32


def test_finished_statistics_stay(tmp_path, evodiff_command, monkeypatch):
    arguments = ("stats", "ems", "model=mixture", "nodes=4", f"out={tmp_path}", "device=cpu")
    assert evodiff_command(*arguments, "samples=2")[0] == 0
    before = (tmp_path / "l.npz").read_bytes()
    monkeypatch.delattr(ems, "compute")
    assert evodiff_command(*arguments, "samples=2")[0] == 0, "finished, so not computed again"
    code, _, err = evodiff_command(*arguments, "samples=3")
    assert code == 1 and "holds statistics of another computation" in err
    assert (tmp_path / "l.npz").read_bytes() == before


def test_a_damaged_beginning_is_said(tmp_path, evodiff_command):
    (tmp_path / "partial.npz").touch()
    code, _, err = evodiff_command("stats", "ems", "model=mixture", "nodes=4", "samples=2", f"out={tmp_path}")
    assert code == 1 and "partial.npz cannot be read" in err and "Remove it to begin anew" in err


@pytest.mark.parametrize("setting", ["nodes=1", "samples=0", "batch=x", "solver=nonsense", "model=mixtur"])
def test_impossible_settings_are_one_line(setting, evodiff_command, tmp_path):
    code, _, err = evodiff_command("stats", "ems", "model=mixture", f"out={tmp_path / 'ems'}", setting)
    assert code == 1
    assert err.startswith("evodiff: ") and err.count("\n") == 1
    assert not (tmp_path / "ems").exists()
