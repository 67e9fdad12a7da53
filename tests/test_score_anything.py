"""Images from anywhere, scored as our own are: what is read, what is refused, and what every metric gives."""

import json
import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from evodiff.data import mnist_digits
from evodiff.errors import ConfigError, MetricError
from evodiff.files import sha256
from evodiff.metrics import images as module
from evodiff.metrics.build import build_reference
from evodiff.metrics.cli import score_path_main, stats_main
from evodiff.metrics.features import extractor
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.images import read_images
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import protocol
from evodiff.metrics.score import METRICS, Scorer, extractor_of, files_used, reference_of, score
from evodiff.verify.metrics import write_random_inception

MNIST = protocol("mnist")


@pytest.fixture(scope="module")
def digits():
    return mnist_digits()[0][::50]


def save_png(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_a_folder_is_searched_through_links_and_not_in_hidden_places(tmp_path, digits):
    save_png(tmp_path / "images" / ".ipynb_checkpoints", digits[:2])
    save_png(tmp_path / "elsewhere", digits[2:5])
    (tmp_path / "images" / "threes").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "images")
    assert torch.equal(torch.cat([*read_images(tmp_path / "images", 1)]), digits[2:5])


def test_what_cannot_be_read_of_a_folder_a_zip_or_moments_is_named(tmp_path, digits):
    folder = save_png(tmp_path / "images", digits[:2])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MetricError, match=r"gone.png cannot be read: No such file"):
        [*read_images(folder, 1)]
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(range(256)) * 40)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[60:80] = b"\xff" * 20
    (tmp_path / "images.zip").write_bytes(content)
    with pytest.raises(MetricError, match=r"a.png in .*images.zip cannot be read"):
        [*read_images(tmp_path / "images.zip", 1)]
    moments = tmp_path / "moments.npz"
    np.savez(moments, n=4, total=np.zeros(64), outer=np.zeros((64, 64)), made_by="x")
    content = bytearray(moments.read_bytes())
    content[len(content) // 2] ^= 1
    moments.write_bytes(content)
    with pytest.raises(MetricError, match="holds no moments"):
        Moments.load(moments)


def test_colours_of_16_bits_are_refused(tmp_path):
    """Pillow has no such images and keeps their high bytes; so the file is written by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(12) for _ in range(2))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    with pytest.raises(MetricError, match="has mode RGB, of 16 bits, but this protocol scores 8-bit RGB images"):
        [*read_images(tmp_path, 3)]


@pytest.mark.parametrize("kind", ["P6", "P3"])
def test_a_ppm_of_16_bits_is_refused_and_one_of_8_is_not(tmp_path, kind):
    for most in (65535, 255, 7):
        values = "3 " * 12 if kind == "P3" else "\0" * 12 * (2 if most > 255 else 1)
        (tmp_path / "a.ppm").write_bytes(f"{kind}\n2 2\n{most}\n{values}".encode())
        if most > 255:
            with pytest.raises(MetricError, match="a.ppm has mode RGB, of 16 bits"):
                [*read_images(tmp_path, 3)]
        else:
            assert len(torch.cat([*read_images(tmp_path, 3)])) == 1


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_a_file_of_several_images_is_refused(tmp_path, digits, ending):
    first, *others = (Image.fromarray(image[0].numpy()) for image in digits[:3])
    first.save(tmp_path / f"all.{ending}", save_all=True, append_images=others)
    with pytest.raises(MetricError, match=f"all.{ending} holds 3 images; save each in a file of its own"):
        [*read_images(tmp_path, 1)]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_every_entry_of_a_zip_is_read_and_no_folder(tmp_path, digits):
    folder = save_png(tmp_path / "png", digits[:2])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("set.png")
        for i in range(2):
            archive.write(folder / f"{i:03d}.png", "set.png/same.png")
    assert torch.equal(torch.cat([*read_images(tmp_path / "a.zip", 1)]), digits[:2])


def test_an_array_of_images_is_held_once(tmp_path, digits):
    """Batches are parts of it, whatever their size, and not of a copy."""
    for size in (33, 100, 1000):
        batches = [*module._rebatched(tmp_path, iter([("images.npz", digits)]), size)]
        assert torch.equal(torch.cat(batches), digits)
        assert {b.untyped_storage().data_ptr() for b in batches} == {digits.untyped_storage().data_ptr()}


def test_a_protocol_may_be_given_another_name():
    assert protocol("mnist", name="mine").name == "mine"


def test_score_streams_and_says_n(digits):
    whole = score([digits], MNIST)
    assert list(whole) == ["fd_mnist@100"]
    parts = score(digits.split(7), MNIST)
    assert parts["fd_mnist@100"] == pytest.approx(whole["fd_mnist@100"], rel=1e-6)
    assert score(mnist_digits()[0].split(500), MNIST)["fd_mnist@5000"] < 1e-6


def test_the_distance_is_that_of_the_features(digits):
    features = extractor("mnist_classifier")(digits).features.double()
    expected = frechet_distance(Gaussian(features.mean(0), torch.cov(features.T), 100), reference_of(MNIST).gaussian)
    assert score([digits], MNIST)["fd_mnist@100"] == pytest.approx(expected, rel=1e-6)


def test_every_metric_comes_from_one_pass(digits):
    images = mnist_digits()[0][::2]
    values = score(images.split(250), MNIST, metrics=[m for m in METRICS if m not in ("sfid", "curve")])
    names = ["fd_mnist", "fd_mnist_se", "fd_mnist_inf", "is_mnist", "is_std_mnist", "kid_mnist", "kid_std_mnist"]
    names += [f"{name}_mnist" for name in ("precision", "recall", "density", "coverage")]
    assert set(values) == {f"{name}@2500" for name in names}
    assert values["precision_mnist@2500"] == 1 and 9 < values["is_mnist@2500"] <= 10
    assert abs(values["kid_mnist@2500"]) < 3 * values["kid_std_mnist@2500"]
    assert values["fd_mnist_inf@2500"] < values["fd_mnist@2500"]


def test_moments_of_shards_add_up_to_the_score(digits, tmp_path, capsys):
    shards = []
    for i, shard in enumerate(digits.split(30)):
        path = tmp_path / f"moments-{i}.npz"
        np.savez(tmp_path / f"shard-{i}.npz", images=shard.numpy())
        options = [f"path={tmp_path}/shard-{i}.npz", "protocol=mnist", f"moments={path}"]
        assert score_path_main(options) == 0
        shards.append(str(path))
    capsys.readouterr()
    for order in (shards, shards[::-1]):
        score_path_main([f"path={','.join(order)}", "protocol=mnist", "--json"])
        found = json.loads(capsys.readouterr().out)["metrics"]
        assert found["fd_mnist@100"] == pytest.approx(score([digits], MNIST)["fd_mnist@100"], rel=1e-6)


def test_moments_are_scored_by_the_features_they_are_of(digits, tmp_path, capsys):
    path, total, other = (tmp_path / f"{name}.npz" for name in ("moments", "total", "other"))
    np.savez(tmp_path / "shard.npz", images=digits.numpy())
    assert score_path_main([f"path={tmp_path}/shard.npz", "protocol=mnist", f"moments={path}"]) == 0
    capsys.readouterr()
    score_path_main([f"path={path}", "protocol=mnist", "protocol.n=100", "--json"])  # of the same features
    assert json.loads(capsys.readouterr().out)["metrics"].keys() == {"fd_mnist@100"}
    for change in ("rounding=truncate", "extractor_sha256=null"):
        with pytest.raises(
            MetricError, match=rf"made for|features by .*, but protocol mnist takes .*{change.split('=')[0]}"
        ):
            score_path_main([f"path={path}", "protocol=mnist", f"protocol.{change}"])
    with pytest.raises(ConfigError, match="metrics=fid,kid: moments give fid alone"):
        score_path_main([f"path={path}", "protocol=mnist", "metrics=fid,kid"])
    again = tmp_path / "again.npz"
    again.write_bytes(path.read_bytes())
    assert score_path_main([f"path={path},{again}", "protocol=mnist", f"moments={total}"]) == 0
    assert Moments.load(total).n == 200
    (tmp_path / "link.npz").symlink_to(path)
    for same in (path, tmp_path / "link.npz"):
        with pytest.raises(ConfigError, match="names a file twice"):
            score_path_main([f"path={path},{same}", "protocol=mnist"])
    Moments.of(torch.randn(5, 64)).save(other)
    with pytest.raises(MetricError, match="cannot be added"):
        score_path_main([f"path={path},{other}", "protocol=mnist"])
    with pytest.raises(MetricError, match="an unknown network"):
        score_path_main([f"path={other}", "protocol=mnist"])


def test_a_manifest_of_something_else_makes_no_run(digits, tmp_path):
    folder = save_png(tmp_path / "png", digits)
    expected = torch.cat(list(read_images(folder, 1)))
    for content in ("{", "[1]", "{}", '{"shards": 3}', '{"shards": [{"file": "a"}]}'):
        (folder / "manifest.json").write_text(content)
        assert torch.equal(torch.cat(list(read_images(folder, 1))), expected)


def test_folder_zip_npz_and_run_score_the_same(digits, tmp_path, capsys):
    folder = save_png(tmp_path / "png", digits)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"inner/{file.name}")
        archive.writestr("__MACOSX/inner/._000.png", b"junk")
        archive.writestr("readme.txt", b"junk")
    np.savez(tmp_path / "nhw.npz", digits[:, 0].numpy())
    np.savez(tmp_path / "nhwc.npz", samples=digits.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "float.npz", images=digits.numpy().astype(np.float32))
    run = tmp_path / "run"
    run.mkdir()
    np.savez(run / "shard-000000.npz", images=digits.numpy())
    np.savez(run / "shard-000500.npz", images=digits.numpy())  # not listed: does not exist
    listed = {"first": 0, "sha256": sha256(run / "shard-000000.npz")}
    (run / "manifest.json").write_text(json.dumps({"run": {"rounding": "round"}, "shards": [listed]}))
    expected = score([digits], MNIST)["fd_mnist@100"]
    for name in ("png", "a.zip", "nhw.npz", "nhwc.npz", "float.npz", "run"):
        assert score_path_main([f"path={tmp_path / name}", "protocol=mnist", "batch=33", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["metrics"]["fd_mnist@100"] == pytest.approx(expected, rel=1e-5), name
        assert printed["protocol"]["hash"] == MNIST.hash and not printed["lossy"]
        assert printed["files"] == files_used(MNIST)


def test_a_proxy_and_lossy_files_are_said(digits, tmp_path, capsys):
    folder = tmp_path / "jpg"
    folder.mkdir()
    for i, image in enumerate(digits[:10]):
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.jpg")
    score_path_main([f"path={folder}", "protocol=mnist"])
    out = capsys.readouterr().out
    assert "fd_mnist@10" in out and "proxy: the protocol asks for 5000" in out and "lossy" in out
    assert f"protocol mnist {MNIST.hash}, beside mnist (mnist_reference/fd_mnist.npz)" in out


def grey(folder, name, size=(32, 32), mode="L"):
    folder.mkdir(exist_ok=True)
    image = Image.new(mode, size) if mode == "I;16" else Image.effect_noise(size, 50).convert(mode)
    image.save(folder / name)


def bad_folder(tmp_path, kind):
    folder = tmp_path / "bad"
    grey(folder, "a.png")
    if kind == "colour":
        grey(folder, "b.png", mode="RGB")
    elif kind == "alpha":
        grey(folder, "b.png", mode="RGBA")
    elif kind == "16 bit":
        grey(folder, "b.png", mode="I;16")
    elif kind == "other size":
        grey(folder, "b.png", size=(28, 28))
    elif kind == "cut":
        (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:500])
    elif kind == "text":
        (folder / "b.png").write_text("no image")
    return folder


@pytest.mark.parametrize("kind", ["colour", "alpha", "16 bit", "other size", "cut", "text"])
def test_a_bad_image_is_refused_by_name(kind, tmp_path):
    with pytest.raises(MetricError, match="b.png"):
        score_path_main([f"path={bad_folder(tmp_path, kind)}", "protocol=mnist"])


def test_one_image_no_image_and_no_path_are_refused(tmp_path):
    folder = bad_folder(tmp_path, "only one")
    with pytest.raises(MetricError, match="at least 2 images, and there is 1"):
        score_path_main([f"path={folder}", "protocol=mnist"])
    (folder / "a.png").unlink()
    with pytest.raises(MetricError, match="holds no images"):
        score_path_main([f"path={folder}", "protocol=mnist"])
    with pytest.raises(ConfigError, match="does not exist"):
        score_path_main([f"path={tmp_path}/nowhere", "protocol=mnist"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 1, 32, 32), np.float32) - 1, "floats from -1"),
        (np.full((4, 1, 32, 32), 300.0), "expected 0..255"),
        (np.linspace(0, 1, 4 * 32 * 32).reshape(4, 1, 32, 32), "floats from 0 to 1"),
        (np.linspace(0, 1.02, 4 * 32 * 32).reshape(4, 1, 32, 32), "looks like 0..1 with overshoot"),
        (np.full((4, 1, 32, 32), np.nan), "expected 0..255"),
        (np.zeros((4, 1, 32, 32), np.int64), "int64"),
        (np.zeros((4, 32, 32, 3), np.uint8), "grey images"),
        (np.zeros((4, 32)), "holds images"),
    ],
)
def test_arrays_that_are_no_images_are_refused_by_name(array, message, tmp_path):
    np.savez(tmp_path / "wrong.npz", images=array)
    with pytest.raises(MetricError, match=message) as error:
        list(read_images(tmp_path / "wrong.npz", channels=1))
    assert "wrong.npz" in str(error.value)


def test_a_changed_shard_and_a_broken_zip_are_refused(digits, tmp_path):
    np.savez(tmp_path / "shard-000000.npz", images=digits.numpy())
    manifest = {"run": {"rounding": "round"}, "shards": [{"first": 0, "sha256": "0" * 64}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MetricError, match="shard-000000"):
        list(read_images(tmp_path, channels=1))
    with pytest.raises(MetricError, match="sampled with rounding=round, but .* rounding=truncate"):
        list(read_images(tmp_path, channels=1, rounding="truncate"))
    np.save(tmp_path / "array.npy", digits.numpy())
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(MetricError, match=r"array\.npz is no readable npz"):
        list(read_images(tmp_path / "array.npz", channels=1))
    (tmp_path / "broken.zip").write_text("no zip")
    with pytest.raises(MetricError, match="broken.zip"):
        list(read_images(tmp_path / "broken.zip", channels=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["path=x"], "both path"),
        (["path=x", "protocol=mnist", "metric=fid"], "metric=fid"),
        (["path=x", "protocol=mnits"], "mnist"),
        (["path=x", "protocol=mnist", "batch=0"], "at least 1"),
        (["path=x", "protocol=mnist", "device=cuda:77"], "device=cuda:77"),
        (["path=x", "protocol=mnist", "device=nonsense"], "device=nonsense is not available here"),
        (["path=.", "protocol=mnist", "metrics=fod"], "fod"),
        (["path=x", "protocol=mnist", "weights=nowhere"], "nowhere"),
        (["path=x", "protocol=mnist", "protocol.n=one"], "n="),
        (["path=x", "protocol=mnist", "protocol.n=[1"], r"protocol.n=\[1 cannot be read"),
        (["path=x", "protocol=mnist", "protocol.n=${x}"], r"protocol.n=\${x} cannot be read"),
        (["path=x", "protocol=mnist", "protocol.name=[1,2]"], "protocol.name=.* expected text"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        score_path_main(options)


def test_metrics_the_reference_cannot_serve_are_refused(tmp_path):
    shipped = reference_of(MNIST)
    np.savez(tmp_path / "r.npz", mu=shipped.gaussian.mean.numpy(), sigma=shipped.gaussian.cov.numpy())
    bare = protocol("mnist", reference=str(tmp_path / "r.npz"), reference_sha256=None)
    Scorer(bare)
    for metric in ("kid", "pr", "sfid"):
        with pytest.raises(MetricError, match=metric):
            Scorer(bare, metrics=[metric])


def test_too_few_images_are_refused_before_their_features_are_taken(digits, tmp_path, monkeypatch):
    folder = save_png(tmp_path / "png", digits)
    np.savez(tmp_path / "images.npz", images=digits.numpy())
    for metric, least in (("curve", 5000), ("kid", 1000), ("limit", 256)):
        message = (
            f"metrics={metric} needs at least {least} images, and there are 100: score more, or leave {metric} out"
        )
        with pytest.raises(MetricError, match=message):  # of an array when it has been read
            score_path_main([f"path={tmp_path / 'images.npz'}", "protocol=mnist", f"metrics={metric}"])
        with monkeypatch.context() as patch, pytest.raises(MetricError, match=message):
            patch.setattr(Scorer, "add", lambda *_: pytest.fail("features were taken"))
            score_path_main([f"path={folder}", "protocol=mnist", f"metrics=fid,{metric}"])
    path = tmp_path / "few.npz"
    build_reference([digits], extractor_of(MNIST), MNIST).save(path)
    few = protocol("mnist", reference=str(path), reference_sha256=None)
    with pytest.raises(MetricError, match="metrics=kid needs the features of at least 1000 real images, .* has 100"):
        Scorer(few, metrics=["fid", "kid"])
    Scorer(few, metrics=["fid", "pr"])


def test_a_protocol_of_many_images_takes_the_memory_of_those_there_are(digits):
    many = replace(MNIST, n=10**14)
    assert score([digits], many, metrics=["ci"]).keys() == {"fd_mnist_se@100"}


@pytest.mark.slow
def test_inception_protocols_score_spatial_features_with_given_weights(tmp_path, capsys):
    """Random weights: the same images are 0 apart, others are not, and the hash says that the weights are not ours."""
    write_random_inception(tmp_path / "inception.pth")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", images=random.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    weights, out = str(tmp_path / "inception.pth"), str(tmp_path / "ref.npz")
    build = ["build", str(tmp_path / "a.npz"), "--protocol", "adm", "--weights", weights, "--out", out]
    assert stats_main(build) == 0
    capsys.readouterr()
    common = ["protocol=adm", f"protocol.reference={out}", f"weights={weights}", "metrics=sfid", "--json"]
    found = {}
    for name in ("a", "b"):
        assert score_path_main([f"path={tmp_path / name}.npz", *common]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["a"]["protocol"]["extractor_sha256"] == sha256(tmp_path / "inception.pth")
    assert found["a"]["protocol"]["hash"] != protocol("adm").hash
    assert found["a"]["metrics"]["sfid@3"] < 1e-6 < 1e-3 < found["b"]["metrics"]["sfid@3"]
    with pytest.raises(MetricError, match="resize=tensorflow"):
        score_path_main([f"path={tmp_path}/a.npz", *common, "protocol.resize=clean"])
    with pytest.raises(MetricError, match="weights of inception"):
        extractor_of(protocol("adm"), weights=tmp_path / "inception.pth")


def test_references_that_must_be_built_say_how():
    with pytest.raises(MetricError, match="evodiff stats build celeba64-ddim --protocol clean"):
        reference_of(replace(protocol("clean"), dataset="celeba64", reference="absent/celeba64-ddim.npz"))
    with pytest.raises(MetricError, match="evodiff stats build cifar10 --protocol clean"):
        reference_of(protocol("clean"))


def test_files_used_are_given_in_full():
    assert files_used(MNIST) == {"extractor": MNIST.extractor_sha256, "reference": MNIST.reference_sha256}
