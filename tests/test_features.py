import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evodiff.compat import import_torchvision
from evodiff.data import mnist_digits
from evodiff.errors import ConfigError, MetricError
from evodiff.metrics import dinov2
from evodiff.metrics.features import extractor
from evodiff.metrics.resize import resize
from evodiff.models.networks.digit_classifier import DigitClassifier
from evodiff.verify.metrics import Check, main, relative, write_random_inception


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    write_random_inception(path)
    return path


def test_digits_are_told_apart_by_the_shipped_classifier():
    x, labels = mnist_digits()
    out = extractor("mnist_classifier")(x[::10])
    assert out.features.shape == (500, 64) and out.features.dtype == torch.float32
    assert out.logits is not None
    assert (out.logits.argmax(1) == labels[::10]).float().mean() > 0.97


def test_batch_size_changes_features_by_rounding_only():
    extract = extractor("mnist_classifier")
    x, _ = mnist_digits()
    whole = extract(x[:64]).features
    assert relative(torch.cat([extract(b).features for b in x[:64].split(1)]), whole) < 1e-6


def test_inception_equals_torch_fidelity(weights):
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights))
    extract = extractor("inception", "cpu", "tensorflow", "128", weights)
    x = images(2, 3, 40, 32)
    with torch.inference_mode():
        features, logits = theirs(x)
    out = extract(x)
    assert out.logits is not None and out.spatial is not None
    assert relative(out.features, features) < 1e-5
    assert relative(out.logits, logits) < 1e-5
    # the features must say something of the image, or any comparison would pass
    assert relative(features[0], features[1]) > 1e-2
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, o: seen.append(o))
    with torch.inference_mode():
        theirs(x)
    channel_last = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, 17 * 17 * 7)
    assert relative(out.spatial, channel_last) < 1e-5


def test_resize_kernel_and_scaling_each_change_the_features(weights):
    x = images(2, 3, 32, 32)
    variants = [("tensorflow", "128"), ("tensorflow", "127.5"), ("torch", "127.5"), ("clean", "128")]
    found = [extractor("inception", "cpu", *v, weights)(x).features for v in variants]
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            assert relative(a, b) > 1e-4


def test_clean_resize_is_pillows_on_floats_cut_to_the_range():
    for h, w in ((28, 32), (311, 400)):
        x = images(1, 1, h, w)
        pillow = Image.fromarray(x[0, 0].float().numpy()).resize((299, 299), Image.Resampling.BICUBIC)
        overshooting = np.asarray(pillow)
        assert overshooting.min() < 0
        assert overshooting.max() > 255
        # as clean-fid's build_resizer ends
        np.testing.assert_allclose(resize(x, 299, "clean")[0, 0], overshooting.clip(0, 255), atol=5e-3)


def test_tensorflow_resize_aligns_corners_of_pixels_not_centres():
    ramp = torch.arange(4, dtype=torch.uint8).expand(1, 1, 4, 4).contiguous()
    found = resize(ramp, 8, "tensorflow")[0, 0, 0]
    assert found.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    centres = torch.nn.functional.interpolate(ramp.float(), size=8, mode="bilinear")[0, 0, 0]
    assert torch.allclose(resize(ramp, 8, "torch")[0, 0, 0], centres)
    assert not torch.allclose(found, centres)


def test_resize_to_the_same_size_changes_nothing():
    x = images(1, 2, 9, 9)
    for kernel in ("tensorflow", "torch", "clean"):
        assert torch.allclose(resize(x, 9, kernel), x.float(), atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images(2, 3, 32, 32), "grey images"),
        (images(2, 1, 28, 28), "32x32 images, and these are 28x28"),
        (images(2, 1, 32, 32).float(), "must be uint8"),
        (images(1, 32, 32), "shape"),
    ],
)
def test_images_the_network_was_not_made_for_are_refused(bad, message):
    with pytest.raises(MetricError, match=message):
        extractor("mnist_classifier")(bad)


def test_rgba_is_refused_by_inception(weights):
    with pytest.raises(MetricError, match="RGB images"):
        extractor("inception", "cpu", "tensorflow", "128", weights)(images(1, 4, 32, 32))


def test_what_is_no_extractor_or_no_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="inception"):
        extractor("inceptoin")
    with pytest.raises(ConfigError, match="native"):
        extractor("mnist_classifier", "cpu", "clean", "128")
    with pytest.raises(ConfigError, match="tensorflow"):
        extractor("inception", "cpu", "bicubic", "128")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(MetricError, match="other.pth"):
        extractor("inception", "cpu", "tensorflow", "128", tmp_path / "other.pth")


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("the pickle was executed",))


def test_a_weight_file_that_carries_code_is_not_run(tmp_path):
    torch.save({"fc.bias": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(MetricError, match="bomb.pth"):
        extractor("inception", "cpu", "tensorflow", "128", tmp_path / "bomb.pth")


def test_torchvision_imports_beside_this_torch():
    code = "from evodiff.compat import import_torchvision as i; i(); import torch_fidelity, pytorch_fid.inception"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


NETWORK = """
from torch import nn

def dinov2_vitl14(pretrained):
    assert not pretrained
    return nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, 1024))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's cache, with a small network in place of DINOv2's; without a network connection."""
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise OSError("no internet")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code = tmp_path / "hub" / f"facebookresearch_dinov2_{dinov2.COMMIT}"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(NETWORK)
    weights = tmp_path / "hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth"
    weights.parent.mkdir()
    torch.manual_seed(0)
    torch.save({"2.weight": torch.randn(1024, 48), "2.bias": torch.zeros(1024)}, weights)
    extractor.cache_clear()
    yield SimpleNamespace(code=code, weights=weights, asked=asked)
    extractor.cache_clear()


def test_dinov2_is_torch_fidelitys_with_the_network_of_one_commit(hub, monkeypatch):
    x = images(2, 3, 32, 32)
    out = extractor("dinov2")(x)
    assert out.features.shape == (2, 1024) and out.logits is None
    assert hub.asked == []  # with the main branch of today torch.hub asks for its name, also where it is in the cache
    import_torchvision()
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    backbone = dinov2._backbone()
    monkeypatch.setattr(torch.hub, "load", lambda repository, name: backbone)
    assert torch.equal(FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])(x)[0], out.features)


def test_weights_of_dinov2_are_data(hub):
    torch.save({"2.weight": torch.zeros(1024, 48), "2.bias": Bomb()}, hub.weights)
    with pytest.raises(ConfigError, match="UnpicklingError"):
        extractor("dinov2")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_dinov2_that_is_not_here_says_what_to_copy(hub, monkeypatch, offline):
    monkeypatch.setenv("EVODIFF_OFFLINE", offline)
    hub.weights.unlink()
    with pytest.raises(ConfigError, match=f"on a machine with internet run .*:{dinov2.COMMIT}.*, and copy") as raised:
        extractor("dinov2")
    assert ("EVODIFF_OFFLINE is set" in str(raised.value)) == (hub.asked == []) == (offline == "1")


@pytest.mark.slow
def test_verify_metrics_finds_no_difference(capsys):
    assert main([]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_a_difference_or_nan_fails_its_check():
    assert Check("x", "y", 1e-7, 1e-6).ok and not Check("x", "y", 1e-5, 1e-6).ok
    assert not Check("x", "y", relative(float("nan"), 1.0), 1e-6).ok
    with pytest.raises(ConfigError, match="leave --weights out"):
        main(["--weights", "nowhere.pth"])


def test_the_digit_classifier_pools_as_torch_does():
    torch.manual_seed(0)
    net, images = DigitClassifier(), torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8)
    x = images.float() / 127.5 - 1
    for conv in (net.conv1, net.conv2, net.conv3):
        x = torch.nn.functional.max_pool2d(conv(x).relu(), 2)
    assert torch.equal(net(images)[0], net.features(x.flatten(1)).relu())
