import json
from dataclasses import replace

import pytest
import torch
import yaml

from evodiff.errors import ConfigError
from evodiff.metrics.datasets import SIDES
from evodiff.metrics.protocol import Protocol, from_dict, protocol
from evodiff.paths import CONFIGS, ROOT
from evodiff.sampling import to_uint8

NAMES = sorted(p.stem for p in (CONFIGS / "protocol").glob("*.yaml") if p.stem != "none")


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_loads_and_is_called_as_its_file(name):
    p = protocol(name)
    assert p.name == name
    assert len(p.hash) == 8 and int(p.hash, 16) >= 0
    assert from_dict(json.loads(json.dumps(p.describe()))) == p


def test_no_two_protocols_share_a_hash():
    assert len({protocol(name).hash for name in NAMES}) == len(NAMES)


def test_protocols_of_committed_records_keep_their_hash():
    records = list((ROOT / "results" / "tables").glob("*/records/*.json"))
    kept = {p["hash"]: p for p in (json.loads(path.read_text())["protocol"] for path in records) if p}
    assert kept
    for hash, fields in kept.items():
        assert from_dict(fields).hash == protocol(fields["name"]).hash == hash


@pytest.mark.parametrize("name", NAMES)
def test_only_the_2015_inception_is_called_fid(name):
    p = protocol(name)
    assert (p.metric == "fid") == (p.extractor == "inception")
    assert ("fid" in p.key("fid", 10)) == (p.extractor == "inception")


CHANGES = {
    "name": "other",
    "metric": "fd_other",
    "extractor": "inception",
    "extractor_sha256": "00" * 4,
    "resize": "clean",
    "scaling": "128",
    "rounding": "truncate",
    "dataset": "other",
    "reference": "other.npz",
    "reference_sha256": "00" * 4,
    "n": 10,
    "labels": "seeded_random",
    "is_part": 100,
}


def test_what_a_command_line_takes_for_a_number_may_be_text():
    given = protocol("mnist").describe() | {"scaling": 127.5, "extractor_sha256": 12345678}
    assert from_dict(given) == from_dict(given | {"scaling": "127.5", "extractor_sha256": "12345678"})


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_hash(field):
    p = protocol("mnist")
    assert replace(p, **{field: CHANGES[field]}).hash != p.hash


def test_equal_protocols_hash_equal_in_every_process():
    p = Protocol("a", "fid", "inception", None, "tensorflow", "128", "round", "d", "r", None, 10)
    assert p.hash == "a69d7280"


def test_names_carry_n_and_fewer_images_are_a_proxy():
    p = protocol("edm")
    assert p.key("fid", 50_000) == "fid@50000" and not p.is_proxy("fid@50000")
    assert p.is_proxy(p.key("fid", 5_000)) and p.is_proxy("fid@150000")
    mnist = protocol("mnist")
    assert [mnist.key(m, 7) for m in ("fid", "fid_se", "sfid", "kid", "is_std")] == [
        "fd_mnist@7",
        "fd_mnist_se@7",
        "sfd_mnist@7",
        "kid_mnist@7",
        "is_std_mnist@7",
    ]


def test_the_data_set_chooses_the_reference():
    assert protocol("edm", dataset="ffhq64").reference != protocol("edm").reference
    with pytest.raises(ConfigError, match="cifar10"):
        protocol("edm", dataset="cifar11")
    assert protocol("edm", dataset="mine", reference="mine.npz").reference == "mine.npz"


def test_the_size_of_every_published_reference_is_known():
    files = [yaml.safe_load((CONFIGS / "protocol" / f"{name}.yaml").read_text()) for name in NAMES]
    assert {dataset for file in files for dataset in file["references"]} == {"mnist", *SIDES}


def test_rounding_rules_differ_as_the_code_bases_do():
    """EDM rounds 127.5 x + 127.5; score_sde, guided-diffusion and EVODiff's scripts drop the fraction."""
    x = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.001, 0.5, 0.9999, 1.0, 2.0], dtype=torch.float64)
    assert to_uint8(x, protocol("edm").rounding).tolist() == [0, 0, 0, 128, 128, 191, 255, 255, 255]
    assert to_uint8(x, protocol("score_sde").rounding).tolist() == [0, 0, 0, 127, 127, 191, 254, 255, 255]
    fine = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    darker = to_uint8(fine, "round").double() - to_uint8(fine, "truncate").double()
    assert darker.mean().item() == pytest.approx(0.5, abs=0.01)


def test_impossible_protocols_are_refused():
    with pytest.raises(ConfigError, match="mnist"):
        protocol("mnits")
    with pytest.raises(ConfigError, match="none"):
        protocol("none")
    with pytest.raises(ConfigError, match="truncate"):
        protocol("mnist", rounding="ceil")
    # labels are drawn by the seeds in any case: a protocol that says otherwise would be another hash of the same images
    with pytest.raises(ConfigError, match="labels='balanced' is not possible; choose none or seeded_random"):
        protocol("mnist", labels="balanced")
    with pytest.raises(ConfigError, match="unknown fields .'colour'"):
        protocol("mnist", colour=1)
    with pytest.raises(ConfigError, match="missing fields"):
        from_dict({"name": "half"})
    with pytest.raises(ConfigError, match="2 images"):
        protocol("mnist", n=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 5e3}, "n=5000.0 is not possible; expected a whole number"),
        ({"name": [1, 2]}, r"protocol.name=\[1, 2\] is impossible: expected text"),
        ({"resize": [1]}, "protocol.resize=.* expected text"),
        ({"dataset": 7, "reference": "own.npz"}, "protocol.dataset=7 is impossible: expected text"),
        ({"extractor_sha256": "2"}, "extractor_sha256=2 is impossible: expected 8 to 64 hex digits"),
        ({"reference_sha256": "g" * 64}, "expected 8 to 64 hex digits"),
        ({"metric": "fid"}, "FID is of the features of inception, not of mnist_classifier"),
        ({"metric": "mine"}, "metric=mine is impossible: expected fid, or fd_"),
        ({"metric": "fid_clean", "extractor": "inception"}, "metric=fid_clean is impossible: expected fid, or fd_"),
        ({"dataset": "cifar10"}, "fd_mnist.npz is of mnist; set protocol.reference as well"),
    ],
)
def test_fields_that_would_say_what_is_not_so_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        protocol("mnist", **changes)
