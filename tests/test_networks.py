"""The published networks: same keys, same numbers as the official code, for the weights of the recordings' rule."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evodiff.errors import ConfigError
from evodiff.models.networks import build
from evodiff.models.networks.adm_blocks import Norm
from evodiff.models.networks.functional import attention, fir_down, fir_kernel, fir_up, sinusoids
from evodiff.models.networks.layers import GroupNorm
from evodiff.verify import networks
from evodiff.verify.recorded import architecture_of, network_of

MANIFESTS = json.loads(Path(__file__).with_name("golden").joinpath("network_manifests.json").read_text())
GOLDENS = sorted(networks.GOLDEN.glob("*.json"))
SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference"


def network(description):
    with torch.device("meta"):
        config = dict(description["constructor_kwargs"], class_name=description["cls"].rsplit(".", 1)[-1])
        architecture = architecture_of(description["cls"])
        if architecture != "edm":
            del config["class_name"]
        return build(architecture, config)


@pytest.mark.parametrize("name", MANIFESTS)
def test_full_size_networks_have_the_published_keys_shapes_and_order(name):
    manifest = MANIFESTS[name]
    net = network(manifest)
    keys = "\n".join(f"{key} {list(value.shape)}" for key, value in net.state_dict().items())
    assert sum(p.numel() for p in net.parameters()) == manifest["n_parameters"]
    assert hashlib.sha256(keys.encode()).hexdigest() == manifest["keys_sha256"]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_outputs_are_those_of_the_official_network(path):
    result = networks.verify(path)
    assert result.compared >= 2
    assert result.worst <= networks.TOLERANCE, result


def test_a_wrong_epsilon_is_caught(monkeypatch):
    path = networks.GOLDEN / "adm_cond_small.json"
    made = Norm.__init__

    def wrong(self, channels):
        made(self, channels)
        self.eps = 1e-6

    monkeypatch.setattr(Norm, "__init__", wrong)
    assert not networks.verify(path).ok


def as_full_size(source, folder, spoil=None):
    """A golden of one sample in the format of the full-size ones, from the forward pass of ours."""
    description = json.loads((networks.GOLDEN / f"{source}.json").read_text())
    x = np.random.Generator(np.random.PCG64(0)).standard_normal((1, 3, 16, 16), dtype=np.float32)
    arrays = {"t": np.float32([321.5]), "x_slice": x[:, :, :8, :8]}
    with torch.no_grad():
        net = network_of(description)
        eps = net(torch.from_numpy(x), torch.tensor([321.5])).double().numpy()
    arrays |= {"eps_slice": eps[:, :, :8, :8].astype(np.float32), "eps_mean": eps.mean(), "eps_std": eps.std()}
    arrays["eps_l2"] = np.linalg.norm(eps)
    if spoil:
        arrays[spoil] = arrays[spoil] * (1 + 1e-4)
    description["x_rule"] = "x=PCG64(0).standard_normal([1,3,R,R],float32), t=321.5"
    folder.joinpath("full.json").write_text(json.dumps(description))
    np.savez(folder / "full.npz", **arrays)
    return folder / "full.json"


def test_full_size_recordings_hold_slices_and_moments(tmp_path):
    assert networks.verify(as_full_size("ddim_model_small", tmp_path)).ok


@pytest.mark.parametrize("part", ["x_slice", "eps_slice", "eps_std", "eps_l2"])
def test_every_recorded_part_is_compared(tmp_path, part):
    result = networks.verify(as_full_size("ddim_model_small", tmp_path, spoil=part))
    assert not result.ok
    assert result.where == part.split("_")[0]


def test_the_command_prints_one_line_per_file_and_fails_on_a_mismatch(tmp_path, capsys):
    as_full_size("ddim_model_small", tmp_path, spoil="eps_l2")
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "cut.json").write_text("{}")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "list.npz").write_bytes((tmp_path / "full.npz").read_bytes())
    (tmp_path / "none.json").write_text('{"cls": 5}')
    (tmp_path / "none.npz").write_bytes((tmp_path / "full.npz").read_bytes())
    (tmp_path / "number.json").write_text('{"cls": "UNetModel", "config": {"data": 5, "image_size": []}}')
    (tmp_path / "number.npz").write_bytes(b"")
    assert networks.main(["--golden", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    names = ("broken", "cut", "full", "list", "none", "number")
    assert [line.split()[:2] for line in lines] == [["FAIL", name] for name in names]
    assert networks.main(["--golden", str(networks.GOLDEN / "ddim_model_small.json")]) == 0
    for end in ("json", "npz"):
        shutil.copy(networks.GOLDEN / f"ddim_model_small.{end}", tmp_path / f"v1.2.{end}")
    for name in ("v1.2", "v1.2.json", "v1.2.npz"):
        assert networks.main(["--golden", str(tmp_path / name)]) == 0


def test_an_empty_folder_is_no_success(tmp_path):
    with pytest.raises(ConfigError, match="holds no goldens"):
        networks.main(["--golden", str(tmp_path)])


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("resnet", {}, "architecture=resnet"),
        ("edm", {"class_name": "EDM2Precond"}, "class_name=EDM2Precond"),
        ("edm", {"img_channels": 3, "model_type": "SongUNet", "blocks": 4}, "does not know blocks"),
        ("guided_diffusion", {"image_size": 16}, "needs in_channels"),
        ("ddim", {"model": {}}, "lacks 'data'"),
    ],
)
def test_impossible_networks_are_refused_by_name(architecture, config, message):
    with pytest.raises(ConfigError, match=message):
        build(architecture, config)


def test_fir_resampling_keeps_constants_and_undoes_nothing_else():
    kernel = fir_kernel([1, 3, 3, 1])
    assert kernel.sum().item() == pytest.approx(1)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    ones = torch.ones(1, 2, 16, 16)
    assert torch.allclose(fir_up(ones, kernel)[inner], torch.tensor(1.0))
    assert torch.allclose(fir_down(ones, kernel)[inner], torch.tensor(1.0))
    x = torch.randn(1, 2, 8, 8)
    box = fir_kernel([1, 1])
    assert torch.allclose(fir_down(fir_up(x, box), box), x, atol=1e-6)
    # up and down are adjoint up to the gain of 4
    y = torch.randn(1, 2, 16, 16)
    assert (fir_up(x, kernel) * y).sum().item() == pytest.approx(4 * (x * fir_down(y, kernel)).sum().item(), rel=1e-4)


def test_attention_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 3, 8, 5, dtype=torch.float64)
    weights = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / 8**0.5, dim=3)
    assert torch.allclose(attention(q, k, v), torch.einsum("bhts,bhcs->bhct", weights, v))


def test_attention_is_asked_as_fused_kernels_want_it(monkeypatch):
    """They take tokens whose channels lie side by side, which a transposed view has not."""
    asked, own = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: (asked.extend(qkv), own(*qkv))[1])
    attention(*torch.randn(3, 2, 3, 8, 5))
    assert len(asked) == 3 and all(part.is_contiguous() and part.shape == (2, 3, 5, 8) for part in asked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_of_half_precision_are_taken_in_float32(dtype):
    norm, x = GroupNorm(16, eps=1e-6).requires_grad_(False), (100 + torch.randn(2, 16, 4, 4)).to(dtype)
    norm.weight.fill_(1.003)  # is 1 in bfloat16
    wide = x.to(torch.promote_types(dtype, torch.float32))
    expected = F.group_norm(wide, 4, norm.weight.to(wide.dtype), norm.bias.to(wide.dtype), 1e-6)
    assert norm(x).dtype == dtype and torch.equal(norm(x), expected.to(dtype))
    assert expected.std() == pytest.approx(1.003, abs=0.002)


def test_sinusoids_span_periods_up_to_the_endpoint():
    t = torch.tensor([3.0])
    cos, sin = sinusoids(t, 8, endpoint=True)
    assert torch.allclose(cos[0, 0], t.cos()) and torch.allclose(sin[0, -1], (t / 10000).sin())
    assert torch.allclose(sinusoids(t, 8, endpoint=False)[1][0, -1], (t / 10000**0.75).sin())


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of full-size networks are not here")
@pytest.mark.parametrize("path", sorted(SHARED.glob("golden_networks_full/*.json")), ids=lambda path: path.stem)
def test_full_size_outputs(path):
    assert networks.verify(path).ok
