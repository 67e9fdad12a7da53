import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from evodiff.data import mnist_digits
from evodiff.errors import ConfigError, MetricError
from evodiff.files import sha256
from evodiff.metrics import cli, datasets
from evodiff.metrics import score as scoring
from evodiff.metrics.build import build_reference, noise_floor
from evodiff.metrics.cli import score_path_main, stats_main
from evodiff.metrics.features import extractor
from evodiff.metrics.frechet import Gaussian, frechet_distance
from evodiff.metrics.moments import Moments
from evodiff.metrics.protocol import protocol
from evodiff.metrics.reference import Reference
from evodiff.paths import CHECKPOINTS

SHIPPED = CHECKPOINTS / "mnist_reference" / "fd_mnist.npz"


def features(n=40, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 1


def test_the_shipped_reference_is_that_of_the_shipped_digits():
    reference = Reference.load(SHIPPED)
    images, _ = mnist_digits()
    found = torch.cat([extractor("mnist_classifier")(b).features for b in images.split(500)])
    assert reference.gaussian.n == 5000
    assert frechet_distance(Moments.of(found), reference.gaussian) < 1e-6
    assert reference.provenance["extractor_sha256"] == extractor("mnist_classifier").sha256
    assert protocol("mnist").reference_sha256 == sha256(SHIPPED)
    assert reference.provenance["noise_floor"] == pytest.approx(noise_floor(found), rel=1e-4)


def test_noise_floor_falls_with_n_and_repeats():
    x = features(2000, 4)
    few, many = noise_floor(x[:200]), noise_floor(x)
    assert few["distance"] > 3 * many["distance"] > 0
    assert noise_floor(x) == many


def test_saved_and_loaded(tmp_path):
    images = mnist_digits()[0][::1500]
    built = build_reference([images], extractor("mnist_classifier"), protocol("mnist"), dataset="four")
    built.save(tmp_path / "r.npz")
    again = Reference.load(tmp_path / "r.npz")
    assert again.gaussian.n == 4 and again.provenance == built.provenance
    assert torch.equal(again.gaussian.cov, built.gaussian.cov) and torch.equal(again.features, built.features)


def as_edm(path, x):
    np.savez(path, mu=x.double().mean(0).numpy(), sigma=np.cov(x.double().numpy(), rowvar=False))


def as_float32(path, x):
    np.savez(path, mu=x.mean(0).numpy(), sigma=np.cov(x.numpy(), rowvar=False).astype(np.float32))


def as_pool_3(path, x):
    np.savez(path, pool_3=x.numpy())


def as_adm(path, x):
    m = {"mu": x.double().mean(0).numpy(), "sigma": np.cov(x.double().numpy(), rowvar=False)}
    np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8), **m, mu_s=m["mu"][:3], sigma_s=m["sigma"][:3, :3])


def as_torch_fidelity(path, x):
    torch.save({"mu": x.double().mean(0).numpy(), "sigma": np.cov(x.double().numpy(), rowvar=False)}, path)


@pytest.mark.parametrize(
    ("write", "name", "tolerance"),
    [
        (as_edm, "r.npz", 1e-9),
        (as_float32, "r.npz", 1e-4),
        (as_pool_3, "r.npz", 1e-9),
        (as_adm, "r.npz", 1e-9),
        (as_torch_fidelity, "r.pt", 1e-9),
    ],
)
def test_published_layouts_load_and_convert(write, name, tolerance, tmp_path, capsys):
    x = features()
    write(tmp_path / name, x)
    loaded = Reference.load(tmp_path / name)
    expected = Moments.of(x)
    assert torch.allclose(loaded.gaussian.cov, expected.cov, rtol=tolerance, atol=tolerance)
    assert torch.allclose(loaded.gaussian.mean, expected.mean, rtol=tolerance)
    assert (loaded.spatial is not None) == (write is as_adm)
    assert (loaded.features is not None) == (write is as_pool_3)
    out = tmp_path / "ours.npz"
    assert stats_main(["convert", str(tmp_path / name), str(out), "--count", "40", "--dataset", "made up"]) == 0
    ours = Reference.load(out)
    assert ours.gaussian.n == 40 and ours.provenance["dataset"] == "made up"
    assert ours.provenance["source_sha256"] == sha256(tmp_path / name)
    assert stats_main(["diff", str(tmp_path / name), str(out)]) == 0
    assert stats_main(["inspect", str(out)]) == 0
    assert "made up" in capsys.readouterr().out


def test_diff_of_other_images_exits_with_1(tmp_path, capsys):
    as_edm(tmp_path / "a.npz", features(seed=1))
    as_edm(tmp_path / "b.npz", features(seed=2))
    assert stats_main(["diff", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 1
    as_edm(tmp_path / "c.npz", features(d=5))
    with pytest.raises(MetricError, match="6 and 5"):
        stats_main(["diff", str(tmp_path / "a.npz"), str(tmp_path / "c.npz")])


@pytest.mark.parametrize("array", ["sigma_s", "mu_s", "features"])
def test_diff_sees_spatial_moments_and_features(tmp_path, capsys, array):
    """Of which sfid, kid and pr are taken, while mean and covariance are equal."""
    x = features()
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    if array == "features":
        for path, order in ((a, range(40)), (b, range(39, -1, -1))):
            Reference(Gaussian.of(Moments.of(x)), {}, None, x[list(order)]).save(path)
    else:
        as_adm(a, x)
        with np.load(a) as file:
            np.savez(b, **{**file, array: 2 * file[array]})
    assert stats_main(["diff", str(a), str(a)]) == 0
    assert stats_main(["diff", str(a), str(b)]) == 1
    as_edm(tmp_path / "without.npz", x)
    assert stats_main(["diff", str(a), str(tmp_path / "without.npz")]) == 0
    assert f"only in {a}" in capsys.readouterr().out


@pytest.mark.parametrize("count", [-3, 0, 1, 5])
def test_statistics_are_not_of_fewer_images_than_their_rank_says(count, tmp_path):
    """40 images of 6 features: any 7 could be, 6 could not. As few as that would cut eigenvalues off."""
    as_float32(tmp_path / "r.npz", features())
    convert = ["convert", str(tmp_path / "r.npz"), str(tmp_path / "out.npz"), "--count"]
    with pytest.raises(ConfigError, match=f"--count {count} is impossible: .* at least 7 images"):
        stats_main([*convert, str(count)])
    assert not (tmp_path / "out.npz").exists()
    assert stats_main([*convert, "7"]) == 0


def test_the_rounding_of_float32_is_no_negative_eigenvalue(tmp_path):
    """Few images that differ most in one direction: the largest eigenvalue is far above each variance. And equal ones
    have no covariance at all."""
    x = 0.01 * features(64, 256) + 0.4 + features(64, 1, seed=1)
    cov = np.cov(x.numpy(), rowvar=False, dtype=np.float32)
    for name, sigma in (("few", cov), ("equal", np.zeros((256, 256)))):
        np.savez(tmp_path / f"{name}.npz", mu=x.mean(0).numpy(), sigma=sigma)
        assert Reference.load(tmp_path / f"{name}.npz").dim == 256


def test_statistics_may_be_tensors(tmp_path):
    x = features().double()
    torch.save({"mu": x.mean(0), "sigma": x.T.cov()}, tmp_path / "tensors.pt")
    assert torch.equal(Reference.load(tmp_path / "tensors.pt").gaussian.mean, x.mean(0))


def test_equal_images_have_statistics_that_load_again(tmp_path):
    """Their covariance is 0 but for the rounding of the mean that is taken out."""
    x, _ = mnist_digits()
    extract = extractor("mnist_classifier")
    build_reference([x[:1].expand(50, -1, -1, -1)], extract, protocol("mnist")).save(tmp_path / "equal.npz")
    again = Reference.load(tmp_path / "equal.npz")
    assert again.gaussian.cov.abs().max() < 1e-12 and again.provenance["noise_floor"]["distance"] < 1e-9


def test_without_features_the_statistics_are_the_same(tmp_path, capsys):
    x = mnist_digits()[0][::10]
    np.savez(tmp_path / "digits.npz", images=x.numpy())
    files = [tmp_path / name for name in ("with.npz", "without.npz")]
    for file, options in zip(files, ([], ["--no-features"]), strict=True):
        build = ["build", str(tmp_path / "digits.npz"), "--protocol", "mnist", "--out", str(file), *options]
        assert stats_main([*build, "--device", "cpu"]) == 0
    whole, without = map(Reference.load, files)
    assert len(whole.features) == len(x) and without.features is None
    assert (without.gaussian.cov - whole.gaussian.cov).abs().max() < 1e-10 * whole.gaussian.cov.norm()
    floors = [each.provenance["noise_floor"] for each in (whole, without)]
    assert 0.8 * floors[0]["n"] < floors[1]["n"] <= floors[0]["n"] == len(x) // 2
    assert floors[1]["distance"] == pytest.approx(floors[0]["distance"], rel=0.3), "of two other halves"


def bad_files():
    good = np.cov(features().double().numpy(), rowvar=False)
    mu = np.zeros(6)
    lopsided, negative = good.copy(), good - 2 * np.eye(6)
    lopsided[0, 1] += 1
    return {
        "symmetric": {"mu": mu, "sigma": lopsided},
        "semidefinite": {"mu": mu, "sigma": negative},
        "NaN": {"mu": mu * np.nan, "sigma": good},
        "expected .d. and": {"mu": np.zeros(5), "sigma": good},
        "holds weights": {"weights": mu},
        "expected .images": {"pool_3": mu},
        "complex128; expected real numbers": {"mu": mu, "sigma": good * 1j},
        "only one of mu_s and sigma_s": {"mu": mu, "sigma": good, "mu_s": mu},
    }


@pytest.mark.parametrize("message", bad_files())
def test_impossible_statistics_are_refused_by_name(message, tmp_path):
    np.savez(tmp_path / "wrong.npz", **bad_files()[message])
    with pytest.raises(MetricError, match=message) as error:
        Reference.load(tmp_path / "wrong.npz")
    assert "wrong.npz" in str(error.value)


class Bomb:
    def __reduce__(self):
        return (exit, ("the pickle was executed",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unreadable_files_are_refused_and_nothing_is_executed(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "bomb.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00cut")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    np.savez(tmp_path / "half.npz", mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(2))
    np.savez_compressed(tmp_path / "damaged.npz", mu=np.arange(4096.0), sigma=np.eye(2))
    damaged = bytearray((tmp_path / "damaged.npz").read_bytes())
    damaged[200:260] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    strange = ("array.npz", "list.pt", "half.npz", "damaged.npz")
    with pytest.raises(MetricError, match=r"bomb.pkl is a pickle, which is code and is not run. Where .* np.savez"):
        Reference.load(tmp_path / "bomb.pkl")
    for name in ("text.npz", "bomb.npz", "bomb.pt", "cut.npz", "absent.npz", *strange):
        with pytest.raises(MetricError, match=name):
            Reference.load(tmp_path / name)


def test_the_own_format_carries_no_pickle():
    with np.load(SHIPPED, allow_pickle=False) as file:
        assert json.loads(str(file["provenance"]))["dataset"] == "mnist"


def test_a_reference_of_another_protocol_is_refused(tmp_path):
    x, _ = mnist_digits()
    mine = protocol("mnist", reference=str(tmp_path / "r.npz"), reference_sha256=None)
    shipped = Reference.load(SHIPPED)
    for change, message in (
        ({"extractor_sha256": "0" * 64}, "extractor that made"),
        ({"extractor_resize": "clean"}, "resize=clean"),
        ({"image_size": [28, 28]}, "made of 28x28"),
    ):
        Reference(shipped.gaussian, {**shipped.provenance, **change}).save(tmp_path / "r.npz")
        scoring.reference_of.cache_clear()
        with pytest.raises(MetricError, match=message):
            scoring.score([x[:10]], mine)
    as_edm(tmp_path / "r.npz", features())
    scoring.reference_of.cache_clear()
    with pytest.raises(MetricError, match="6 features, but mnist_classifier gives 64"):
        scoring.score([x[:10]], mine)
    with pytest.raises(MetricError, match="sha256"):
        scoring.score([x[:10]], protocol("mnist", reference=str(tmp_path / "r.npz")))


def test_images_of_another_size_than_the_data_set_s_are_refused(tmp_path):
    """Published statistics do not say of what size their images were, the name of the data set does; of moments too."""
    shipped, digits = Reference.load(SHIPPED).gaussian, mnist_digits()[0][:10]
    np.savez(tmp_path / "published.npz", mu=shipped.mean.numpy(), sigma=shipped.cov.numpy())
    np.savez(tmp_path / "digits.npz", arr_0=digits.permute(0, 2, 3, 1).numpy())
    own = [f"protocol.reference={tmp_path / 'published.npz'}", "protocol.reference_sha256=null", "device=cpu"]
    moments = f"path={tmp_path / 'moments.npz'}"
    for path in (f"path={tmp_path / 'digits.npz'}", moments):
        same = [path, "protocol=mnist", "protocol.dataset=cifar10", *own]
        assert score_path_main([*same, *([] if path == moments else [moments.replace("path", "moments", 1)])]) == 0
        with pytest.raises(MetricError, match="the images are 32x32, but those of ffhq64 are 64x64"):
            score_path_main([path, "protocol=mnist", "protocol.dataset=ffhq64", *own])


def test_statistics_do_not_take_the_place_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "CHECKPOINTS", tmp_path / "checkpoints")
    made = tmp_path / "checkpoints" / "mnist_reference"
    for name in ("A/set_v1.0", "B/set_v1.0", "cifar10", "fd_mnist", "here"):
        (tmp_path / name).mkdir(parents=True)
        for i, digit in enumerate(mnist_digits()[0][:3, 0].numpy()):
            Image.fromarray(digit).save(tmp_path / name / f"{i}.png")

    def build(*of):
        return stats_main(["build", *of, "--protocol", "mnist"])

    assert build(str(tmp_path / "A" / "set_v1.0")) == 0
    first = (made / "set_v1.0.npz").read_bytes()
    with pytest.raises(ConfigError, match="set_v1.0.npz is there already: say with --out"):
        build(str(tmp_path / "B" / "set_v1.0"))
    assert (made / "set_v1.0.npz").read_bytes() == first
    for name in ("cifar10", "fd_mnist"):  # where those of CIFAR-10 itself and of the shipped digits lie
        with pytest.raises(ConfigError, match=f"{name}.npz is the place of another data set: say with --out"):
            build(str(tmp_path / name))
    monkeypatch.chdir(tmp_path / "here")
    assert build(".") == 0
    assert sorted(path.name for path in made.iterdir()) == ["here.npz", "set_v1.0.npz"]
    assert build(str(tmp_path / "B" / "set_v1.0"), "--out", str(made / "set_v1.0.npz")) == 0


def test_build_from_a_folder_and_score_it_as_zero(tmp_path, capsys):
    folder = tmp_path / "real"
    folder.mkdir()
    for i, digit in enumerate(mnist_digits()[0][::250, 0].numpy()):
        Image.fromarray(digit).save(folder / f"{i:02d}.png")
    out = tmp_path / "real.npz"
    assert stats_main(["build", str(folder), "--protocol", "mnist", "--out", str(out)]) == 0
    reference = Reference.load(out)
    assert reference.gaussian.n == 20 and reference.provenance["image_size"] == [32, 32]
    with pytest.raises(ConfigError, match="--protocol"):
        stats_main(["build", str(folder)])
    with pytest.raises(ConfigError, match="cifar10"):
        stats_main(["build", "cifar11", "--protocol", "mnist"])
    with pytest.raises(ConfigError, match="device=nonsense is not available here"):
        stats_main(["build", "mnist", "--device", "nonsense", "--out", str(out)])
    assert stats_main(["build", str(folder), "--protocol", "mnist", "--out", str(out), "--device", "auto"]) == 0


@pytest.mark.parametrize("command", ["build", "convert", "score"])
def test_a_name_without_its_ending_is_refused_before_the_work(tmp_path, command):
    """NumPy would add it, and the file would not be where it is looked for."""
    given = {
        "build": lambda: stats_main(["build", "mnist", "--out", str(tmp_path / "ref")]),
        "convert": lambda: stats_main(["convert", str(tmp_path / "nothing.npz"), str(tmp_path / "ref")]),
        "score": lambda: score_path_main([f"path={tmp_path}", "protocol=mnist", f"moments={tmp_path / 'ref'}"]),
    }
    with pytest.raises(ConfigError, match=r"ref must have a name that ends in .npz"):
        given[command]()
    assert not [*tmp_path.iterdir()]


def test_a_trial_of_statistics_does_not_take_the_place_of_the_true_ones(tmp_path):
    with pytest.raises(ConfigError, match="--limit makes statistics for a trial: say with --out where they go"):
        stats_main(["build", "mnist", "--limit", "10"])
    assert stats_main(["build", "mnist", "--limit", "10", "--out", str(tmp_path / "few.npz")]) == 0


def test_statistics_are_of_images_rounded_as_the_protocol_says(tmp_path):
    np.savez(tmp_path / "floats.npz", images=np.full((4, 8, 8), 10.7))
    for rounding, grey in (("round", 11), ("truncate", 10)):
        batches, _ = datasets.dataset_batches(str(tmp_path / "floats.npz"), tmp_path, 1, rounding=rounding)
        assert {*torch.cat([*batches]).unique().tolist()} == {grey}


def test_crops_of_faces_are_told_apart_by_name():
    """An aligned CelebA image is 178 wide and 218 high; each variant takes its own window of it."""
    y, x = np.mgrid[:218, :178]
    face = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    windows = {}
    for name in ("celeba64-ddim", "celeba64-centre140", "celeba64-centre148"):
        (batch,) = datasets._prepared([(face, 0)], datasets.DATASETS[name].prepare, 4, None)
        assert batch.shape == (1, 3, 64, 64)
        windows[name] = batch[0, 0].float().mean().item(), batch[0, 1].float().mean().item()
    # the mean colour is the middle of the window
    assert windows["celeba64-ddim"] == pytest.approx((25 + 63.5, 57 + 63.5), abs=0.6)
    assert windows["celeba64-centre140"] == pytest.approx((19 + 69.5, 39 + 69.5), abs=0.6)
    assert windows["celeba64-centre148"] == pytest.approx((15 + 73.5, 35 + 73.5), abs=0.6)


def test_named_data_sets_come_in_batches_and_absent_ones_are_refused(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    monkeypatch.setattr(datasets, "_open", lambda *_: [(Image.fromarray(i), 0) for i in images])
    batches, about = datasets.dataset_batches("cifar10", tmp_path, 3, batch=2, limit=3)
    assert torch.equal(torch.cat(list(batches)), torch.from_numpy(images[:3]).permute(0, 3, 1, 2))
    assert about == {"dataset": "cifar10", "crop": "none", "resize": "none"}
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="LSUN"):
        datasets.dataset_batches("lsun-bedroom256", tmp_path, 3)
