"""Images from anywhere, scored as our own are."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from evodiff.data import mnist_digits
from evodiff.errors import ConfigError, MetricError
from evodiff.files import sha256
from evodiff.metrics import score as metrics_score
from evodiff.metrics.build import build_reference
from evodiff.metrics.cli import score_path_main, stats_main
from evodiff.metrics.features import extractor
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.images import read_images
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import protocol
from evodiff.metrics.score import METRICS, Scorer, extractor_of, files_used, reference_of, score
from evodiff.pictures import save_pngs
from evodiff.verify.metrics import write_random_inception

MNIST = protocol("mnist")


@pytest.fixture(scope="module")
def digits():
    return mnist_digits()[0][::50]


def save_png(folder, images):
    save_pngs(folder, range(len(images)), images.numpy())
    return folder


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
    for change in ("rounding=truncate", "extractor_sha256=abcdabcd"):
        with pytest.raises(MetricError, match=r"features by .*, but protocol mnist takes"):
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
    listed = {"first": 0, "last": 99, "sha256": sha256(run / "shard-000000.npz")}
    manifest = {"run": {"seeds": [0, 99], "rounding": "round"}, "shards": [listed]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    expected = score([digits], MNIST)["fd_mnist@100"]
    for name in ("png", "a.zip", "nhw.npz", "nhwc.npz", "float.npz", "run"):
        assert score_path_main([f"path={tmp_path / name}", "protocol=mnist", "batch=33", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["metrics"]["fd_mnist@100"] == pytest.approx(expected, rel=1e-5), name
        assert printed["protocol"]["hash"] == MNIST.hash and not printed["lossy"]
        assert printed["files"] == files_used(MNIST)


def test_two_folders_are_compared_in_one_command(digits, tmp_path, capsys):
    ours, theirs = save_png(tmp_path / "ours", digits[:60]), save_png(tmp_path / "theirs", digits[40:])
    own = ["protocol=mnist", "device=cpu", "metrics=fid,pr"]
    found = []
    build = ["build", str(theirs), "--protocol", "mnist", "--device", "cpu", "--out", f"{tmp_path}/theirs.npz"]
    assert stats_main(build) == 0
    for reference in (theirs, tmp_path / "theirs.npz"):
        capsys.readouterr()
        assert score_path_main([f"path={ours}", f"reference={reference}", *own, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1]["protocol"]["dataset"] == str(reference)
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=1e-6)
    expected = frechet_distance(
        *(Moments.of(extractor("mnist_classifier")(x).features) for x in (digits[:60], digits[40:]))
    )
    assert found[0]["metrics"]["fd_mnist@60"] == pytest.approx(expected, rel=1e-5)
    assert score_path_main([f"path={ours}", f"reference={ours}", *own, f"moments={tmp_path}/ours.npz"]) == 0
    assert "fd_mnist@60              0 " in (said := capsys.readouterr().out) and f"beside {ours} (60 images)" in said
    assert score_path_main([f"path={tmp_path}/ours.npz", f"reference={ours}", "protocol=mnist", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["fd_mnist@60"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match="ours.npz is one of the files that are read"):
        score_path_main([f"path={tmp_path}/ours.npz", "protocol=mnist", f"moments={tmp_path}/ours.npz"])


def test_a_curve_is_of_images_drawn_by_chance(digits, tmp_path, capsys, monkeypatch):
    """In a folder sorted by class the first ones are of a few classes."""
    labels = mnist_digits()[1][::5]
    np.savez(tmp_path / "sorted.npz", images=mnist_digits()[0][::5][labels.argsort()].numpy())
    monkeypatch.setattr(metrics_score, "CURVE", (500, 1000))
    monkeypatch.setitem(metrics_score.LEAST, "curve", 500)
    assert score_path_main([f"path={tmp_path}/sorted.npz", "protocol=mnist", "metrics=fid,curve", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    first = score([*read_images(tmp_path / "sorted.npz", 1, batch=500)][:1], MNIST)["fd_mnist@500"]
    assert found.keys() == {"fd_mnist@500", "fd_mnist@1000"}
    assert found["fd_mnist@500"] < 5 * found["fd_mnist@1000"] < 0.1 * first


def test_a_proxy_and_lossy_files_are_said(digits, tmp_path, capsys):
    folder = tmp_path / "jpg"
    folder.mkdir()
    for i, image in enumerate(digits[:10]):
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.jpg")
    score_path_main([f"path={folder}", "protocol=mnist"])
    out = capsys.readouterr().out
    assert "fd_mnist@10" in out and "proxy: the protocol asks for 5000" in out and "lossy" in out
    assert f"protocol mnist {MNIST.hash}, beside mnist (mnist_reference/fd_mnist.npz)" in out


def test_one_image_no_image_and_no_path_are_refused(digits, tmp_path):
    folder = save_png(tmp_path / "png", digits[:1])
    with pytest.raises(MetricError, match="at least 2 images, and there is 1"):
        score_path_main([f"path={folder}", "protocol=mnist"])
    (folder / "000000.png").unlink()
    with pytest.raises(MetricError, match="holds no images"):
        score_path_main([f"path={folder}", "protocol=mnist"])
    with pytest.raises(ConfigError, match="does not exist"):
        score_path_main([f"path={tmp_path}/nowhere", "protocol=mnist"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["path=x"], "both path"),
        (["path=x", "protocol=mnist", "metric=fid"], "metric=fid"),
        (["path=x", "protocol=mnits"], "mnist"),
        (["path=x", "protocol=mnist", "batch=0"], "at least 1"),
        (["path=.", "protocol=mnist", "reference=nowhere"], "reference=nowhere does not exist"),
        (["path=.", "protocol=mnist", "reference=.", "protocol.reference=x"], "reference= stands for"),
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
    with pytest.raises(MetricError, match=r"evodiff stats build cifar10 --protocol clean --out .*cifar10\.npz`"):
        reference_of(protocol("clean"))
    with pytest.raises(MetricError, match=r"evodiff stats build IMAGES --protocol clean --out .*absent/mine\.npz`"):
        reference_of(replace(protocol("clean"), dataset="mine", reference="absent/mine.npz"))


def test_files_used_are_given_in_full():
    assert files_used(MNIST) == {"extractor": MNIST.extractor_sha256, "reference": MNIST.reference_sha256}
