"""How fast a device is taken to be: published training times, counted operations, guidance."""

import json

import pytest
import torch
from count_operations import counted, operations
from torch import nn

from evodiff.config import choices, compose
from evodiff.runs.run import Run
from evodiff.tables import throughput
from evodiff.tables.throughput import OPERATIONS, Rate, known_rates, passes, rate_on

V100 = "one V100 in fp32"
COUNTS = json.loads(OPERATIONS.read_text())


@pytest.fixture
def only(tmp_path, monkeypatch):
    """Operations of these models and of no other."""
    monkeypatch.setattr(throughput, "OPERATIONS", tmp_path / "operations.json")
    return lambda counts: throughput.OPERATIONS.write_text(json.dumps({m: {"network": g} for m, g in counts.items()}))


def test_a_training_time_tells_a_rate():
    """200 million images in 2 days on 8 GPUs, three passes an image."""
    assert known_rates()[V100]["cifar10_edm"].value == pytest.approx(3 * 200e6 / (2 * 24 * 3600 * 8))


def test_a_measured_rate_replaces_a_published_one(tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    throughput.measured_file().parent.mkdir()
    throughput.measured_file().write_text(json.dumps({V100: {"cifar10_edm": 500.0}, "a CPU": {"mixture": 3.0}}))
    rates = known_rates()
    assert rates[V100]["cifar10_edm"] == Rate(500.0, "measured")
    assert rates["a CPU"] == {"mixture": Rate(3.0, "measured")}
    assert "ffhq64_edm" in rates[V100]


def test_what_is_measured_here_adds_to_what_the_project_has_of_a_device(tmp_path, monkeypatch):
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    shipped = json.loads(throughput.SHIPPED.read_text())
    device = next(iter(shipped))
    throughput.measured_file().parent.mkdir()
    throughput.measured_file().write_text(json.dumps({device: {"another": 3.0}}))
    assert known_rates()[device].keys() >= {*shipped[device], "another"}


def test_the_projects_own_rates_stay_where_results_are_written_elsewhere(tmp_path, monkeypatch):
    shipped = known_rates()
    monkeypatch.setenv("EVODIFF_RESULTS", str(tmp_path))
    assert known_rates() == shipped
    assert any(rate.how == "measured" for rates in shipped.values() for rate in rates.values())


def test_an_unknown_network_is_as_fast_as_the_nearest_operation_for_operation(only):
    only({"small": 10.0, "large": 90.0, "asked": 40.0, "tiny": 0.05})
    rates = {"small": Rate(100.0, ""), "large": Rate(20.0, "")}
    assert rate_on(rates, "asked") == Rate(pytest.approx(20.0 * 90 / 40), "0.44 times the operations of large")
    assert rate_on(rates, "small") is rates["small"]
    assert rate_on(rates, "tiny") is None, "a small network waits for launches"
    assert rate_on(rates, "never counted") is None


def run_with(*overrides):
    return Run.from_config(compose("run", list(overrides)))


def test_guidance_costs_what_it_adds():
    assert passes(run_with("model=imagenet256_adm")) == 1
    of = COUNTS["imagenet256_adm"]
    guided = passes(run_with("model=imagenet256_adm", "guidance=classifier"))
    assert guided == pytest.approx(1 + of["classifier"] / of["network"])
    assert passes(run_with("model=sd15", "guidance=classifier_free")) == 2


def test_every_published_model_of_a_table_has_hours_on_a_gpu():
    bases = [o for name in choices("table") for o in compose("table", [f"table={name}"]).table.base]
    models = {o.removeprefix("model=") for o in bases if o.startswith("model=")}
    published = models - {"mnist_tiny", "mixture", "mixture_digits"}
    assert len(published) > 7
    assert all(rate_on(known_rates()[V100], model) for model in published)


def test_operations_of_a_convolution_are_those_counted_by_hand():
    """4 x 4 pixels, 3 x 3 x 2 inputs each, 5 outputs, a multiplication and an addition; the gradient takes as many."""
    layer, image = nn.Conv2d(2, 5, 3, padding=1, device="meta"), torch.zeros(1, 2, 4, 4, device="meta")
    by_hand = 2 * 4 * 4 * 3 * 3 * 2 * 5 / 1e9
    assert counted(layer, image) == pytest.approx(by_hand)
    assert counted(layer, image, gradient=True) == pytest.approx(2 * by_hand)


@pytest.mark.parametrize(
    "name", ["cifar10_edm", "celeba64_ddim", "cifar10_score_sde_deep", "imagenet256_adm", "mnist_tiny"]
)
def test_the_recorded_operations_are_those_of_the_networks(name):
    assert operations(name) == pytest.approx(COUNTS[name], rel=1e-4)
