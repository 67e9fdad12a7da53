"""What a run keeps (`save`) and what is measured on it (`metrics`)."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evodiff.config import build
from evodiff.locks import locked
from evodiff.metrics import score as metrics_score
from evodiff.metrics.distances import recut
from evodiff.metrics.score import Scorer
from evodiff.runs import loaded, score
from evodiff.runs.job import Job
from evodiff.runs.sample import sample_batches, sample_run
from evodiff.runs.score import score_run

RUN = ["solver=ddim", "nfe=2", "seeds=0-23", "shard=10", "batch=7", "device=cpu"]
REFERENCE = "reference_run=['solver=ddim','nfe=3']"
FEATURES = ["metrics=[fid]", "save=none"]


def only(paths):
    (path,) = paths
    return path


def folder_of(results):
    return only(results.glob("runs/mnist_tiny/ddim-nfe2-*"))


def record_of(results):
    return json.loads((folder_of(results) / "score.json").read_text())


def arrays_of(results):
    return [dict(np.load(path)) for path in sorted(folder_of(results).glob("shard-*.npz"))]


@pytest.fixture
def run(evodiff_command):
    def go(*overrides):
        return evodiff_command("run", "model=mnist_tiny", *RUN, *overrides)

    return go


def test_features_alone_give_the_score_that_the_images_give(run, results):
    assert run("metrics=[fid]")[0] == 0
    of_images = record_of(results)["metrics"]
    kept = np.concatenate([a["images"] for a in arrays_of(results)])
    folder_of(results).rename(results / "before")
    assert run(*FEATURES)[0] == 0
    assert record_of(results)["metrics"] == pytest.approx(of_images, rel=1e-6)
    assert [set(a) for a in arrays_of(results)] == [{"seeds", "features"}] * 3
    assert not (folder_of(results) / "grid.png").exists()
    assert kept.shape == (24, 1, 32, 32)


def test_the_extractor_is_given_as_many_images_at_once_while_sampling_as_while_scoring(run, monkeypatch):
    sizes, extracted = [], Scorer.extracted
    monkeypatch.setattr(Scorer, "extracted", lambda self, images: sizes.append(len(images)) or extracted(self, images))
    monkeypatch.setattr(metrics_score, "AT_ONCE", 4)
    assert run(*FEATURES)[0] == 0
    assert sizes == [1, *[4, 3, 3] * 2, 4], "one to see, then batches of 7 in shards of 10, the last of 4"


def test_a_state_that_is_not_kept_is_not_held(results):
    job = Job.compose(["model=mixture", "protocol=none", "metrics=[]", *RUN])
    model = build(job.run.model, device="cpu")
    made = next(sample_batches(job, model, *job.run.plan(model), range(7)))
    assert not job.keeps_states and made.x.untyped_storage().nbytes() == 0


def test_states_alone_need_no_decoder_and_keep_no_images(results, monkeypatch):
    """As a table of latents compares them."""

    def refused(x):
        raise AssertionError("nobody looks at these images")

    real = loaded.build
    monkeypatch.setattr(loaded, "build", lambda cfg, **at: replace(real(cfg, **at), decode=refused))
    common = ["model=mixture", "protocol=none", "metrics=[rmse]", REFERENCE, *RUN]
    job = Job.compose([*common, "save=none"])
    for each in (job, job.reference):
        sample_run(each)
    (path, *_) = sorted(job.run.folder.glob("shard-*.npz"))
    assert set(np.load(path)) == {"seeds", "x"}
    assert score_run(job).metrics["rmse@24"] > 0
    with pytest.raises(AssertionError, match="nobody looks"):
        sample_run(Job.compose([*common, "save=none", "seeds=30-40", "protocol=mnist", "metrics=[fid,rmse]"]))


def test_states_are_kept_only_where_a_metric_compares_them(run, results):
    assert run("metrics=[fid,contrast]")[0] == 0
    assert [set(a) for a in arrays_of(results)] == [{"seeds", "images"}] * 3
    assert list(record_of(results)["metrics"]) == ["fd_mnist@24", "contrast@24"]
    before = [a["images"] for a in arrays_of(results)]
    code, _, err = run("metrics=[rmse]", REFERENCE)
    assert code == 0, "images are those of their seeds: they are made again, with their states"
    assert "shard-000000.npz has no x in it; sampling it anew" in err
    assert [set(a) for a in arrays_of(results)] == [{"seeds", "images", "x"}] * 3
    assert all((a == b["images"]).all() for a, b in zip(before, arrays_of(results), strict=True))
    assert "rmse@24" in record_of(results)["metrics"]


def test_contrast_is_the_spread_of_the_pixels_and_saturated_their_share_at_the_ends(run, results):
    assert run("metrics=[contrast,saturated]")[0] == 0
    images = np.concatenate([a["images"] for a in arrays_of(results)])
    ends, spread = np.isin(images, (0, 255)).mean(), np.mean([image.std() for image in images])
    assert 0.1 < ends < 0.9
    assert record_of(results)["metrics"] == pytest.approx({"contrast@24": spread, "saturated@24": ends}, rel=1e-12)


def test_a_metric_asked_for_later_is_added_from_the_same_images(run, results):
    assert run("metrics=[fid]")[0] == 0
    shards = [path.read_bytes() for path in sorted(folder_of(results).glob("shard-*.npz"))]
    first = record_of(results)
    assert run("metrics=[fid,is,contrast]")[0] == 0
    later = record_of(results)
    assert list(later["metrics"]) == ["fd_mnist@24", "is_mnist@24", "is_std_mnist@24", "contrast@24"]
    assert later["metrics"]["fd_mnist@24"] == first["metrics"]["fd_mnist@24"]
    assert run("metrics=[contrast]")[0] == 0
    assert record_of(results) == later, "what is asked is there already"
    assert [path.read_bytes() for path in sorted(folder_of(results).glob("shard-*.npz"))] == shards
    assert len(later["files"]["extractor"]) == len(later["files"]["reference"]) == 64


def test_an_error_stays_until_another_reference_is_asked_for(run, results):
    assert run("metrics=[contrast,rmse]", REFERENCE)[0] == 0
    first = record_of(results)
    assert run("metrics=[contrast]")[0] == 0
    assert record_of(results) == first, "what is asked is there already"
    assert run("metrics=[contrast,rmse]", REFERENCE.replace("3", "4"))[0] == 0
    later = record_of(results)
    assert later["reference_run"] != first["reference_run"] and later["metrics"] != first["metrics"]


def test_an_error_that_had_no_reference_run_is_measured_when_it_has_one(run, results):
    assert run("metrics=[sw]", REFERENCE)[0] == 0
    assert run("metrics=[rmse]", "reference_run=null")[0] == 0
    assert record_of(results)["asked"] == ["sw"]
    assert run("metrics=[rmse]", REFERENCE)[0] == 0
    assert record_of(results)["metrics"].keys() == {"sw@24", "rmse@24"}


def test_a_reference_run_that_cannot_be_is_refused_before_the_first_image(run, results):
    code, _, err = run("metrics=[rmse]", "reference_run=['solver=heun','nfe=3']")
    assert code == 1 and "Heun cannot spend exactly nfe=3" in err
    assert not [*results.glob("runs/*/*/shard-*")]


def test_a_file_called_none_is_no_weights(run, results, tmp_path, monkeypatch):
    (tmp_path / "None").write_text("of something else")
    monkeypatch.chdir(tmp_path)
    assert run("metrics=[]", "model=mixture", "protocol=none")[0] == 0
    (manifest,) = results.glob("runs/mixture/*/manifest.json")
    assert json.loads(manifest.read_text())["weights"] == {}


def test_a_complete_run_has_no_locks_of_its_shards(run, results):
    assert run("metrics=[]")[0] == 0
    assert not [*folder_of(results).glob(".locks/shard-*")] and (folder_of(results) / ".locks").exists()


def test_what_was_measured_before_is_kept_beside_what_is_asked_now(run, results):
    assert run("metrics=[fid,rmse,rmse_images]", REFERENCE)[0] == 0
    first = record_of(results)
    assert run("metrics=[contrast]")[0] == 0
    both = record_of(results)
    assert both["metrics"] == first["metrics"] | {"contrast@24": both["metrics"]["contrast@24"]}
    assert {**both, "metrics": 0, "asked": 0} == {**first, "metrics": 0, "asked": 0}
    assert run("metrics=[rmse]", REFERENCE.replace("3", "4"))[0] == 0
    moved = record_of(results)
    assert moved["asked"] == ["fid", "contrast", "rmse"], "the error of the images was against the other run"
    assert moved["metrics"].keys() == {"fd_mnist@24", "contrast@24", "rmse@24"}
    assert moved["metrics"]["rmse@24"] != first["metrics"]["rmse@24"]


def test_each_protocol_has_a_record_of_its_own(run, results):
    assert run("metrics=[fid]")[0] == 0
    first = (folder_of(results) / "score.json").read_bytes()
    assert run("metrics=[fid,contrast]", "protocol.n=4000")[0] == 0
    assert run("metrics=[saturated]", "protocol=none")[0] == 0
    own, none = sorted(folder_of(results).glob("score-*.json"))
    assert json.loads(own.read_text())["metrics"].keys() == {"fd_mnist@24", "contrast@24"}
    assert json.loads(own.read_text())["protocol"]["hash"] in own.name
    assert none.name == "score-none.json" and json.loads(none.read_text())["metrics"].keys() == {"saturated@24"}
    assert (folder_of(results) / "score.json").read_bytes() == first
    written = own.stat().st_mtime_ns
    assert run("metrics=[fid]", "protocol.n=4000")[0] == 0
    assert own.stat().st_mtime_ns == written, "what was measured is not measured again"


def test_a_run_is_scored_by_one_process_at_a_time(run, results, monkeypatch):
    """Or one would write over what the other has measured."""
    assert run("metrics=[contrast]")[0] == 0
    measured = score._scored

    def while_locked(job):
        with locked(job.run.folder, "score.lock", timeout=0) as free:
            assert not free
        return measured(job)

    monkeypatch.setattr(score, "_scored", while_locked)
    assert run("metrics=[saturated]")[0] == 0
    assert record_of(results)["asked"] == ["contrast", "saturated"]


def test_nothing_is_kept_of_other_images(run, results):
    assert run("metrics=[fid]")[0] == 0
    for shard in folder_of(results).glob("shard-*"):
        shard.unlink()
    assert run("metrics=[contrast]", "shard=12")[0] == 0
    assert record_of(results)["metrics"].keys() == {"contrast@24"}


def test_logits_are_kept_for_the_inception_score(run, results):
    assert run("metrics=[fid,is]", "save=none")[0] == 0
    assert [set(a) for a in arrays_of(results)] == [{"seeds", "features", "logits"}] * 3
    of_features = record_of(results)["metrics"]
    folder_of(results).rename(results / "before")
    assert run("metrics=[fid,is]")[0] == 0
    assert record_of(results)["metrics"] == pytest.approx(of_features, rel=1e-6)


def test_what_was_not_kept_is_not_scored(run, results):
    assert run(*FEATURES)[0] == 0
    code, _, err = run("metrics=[is]", "save=none")
    assert code == 1
    assert "keeps no images, and not the features and logits of protocol mnist" in err and "save=shards" in err


def test_grid_keeps_the_first_images(run, results):
    assert run("metrics=[fid]", "save=grid")[0] == 0
    preview = np.concatenate([a["preview"] for a in arrays_of(results)])
    assert (folder_of(results) / "grid.png").exists()
    folder_of(results).rename(results / "before")
    assert run("metrics=[fid]")[0] == 0
    assert (np.concatenate([a["images"] for a in arrays_of(results)]) == preview).all()


def test_png_is_the_image_of_its_seed(run, results):
    assert run("metrics=[fid]", "save=png")[0] == 0
    images = np.concatenate([a["images"] for a in arrays_of(results)])
    files = sorted((folder_of(results) / "png").iterdir())
    assert [path.name for path in files] == [f"{seed:06d}.png" for seed in range(24)]
    assert (np.stack([np.asarray(Image.open(path)) for path in files]) == images[:, 0]).all()


def test_pngs_are_also_made_of_a_run_that_is_there(run, results):
    assert run("metrics=[fid]")[0] == 0
    assert not (folder_of(results) / "png").exists()
    assert run("metrics=[fid]", "save=png")[0] == 0
    images = np.concatenate([a["images"] for a in arrays_of(results)])
    files = sorted((folder_of(results) / "png").iterdir())
    assert (np.stack([np.asarray(Image.open(path)) for path in files]) == images[:, 0]).all() and len(files) == 24
    files[3].unlink()
    assert run("metrics=[fid]", "save=png")[0] == 0 and files[3].exists()


def test_of_the_reference_no_pngs_are_asked(run, results):
    """It may have kept no images, for another run."""
    rmse = ["metrics=[rmse]", REFERENCE]
    assert run(*rmse, "save=none")[0] == 0
    folder_of(results).rename(results / "before")
    assert run(*rmse, "save=png")[0] == 0
    assert len([*(folder_of(results) / "png").iterdir()]) == 24 == len([*results.rglob("*.png")]) - 1  # and grid.png


def test_pngs_of_a_run_that_kept_no_images_are_refused(run):
    assert run(*FEATURES)[0] == 0
    code, _, err = run("metrics=[fid]", "save=png")
    assert code == 1 and "was written without images" in err


def test_the_reference_may_lie_in_shards_of_another_size(run, results):
    sizes = ["metrics=[rmse,sw]", REFERENCE]
    assert run(*sizes)[0] == 0
    first = record_of(results)["metrics"]
    folder_of(results).rename(results / "before")
    assert run(*sizes, "shard=7")[0] == 0
    assert record_of(results)["metrics"] == pytest.approx(first, rel=1e-6)
    assert 0 < first["sw@24"] < first["rmse@24"] < 1, "points move at least as far as their distribution does"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["save=pngs"], "save=pngs does not exist. Did you mean png? Possible: shards, png, grid, none."),
        (["metrics=[fid,kidd]"], "no metric is called kidd. Did you mean kid?"),
        (
            ["save=none"],
            "save=none keeps no images, and these metrics are taken from images: contrast. Set metrics=[fid,rmse]",
        ),
        (
            ["metrics=[fid,kid]"],
            "metrics=kid needs at least 1000 images, and there are 24: score more, or leave kid out",
        ),
        (["metrics=[is]", "seeds=3-11"], "metrics=is needs at least 10 images, and there are 9"),
        (["metrics=[curve]"], "metrics=curve needs at least 5000 images"),
        (["metrics=[limit]", "seeds=0-18"], "metrics=limit needs at least 256 images"),
        (["metrics=[pr]", "seeds=0-2"], "metrics=pr needs at least 4 images"),
        (["save=grid", "reference_run=null"], "taken from images: contrast. Set metrics=[fid,rmse]"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_image(run, results, overrides, sentence):
    code, _, err = run(*overrides)
    assert code == 1
    assert sentence in err
    assert not list(results.glob("runs/*/*"))


@pytest.mark.parametrize("content", ["{", "[]", '{"key": "ddim"}'])
def test_a_record_that_cannot_be_read_is_made_anew(run, results, content):
    assert run("metrics=[fid]")[0] == 0
    first = record_of(results)
    (folder_of(results) / "score.json").write_text(content)
    assert run("metrics=[fid]")[0] == 0
    assert record_of(results) == first


def test_rows_are_cut_anew_whatever_shards_they_lie_in():
    rows = np.arange(12)
    shards = [(rows[a:b], 2 * rows[a:b]) for a, b in ((0, 3), (3, 11), (11, 12))]
    parts = list(recut(iter(shards), size=5))
    assert [len(a) for a, _ in parts] == [5, 5, 2]
    assert np.concatenate([a for a, _ in parts]).tolist() == rows.tolist()
    assert all((b == 2 * a).all() for a, b in parts)
