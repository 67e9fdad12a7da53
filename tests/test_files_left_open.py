"""A protocol need not say which weights and statistics it takes; what was made with others is still told apart."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from evodiff.data import mnist_digits
from evodiff.errors import MetricError
from evodiff.metrics import features
from evodiff.metrics.build import build_reference
from evodiff.metrics.cli import score_path_main
from evodiff.metrics.features import extractor
from evodiff.metrics.protocol import protocol
from evodiff.metrics.score import Scorer, extractor_of, reference_of, score, scored_by
from evodiff.paths import CHECKPOINTS

OPEN = "protocol.extractor_sha256=null"
SHIPPED = CHECKPOINTS / "mnist_classifier" / "classifier.safetensors"
RUN = ["solver=ddim", "nfe=2", "seeds=0-7", "device=cpu", "reference_run=null", "metrics=[fid]"]


@pytest.fixture(scope="module")
def digits():
    return mnist_digits()[0][::50]


@pytest.fixture
def others(tmp_path):
    """The classifier with other weights."""
    path = tmp_path / "others.safetensors"
    save_file({name: 1.1 * value for name, value in load_file(SHIPPED).items()}, path)
    return path


@pytest.fixture
def swap(monkeypatch):
    """Puts other weights in the place of the shipped ones."""

    def to(path: Path) -> None:
        load = features.mnist_classifier
        monkeypatch.setattr(features, "mnist_classifier", lambda weights, device: load(weights or path, device))
        extractor.cache_clear()

    yield to
    extractor.cache_clear()


def test_images_and_reference_are_seen_by_one_extractor(digits, others, tmp_path):
    mine = replace(
        protocol("mnist"), extractor_sha256=None, reference_sha256=None, reference=str(tmp_path / "real.npz")
    )
    build_reference([digits], extractor_of(mine, weights=others), mine).save(tmp_path / "real.npz")
    reference_of.cache_clear()
    with pytest.raises(
        MetricError, match=r"real.npz was made by another mnist_classifier .* than the one of the images"
    ):
        score([digits[:50]], mine)
    assert score([digits], mine, weights=others)["fd_mnist@100"] == 0
    seen = Scorer(replace(mine, reference=protocol("mnist").reference))
    seen.add(digits)
    seen.moments.save(tmp_path / "moments.npz")
    with pytest.raises(MetricError, match="another mnist_classifier"):
        score_path_main([f"path={tmp_path}/moments.npz", "protocol=mnist", OPEN, f"reference={tmp_path}/real.npz"])


def test_a_score_is_not_kept_when_the_extractor_is_replaced(evodiff_command, results, others, swap):
    open_run = ["run", "model=mnist_tiny", *RUN, "protocol.reference_sha256=null", OPEN]
    assert evodiff_command(*open_run)[0] == 0
    (path,) = results.glob("runs/mnist_tiny/*/score.json")
    before = json.loads(path.read_text())
    code = score_hash()
    swap(others)
    assert score_hash() != code
    assert evodiff_command(*open_run)[0] == 1, "the reference is still of the first"
    real = results / "real.npz"
    mine = replace(protocol("mnist"), extractor_sha256=None)
    build_reference([mnist_digits()[0][::5]], extractor_of(mine), mine).save(real)
    assert evodiff_command(*open_run, f"protocol.reference={real}")[0] == 0
    again = [json.loads(p.read_text()) for p in results.glob("runs/mnist_tiny/*/score*.json")]
    assert {before["files"]["extractor"], extractor_of(mine).sha256} == {r["files"]["extractor"] for r in again}


def score_hash():
    return scored_by(replace(protocol("mnist"), extractor_sha256=None))


def test_features_alone_serve_every_protocol_of_that_extractor_and_no_other(evodiff_command, results, others, swap):
    features_only = ["model=mnist_tiny", *RUN, "save=none", OPEN]
    assert evodiff_command("run", *features_only)[0] == 0
    (folder,) = results.glob("runs/mnist_tiny/ddim-nfe2-*")
    assert evodiff_command("score", *features_only, "protocol.n=8")[0] == 0, "the features are the same"
    names = [json.loads(path.read_text())["metrics"] for path in folder.glob("score*.json")]
    assert names[0] == names[1] and len(names) == 2
    swap(others)
    real = results / "real.npz"
    mine = replace(protocol("mnist"), extractor_sha256=None)
    build_reference([mnist_digits()[0][::5]], extractor_of(mine), mine).save(real)
    code, _, said = evodiff_command(
        "score", *features_only, f"protocol.reference={real}", "protocol.reference_sha256=null"
    )
    assert code == 1 and "keeps no images, and not the features of protocol mnist" in said


def test_weights_that_the_protocol_names_are_no_other_protocol(digits, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=digits.numpy())
    hashes = []
    for digest in (protocol("mnist").extractor_sha256, protocol("mnist").extractor_sha256[:8]):
        for weights in ([], [f"weights={SHIPPED}"]):
            given = [f"path={tmp_path}/images.npz", "protocol=mnist", f"protocol.extractor_sha256={digest}", *weights]
            assert score_path_main([*given, f"moments={tmp_path}/{len(hashes)}.npz", "--json"]) == 0
            hashes.append(json.loads(capsys.readouterr().out)["protocol"]["hash"])
    assert hashes[0] == hashes[1] and hashes[2] == hashes[3] != hashes[0]
    together = ",".join(f"{tmp_path}/{i}.npz" for i in range(4))
    assert score_path_main([f"path={together}", "protocol=mnist", "--json"]) == 0, "all of the same features"
    assert [*json.loads(capsys.readouterr().out)["metrics"]] == ["fd_mnist@400"]
