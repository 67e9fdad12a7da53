"""Guidance: its formulas on distributions where they are exact, its cost, and that no graph outlives a call."""

import dataclasses
import weakref

import pytest
import torch
from checkpoint_files import ADM, CLASSIFIER, saved, weights

from evodiff.checkpoints.checkpoint import convert
from evodiff.checkpoints.description import Description
from evodiff.denoiser import Counting
from evodiff.errors import ConfigError, SamplingError
from evodiff.grid import LogSNR, grid_for
from evodiff.guidance import Classifier, ClassifierFree, Unguided
from evodiff.models.adapter import DiscreteTime, process
from evodiff.models.analytic import GaussianMixture
from evodiff.models.guided_diffusion import NoisyClassifier, guided_diffusion
from evodiff.models.networks import build
from evodiff.models.pretrained import Pretrained
from evodiff.sampling import integrate
from evodiff.schedule import EDM, DiscreteVP, LinearVP
from evodiff.solvers.dpmpp import DPMSolverPP

MEANS = torch.tensor([-0.5, 0.5, 0.9], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 1, 2, 2)
STDS = torch.full((3,), 0.2, dtype=torch.float64)


def mixture(schedule, weights):
    return GaussianMixture(MEANS, STDS, torch.tensor(weights, dtype=torch.float64), schedule)


def log_posterior(x, node, labels):
    """log p(component | x) of the mixture with equal weights."""
    v = (node.alpha * STDS) ** 2 + node.sigma**2
    square = (x[:, None] - node.alpha * MEANS).flatten(2).square().sum(2)
    return (-square / (2 * v)).log_softmax(1)[torch.arange(len(x)), labels]


def model(schedule):
    """A mixture whose classes are its components."""
    of_class = [mixture(schedule, [float(k == c) + 1e-300 for k in range(3)]) for c in range(3)]
    anything = mixture(schedule, [1 / 3] * 3)

    def denoiser(labels):
        if labels is None:
            return anything

        class Conditional:
            def __init__(self):
                self.schedule = schedule

            def __call__(self, x, node):
                rows = zip(x, labels.tolist(), strict=True)
                return torch.cat([of_class[label](row[None], node) for row, label in rows])

        return Conditional()

    return Pretrained(denoiser, shape=(1, 2, 2), num_classes=3, classifier=log_posterior)


@pytest.mark.parametrize("schedule", [EDM(), LinearVP(), DiscreteVP.linear()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_bayes_classifier_at_scale_one_gives_the_conditional_model(schedule, t):
    labels = torch.tensor([0, 1, 2, 1])
    conditional = model(schedule)
    unconditional = Pretrained(lambda _: conditional.denoiser(None), (1, 2, 2), classifier=log_posterior)
    node = schedule.node(t)
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guided = Classifier(1.0)(unconditional, labels)(x, node)
    assert torch.allclose(guided, conditional.denoiser(labels)(x, node), atol=1e-10)
    plain, twice = conditional.denoiser(None)(x, node), Classifier(2.0)(unconditional, labels)(x, node)
    assert torch.allclose(twice - plain, 2 * (guided - plain), atol=1e-10)


def test_classifier_free_guidance_goes_from_unconditional_through_conditional():
    labels, schedule = torch.tensor([2, 0]), EDM()
    mixed = model(schedule)
    x, node = torch.randn(2, 1, 2, 2, dtype=torch.float64), schedule.node(0.7)
    plain, conditional = mixed.denoiser(None)(x, node), mixed.denoiser(labels)(x, node)
    for scale, expected in ((0.0, plain), (1.0, conditional), (3.0, 3 * conditional - 2 * plain)):
        assert torch.allclose(ClassifierFree(scale)(mixed, labels)(x, node), expected)


@pytest.mark.parametrize(("guidance", "passes"), [(Unguided(), 1), (Classifier(), 2), (ClassifierFree(), 2)])
def test_a_guided_call_is_one_nfe_and_states_its_passes(guidance, passes):
    made = []
    mixed = model(EDM())

    def counted(call):
        def counting(*args):
            made.append(1)
            return call(*args)

        return counting

    def denoiser(labels):
        counting = Counting(mixed.denoiser(labels))
        counting.denoiser = counted(counting.denoiser)
        return counting

    watched = Pretrained(denoiser, (1, 2, 2), num_classes=3, classifier=counted(log_posterior))
    counting = Counting(guidance(watched, torch.tensor([0, 1])))
    solver = DPMSolverPP(order=2)
    grid = grid_for(6, solver, LogSNR(), EDM())
    integrate(solver, counting, torch.randn(2, 1, 2, 2, dtype=torch.float64), grid)
    assert counting.nfe == 6
    assert len(made) == 6 * passes
    assert guidance.network_passes == passes


def test_guidance_that_a_model_cannot_have_is_refused():
    unconditional = Pretrained(lambda labels: mixture(EDM(), [1 / 3] * 3), (1, 2, 2))
    with pytest.raises(ConfigError, match="needs a model with a classifier"):
        Classifier()(unconditional, torch.tensor([0]))
    with pytest.raises(ConfigError, match="needs a conditional model"):
        ClassifierFree()(unconditional, None)
    # EDM's and ADM's class-conditional networks were always given a class: their answer without one means nothing
    always_given = dataclasses.replace(unconditional, num_classes=3, unconditional=False)
    with pytest.raises(ConfigError, match="labels left out"):
        ClassifierFree()(always_given, torch.tensor([0]))
    # the classes are the classifier's: with or without a label, the network says the same
    blind = dataclasses.replace(unconditional, num_classes=3, classifier=log_posterior, takes_labels=False)
    with pytest.raises(ConfigError, match="takes no labels. Use guidance=classifier or"):
        ClassifierFree()(blind, torch.tensor([0]))


@pytest.mark.parametrize(("num_classes", "message"), [(4, "labels left out"), (None, "takes no labels")])
def test_no_adm_network_is_guided_without_its_classifier(tmp_path, cache, num_classes, message):
    files = []
    for kind, arguments in (
        ("guided_diffusion", ADM | {"num_classes": num_classes}),
        ("guided_diffusion_classifier", CLASSIFIER),
    ):
        path = saved(tmp_path / f"{kind}.pt", weights(kind, arguments))
        files.append(str(convert(path, tmp_path / f"{kind}.safetensors", Description(kind, arguments))))
    model = guided_diffusion(*files)
    assert model.num_classes == 4
    with pytest.raises(ConfigError, match=message):
        ClassifierFree()(model, torch.tensor([1]))


def test_classifier_guidance_finds_its_gradient_in_inference_mode():
    mixed, node, labels = model(EDM()), EDM().node(0.7), torch.tensor([2, 0])
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = Classifier()(mixed, labels)(x, node)
    with torch.inference_mode():
        guided = Classifier()(mixed, labels.clone())(x.clone(), node)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(guided, expected)


def test_a_classifier_made_in_inference_mode_is_refused_in_words():
    node = DiscreteVP.linear().node(0.4)
    with torch.inference_mode():
        classifier = small_classifier()
        seen = Pretrained(lambda labels: Black(classifier.process.native), (3, 16, 16), classifier=classifier)
        with pytest.raises(SamplingError, match="make the model outside of it"):
            Classifier()(seen, torch.tensor([0]))(torch.randn(1, 3, 16, 16), node)


def small_classifier(schedule="own"):
    net = build(
        "guided_diffusion_classifier",
        {
            "image_size": 16,
            "in_channels": 3,
            "model_channels": 32,
            "out_channels": 4,
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "channel_mult": [1, 1],
            "num_head_channels": 16,
            "pool": "attention",
        },
    )
    native = DiscreteVP.linear()
    return NoisyClassifier(net.eval().requires_grad_(False), process(native, DiscreteTime(1000), schedule))


def test_the_gradient_is_the_same_distribution_shift_on_every_schedule():
    torch.manual_seed(0)
    own = small_classifier()
    scaled = NoisyClassifier(own.net, process(own.process.native, DiscreteTime(1000), "edm"))
    labels, node = torch.tensor([1, 3]), own.process.native.node(0.4005)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def shift(log_p, x, node):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_p(leaf, node, labels).sum(), leaf)
        return node.sigma**2 / node.alpha * gradient

    ours, theirs = shift(own, x, node), shift(scaled, x / node.alpha, EDM().node(node.kappa))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-8)


class Held:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


class Saved:
    """Counts the bytes that autograd keeps, while it keeps them."""

    def __init__(self):
        self.live = self.peak = 0

    def pack(self, tensor):
        size = tensor.numel() * tensor.element_size()
        self.live += size
        self.peak = max(self.peak, self.live)
        held = Held(tensor)
        weakref.finalize(held, self.release, size)
        return held

    def release(self, size):
        self.live -= size


class Black:
    """A denoiser that sees nothing."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x, node):
        return torch.zeros_like(x)


def sample_guided(steps, device="cpu"):
    torch.manual_seed(0)
    classifier = small_classifier()
    classifier.net.to(device)
    black = Black(classifier.process.native)
    model = Pretrained(lambda labels: black, (3, 16, 16), classifier=classifier)
    guided = Classifier(2.0)(model, torch.tensor([1, 2], device=device))
    solver = DPMSolverPP(order=2)
    grid = grid_for(steps, solver, LogSNR(), black.schedule)
    return integrate(solver, guided, torch.randn(2, 3, 16, 16, dtype=torch.float64, device=device), grid)


def peak_of_saved(steps):
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        out = sample_guided(steps)
    assert not out.requires_grad
    assert saved.live == 0
    return saved.peak


def test_memory_for_gradients_does_not_grow_with_the_steps():
    one = peak_of_saved(1)
    assert one > 0
    assert peak_of_saved(6) == one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_the_gpu_does_not_grow_with_the_steps():
    def peak(steps):
        sample_guided(1, "cuda")
        torch.cuda.reset_peak_memory_stats()
        sample_guided(steps, "cuda")
        return torch.cuda.max_memory_allocated()

    assert peak(12) <= 1.02 * peak(3)
