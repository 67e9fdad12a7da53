"""From networks of any kind to one denoiser: predictions, scales, labels, data ranges; and your own network."""

import math

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

import evodiff
from evodiff.checkpoints.registry import find
from evodiff.config import CONFIGS, build, choices, compose
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import LogSNR, grid_for
from evodiff.guidance import ClassifierFree
from evodiff.models.adapter import PREDICTIONS, ContinuousTime, DiscreteTime, NetworkDenoiser, process
from evodiff.models.analytic import GaussianMixture
from evodiff.models.loading import cosine_betas, scaled_linear_betas, schedule_of
from evodiff.models.mnist import mnist_tiny
from evodiff.sampling import generate
from evodiff.schedule import EDM, CosineVP, DiscreteVP, Flow, LinearVP
from evodiff.solvers.dpmpp import DPMSolverPP

MEANS = torch.linspace(-0.8, 0.8, 5, dtype=torch.float64).view(5, 1, 1, 1).expand(5, 1, 2, 2)
PARTS = (MEANS, torch.full((5,), 0.1, dtype=torch.float64), torch.full((5,), 0.2, dtype=torch.float64))


def exact_network(schedule, predicts, data_range=(-1.0, 1.0), seen=None):
    """What a perfect network of the mixture returns, given x and t of its own process and data range."""
    contrast, middle = (data_range[1] - data_range[0]) / 2, (data_range[1] + data_range[0]) / 2
    oracle = GaussianMixture(MEANS * contrast + middle, PARTS[1] * contrast, PARTS[2], schedule)

    def network(x, t):
        if seen is not None:
            seen.append(t[0].item())
        node = schedule.node(t[0].item())
        x = x.double()
        D = oracle(x, node)
        eps = (x - node.alpha * D) / node.sigma
        v, flow = node.alpha * eps - node.sigma * D, eps - D
        outputs = {"eps": eps, "x0": D, "v": v, "score": -eps / node.sigma, "flow": flow}
        return outputs[predicts].float()

    return network


SCHEDULES = {"edm": EDM(), "linear": LinearVP(), "cosine": CosineVP(), "discrete": DiscreteVP.linear(), "flow": Flow()}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("sample_on", ["own", "edm"])
@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_every_kind_of_network_becomes_the_same_denoiser(schedule, predicts, sample_on, data_range):
    network = exact_network(schedule, predicts, data_range)
    seen = process(schedule, lambda node: node.t, sample_on, data_range)
    denoise = NetworkDenoiser(network, predicts, seen)
    first, last = denoise.schedule.node(denoise.schedule.t_start), denoise.schedule.node(denoise.schedule.t_end)
    for lam in (-2.0, 0.0, 1.5):
        node = denoise.schedule.node(denoise.schedule.t_at(lam))
        assert first.lam < lam < last.lam
        x = node.alpha * MEANS[:3] + node.sigma * torch.randn(3, 1, 2, 2, dtype=torch.float64)
        expected = GaussianMixture(*PARTS)(x / node.alpha, EDM().node(node.kappa))
        D = denoise(x, node)
        assert D.dtype == torch.float64
        assert torch.allclose(D, expected, atol=5e-5)


def test_sampling_a_vp_network_on_either_schedule_gives_the_same_images():
    images = []
    for sample_on in ("own", "edm"):
        model = evodiff.wrap(
            exact_network(LinearVP(), "eps"),
            shape=(1, 2, 2),
            predicts="eps",
            schedule=LinearVP(t_start=0.999),
            sample_on=sample_on,
        )
        denoise = model.denoiser(None)
        solver = DPMSolverPP(order=2)
        grid = grid_for(20, solver, LogSNR(), denoise.schedule)
        images.append(generate(denoise, solver, grid, range(8), model.shape).x / grid.nodes[-1].alpha)
    # the starts differ by sigma_T / alpha_T against 1 / alpha_T, a part in 10,000
    assert torch.allclose(*images, atol=2e-3)


@pytest.mark.parametrize("schedule", [EDM(), DiscreteVP.linear()])
def test_a_network_may_work_in_place(schedule):
    """In float32 its input could be the solver's own state."""
    kept, in_place = (
        evodiff.wrap(Halving(inplace), predicts="x0", shape=(1, 2, 2), schedule=schedule, check=False)
        for inplace in (False, True)
    )
    first, second = (evodiff.sample(m, "dpmpp_2m", 5, range(3), dtype=torch.float32).x for m in (kept, in_place))
    assert torch.equal(first, second)


class Halving(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.first = nn.ReLU(inplace)

    def forward(self, x, t):
        return 0.5 * self.first(x)


def test_a_denoiser_that_changes_its_input_is_refused():
    exact = GaussianMixture(*PARTS)

    class InPlace:
        schedule = exact.schedule

        def __call__(self, x, node):
            return x.copy_(exact(x, node))

    with pytest.raises(SamplingError, match="changed its input in place.*work on a copy"):
        evodiff.sample(InPlace(), "ddim", 3, range(2), shape=(1, 2, 2))
    with torch.inference_mode():
        assert evodiff.sample(exact, "ddim", 3, range(2), shape=(1, 2, 2)).nfe == 3


def test_the_learned_variance_is_left_out():
    network = exact_network(DiscreteVP.linear(), "eps")
    seen = process(DiscreteVP.linear(), lambda node: node.t)
    plain = NetworkDenoiser(network, "eps", seen)
    wide = NetworkDenoiser(lambda x, t: torch.cat([network(x, t), torch.full_like(x, 7)], dim=1), "eps", seen)
    x, node = torch.randn(2, 1, 2, 2), seen.native.node(0.3)
    assert torch.equal(plain(x, node), wide(x, node))


def test_labels_are_fractions_of_the_trained_ones_or_the_nearest():
    schedule = DiscreteVP.linear()
    assert DiscreteTime(1000)(schedule.node(0.001)) == 0
    assert DiscreteTime(1000)(schedule.node(1.0)) == 999
    assert DiscreteTime(1000)(schedule.node(0.25075)) == pytest.approx(249.75)
    assert DiscreteTime(1000, whole=True)(schedule.node(0.25075)) == 250
    assert ContinuousTime(999)(LinearVP().node(0.5)) == 499.5
    with pytest.raises(SamplingError, match="outside the times 0.001 to 1.*where churn .* a lower S_max"):
        DiscreteTime(1000)(schedule.node(5e-4))
    with pytest.raises(ConfigError, match="below the times"):
        schedule.node(1e-4)


def test_schedules_of_checkpoints():
    assert schedule_of({"type": "LinearVP", "beta_min": 0.1, "beta_max": 20.0}) == LinearVP()
    assert schedule_of({"type": "EDM", "t_start": 50.0, "t_end": 0.01}) == EDM(50.0, 0.01)
    ddpm = schedule_of(
        {"type": "DiscreteVP", "betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_timesteps": 1000}
    )
    assert ddpm == DiscreteVP.linear()
    cosine = schedule_of({"type": "DiscreteVP", "betas": "cosine", "num_timesteps": 1000})
    assert cosine.node(0.5).alpha == pytest.approx(math.cos(0.508 / 1.008 * math.pi / 2), rel=1e-3)
    assert len(cosine_betas(1000)) == 1000 and max(cosine_betas(1000)) == 0.999
    # ADM's 64x64 network is sampled from where DPM-Solver clips lambda, not from where alpha is 5e-5
    published = schedule_of(find("imagenet64_adm").schedule)
    assert published.node(published.t_start).lam == pytest.approx(-5.1, abs=1e-3) and cosine.node(1).lam < -9
    # Stable Diffusion's: half-log-SNR 3.5347 to -2.6820
    latent = DiscreteVP.from_betas(scaled_linear_betas(0.00085, 0.012, 1000))
    assert latent.node(0.001).lam == pytest.approx(3.5347, abs=1e-4)
    assert latent.node(1.0).lam == pytest.approx(-2.6820, abs=1e-4)
    with pytest.raises(ConfigError, match="type=Cosine"):
        schedule_of({"type": "Cosine"})
    for wrong in ({"type": "EDM", "t_stat": 1.0}, {"type": "DiscreteVP", "betas": "cosine"}):
        with pytest.raises(ConfigError, match="cannot be made of"):
            schedule_of(wrong)


class Tiny(nn.Module):
    """A network of one weight: eps(x, t) = w x."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x, t, y=None):
        return self.weight * x + (0 if y is None else y.view(-1, 1, 1, 1).float())


@pytest.mark.slow
def test_a_third_of_the_wrong_predictions_is_refused_and_right_ones_are_not():
    """Among them all networks that are said to predict the image and do not."""
    tiny = mnist_tiny().denoiser(None)

    def network_of(schedule, predicts):
        def network(x, t):
            node = schedule.node(t[0].item())
            D = tiny(x / node.alpha, EDM().node(node.kappa))
            eps = (x - node.alpha * D) / node.sigma
            v, flow = node.alpha * eps - node.sigma * D, eps - D
            return {"eps": eps, "x0": D, "v": v, "score": -eps / node.sigma, "flow": flow}[predicts]

        return network

    def accepted(schedule, truth, told):
        own = {"shape": (1, 32, 32), "schedule": schedule, "label": lambda node: node.t}
        try:
            evodiff.wrap(network_of(schedule, truth), predicts=told, **own)
        except ConfigError:
            return False
        return True

    passed = {
        (name, truth, told)
        for name, schedule in SCHEDULES.items()
        for truth in PREDICTIONS
        for told in PREDICTIONS
        if accepted(schedule, truth, told)
    }
    right = {(name, truth, truth) for name in SCHEDULES for truth in PREDICTIONS}
    assert right <= passed
    assert len(passed - right) <= 65
    assert not [told for _, _, told in passed - right if told == "x0"]


OWN = {"shape": (3, 8, 8), "predicts": "eps", "schedule": DiscreteVP.linear()}


def test_wrapping_a_module_freezes_it_and_takes_its_weights(tmp_path):
    save_file({"weight": torch.tensor(0.25)}, tmp_path / "w.safetensors")
    torch.save({"weight": torch.tensor(0.75)}, tmp_path / "w.pt")
    for name, content in (("empty.pt", b""), ("text.pt", b"no weights")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} cannot be loaded into Tiny"):
            evodiff.wrap(Tiny(), weights=str(tmp_path / name), **OWN)
    x, node = torch.ones(1, 3, 8, 8), OWN["schedule"].node(0.5)
    for name, weight in (("w.safetensors", 0.25), ("w.pt", 0.75)):
        net = Tiny().train()
        model = evodiff.wrap(net, weights=str(tmp_path / name), **OWN)
        assert not net.training and not net.weight.requires_grad
        expected = (1 - node.sigma * weight) / node.alpha
        assert model.denoiser(None)(x, node).mean().item() == pytest.approx(expected, rel=1e-6)
        assert list(model.files) == [name] and len(model.files[name]) == 64


def test_class_labels_reach_the_network_and_guidance():
    model = evodiff.wrap(Tiny(), num_classes=4, **OWN)
    x, node = torch.zeros(2, 3, 8, 8), OWN["schedule"].node(0.5)
    labels = torch.tensor([1, 3])
    shift = model.denoiser(labels)(x, node)[:, 0, 0, 0]
    assert torch.allclose(shift, -node.sigma / node.alpha * labels)
    assert torch.allclose(ClassifierFree(2.0)(model, labels)(x, node)[:, 0, 0, 0], 2 * shift)


class Embedded(nn.Module):
    """A network that knows the unconditional branch by a label of its own, 4."""

    def __init__(self):
        super().__init__()
        self.of = nn.Embedding.from_pretrained(torch.arange(5.0)[:, None])

    def forward(self, x, t, y):
        return 0.5 * x + self.of(y).view(-1, 1, 1, 1)


@pytest.mark.parametrize("whole", [int, np.int64])
def test_the_unconditional_branch_may_have_a_label(whole):
    model = evodiff.wrap(Embedded(), num_classes=whole(4), null_label=whole(4), **OWN)
    x, node = torch.zeros(2, 3, 8, 8), OWN["schedule"].node(0.5)
    ratio = -node.sigma / node.alpha
    assert torch.allclose(model.denoiser(None)(x, node), torch.tensor(4 * ratio))
    guided = ClassifierFree(2.0)(model, torch.tensor([1, 3]))(x, node)[:, 0, 0, 0]
    assert torch.allclose(guided, ratio * (4 + 2 * (torch.tensor([1.0, 3.0]) - 4)))


def test_without_an_unconditional_branch_guidance_says_so():
    model = evodiff.wrap(Embedded(), num_classes=4, **OWN)
    with pytest.raises(ConfigError, match="no unconditional|unconditional branch"):
        evodiff.sample(model, "ddim", nfe=2, seeds=range(2), guidance=ClassifierFree(2.0))
    assert evodiff.wrap(Tiny(), num_classes=4, **OWN).unconditional


@pytest.mark.parametrize("lacking", [{"num_classes": 6}, {"num_classes": 4, "null_label": 5}])
def test_labels_that_the_network_has_no_embedding_for_are_refused(lacking):
    with pytest.raises(ConfigError, match="the model fails on .* IndexError"):
        evodiff.wrap(Embedded(), **OWN, **lacking)


@pytest.mark.parametrize("wrong", [{"null_label": -1}, {"null_label": "4"}, {"null_label": 4, "num_classes": 0}])
def test_a_null_label_is_a_whole_number_of_a_network_with_classes(wrong):
    with pytest.raises(ConfigError, match="null_label=.* must be a whole number from 0 on, of a network with classes"):
        evodiff.wrap(Embedded(), **{"num_classes": 4, **OWN, **wrong})


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x, t: x[:, :, ::2], r"returns \[2, 3, 4, 8\]"),
        (lambda x, t: (x, t), "returns tuple"),
        (lambda x, t: x.long(), "torch.int64"),
        (lambda x, t: x / 0, "nan or inf"),
        (lambda x, t: x + 1000, "root mean square"),
        (lambda x: x, "the model fails on .* TypeError"),
    ],
)
def test_networks_that_cannot_be_right_are_refused_before_sampling(network, message):
    with pytest.raises(ConfigError, match=message):
        evodiff.wrap(network, **OWN)
    evodiff.wrap(network, check=False, **OWN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicts": "noise"}, "predicts=noise does not exist; possible: eps, x0, v, score"),
        *(
            ({"shape": shape}, "must be channels, height, width")
            for shape in ((8, 8), 32, None, ("1", 8, 8), (0, 8, 8))
        ),
        *(({"data_range": ends}, "two rising numbers") for ends in ((1, 0), 1, ("a", "b"))),
        *(({"schedule": wrong}, "must be an object of evodiff.schedule") for wrong in ("linear", None, LinearVP)),
        ({"label": 999}, "label=999 must be a function of a node"),
        ({"label": lambda node: "late"}, "label gives 'late' for the first time"),
        *(({"num_classes": wrong}, "must be a whole number") for wrong in (-1, "10", None)),
        ({"sample_on": "vp"}, "sample_on=.vp. does not exist"),
        ({"weights": "absent.safetensors"}, "absent.safetensors cannot be loaded"),
        ({"weights": 3}, "weights=3 must be the path of a file"),
        *(({"device": wrong}, f"device={wrong} is not available here") for wrong in ("gpu", None, torch.device("xpu"))),
    ],
)
def test_descriptions_that_cannot_be_right_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        evodiff.wrap(Tiny(), **{**OWN, **change})


def test_a_yaml_wraps_a_class_of_another_package(tmp_path, monkeypatch):
    (tmp_path / "my_package.py").write_text(
        "from torch import nn\n"
        "class MyUNet(nn.Module):\n"
        "    def __init__(self, gain):\n"
        "        super().__init__()\n"
        "        self.gain = gain\n"
        "    def forward(self, x, t):\n"
        "        return self.gain * x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = OmegaConf.create(
        """
        name: mine
        _target_: evodiff.wrap
        model: {_target_: my_package.MyUNet, gain: 0.5}
        shape: [3, 8, 8]
        predicts: eps
        schedule: {_target_: evodiff.schedule.LinearVP}
        label: {_target_: evodiff.models.adapter.ContinuousTime, scale: 999}
        data_range: [0, 1]
        """
    )
    model = build(config, device="cpu")
    assert model.shape == (3, 8, 8)
    assert model.denoiser(None)(torch.zeros(1, 3, 8, 8), model.denoiser(None).schedule.node(1.0)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_file_names_arguments_that_exist(name):
    config = dict(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml"))
    target = hydra.utils.get_object(config.pop("_target_"))
    names = target.__code__.co_varnames[: target.__code__.co_argcount + target.__code__.co_kwonlyargcount]
    assert set(config) <= set(names) and "device" in names
    assert compose("run", [f"model={name}"]).model.name == name


@pytest.mark.parametrize("name", choices("model"))
def test_every_checkpoint_a_model_file_names_is_in_the_registry(name):
    from evodiff.checkpoints.registry import registry

    config = OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
    expected = {
        "evodiff.models.edm.edm": "edm",
        "evodiff.models.score_sde.score_sde": "score_sde",
        "evodiff.models.ddim.ddim": "ddim",
        "evodiff.models.guided_diffusion.guided_diffusion": "guided_diffusion",
    }
    if config._target_ in expected:
        assert registry()[config.checkpoint].architecture in ("", expected[config._target_])
    if config.get("classifier"):
        assert registry()[config.classifier].architecture == "guided_diffusion_classifier"
