"""Number formats, memory layout and compilation of networks: explicit, named, and of known effect."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

import evodiff
from evodiff import settings
from evodiff.errors import ConfigError
from evodiff.grid import LogSNR, grid_for
from evodiff.guidance import Classifier
from evodiff.models.analytic import GaussianMixture
from evodiff.models.mnist import mnist_tiny
from evodiff.models.pretrained import Pretrained
from evodiff.precision import computing, prepared, products
from evodiff.runs import loaded
from evodiff.runs.job import Job, store_of
from evodiff.runs.sample import sample_run
from evodiff.sampling import integrate
from evodiff.schedule import EDM
from evodiff.solvers.ddim import DDIM
from evodiff.tables.trajectory import trajectory

WAYS = ([], ["precision=bf16"], ["channels_last=true"], ["compile=true"], ["compile=true", "cuda_graphs=true"])
NODE = EDM().node(1.0)
X = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def answer(precision="fp32", channels_last=False, compile=False):
    with torch.no_grad():
        return prepared(mnist_tiny(), precision, channels_last, compile).denoiser(None)(X, NODE)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def plain():
    with torch.no_grad():
        return mnist_tiny().denoiser(None)(X, NODE)


def test_by_default_nothing_changes(plain):
    assert torch.equal(answer(), plain)


@pytest.mark.parametrize(("precision", "least", "most"), [("bf16", 1e-4, 1e-2), ("fp16", 1e-6, 2e-3)])
def test_half_precision_changes_the_network_by_its_rounding_and_keeps_the_state(plain, precision, least, most):
    out = answer(precision)
    assert out.dtype == torch.float64
    assert least < relative(out, plain) < most


def test_channels_last_is_the_same_function(plain):
    assert relative(answer(channels_last=True), plain) < 1e-6
    (network,) = prepared(mnist_tiny(), channels_last=True).networks
    weights = [p for p in network.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_is_the_same_function(plain):
    assert relative(answer(channels_last=True, compile=True), plain) < 1e-5


def legacy():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def operations():
    """What has a setting of its own since torch 2.9."""
    of = torch.backends
    if not hasattr(of, "fp32_precision"):
        return []
    return [of.cuda.matmul, of.cudnn.conv, of.cudnn.rnn, of.mkldnn.matmul, of.mkldnn.conv, of.mkldnn.rnn]


def by_operation():
    return [operation.fp32_precision for operation in operations()]


since_29 = pytest.mark.skipif(not operations(), reason="this torch has the older way to allow TF32 only")


@pytest.fixture
def tf32():
    """Sets what is allowed as torch does when it starts, before and after the test."""

    def reset():
        torch.set_float32_matmul_precision("highest")
        for setting in (torch.backends, torch.backends.cudnn, *operations()) if operations() else ():
            setting.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = True

    reset()
    yield
    reset()


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_tf32_is_only_on_inside_and_where_asked_for(tf32, precision, allowed):
    before = legacy()
    with computing(precision, torch.device("cpu")):
        assert legacy()[:2] == (allowed, allowed)
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert legacy() == before == (False, True, "highest")
    assert not torch.is_autocast_enabled("cpu")


@since_29
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "set_before",
    [
        "backends.fp32_precision = 'tf32'",
        "backends.fp32_precision = 'ieee'",
        "backends.cudnn.fp32_precision = 'tf32'",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.cudnn.conv.fp32_precision = 'ieee'",
        "backends.cudnn.allow_tf32 = False",
        "backends.cuda.matmul.allow_tf32 = True",
        "set_float32_matmul_precision('medium')",
    ],
)
def test_whatever_the_program_allows_is_overruled_inside_and_allowed_again(tf32, set_before, precision):
    exec(f"torch.{set_before}")
    before, older = by_operation(), legacy() if "allow" in set_before or "medium" in set_before else None
    with computing(precision, torch.device("cpu")):
        assert set(by_operation()) == {"ieee" if precision == "fp32" else "tf32"}
        legacy()  # torch.compile asks it, and it must not refuse to answer
    assert by_operation() == before
    if older:
        assert legacy() == older


@since_29
def test_operations_that_follow_their_backend_follow_it_still(tf32):
    torch.backends.fp32_precision = "tf32"
    with computing("fp32", torch.device("cpu")):
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.conv.fp32_precision == "ieee"


class Noted(torch.autograd.Function):
    """The identity, which notes where TF32 is allowed when it runs forward, and when backward."""

    @staticmethod
    def forward(ctx, x, notes):
        ctx.notes = notes
        notes.append(("forward", *legacy()[:2]))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.notes.append(("backward", *legacy()[:2]))
        return gradient, None


class Noting(nn.Module):
    """A network that predicts half of what it sees."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def forward(self, x, t=None):
        return 0.5 * Noted.apply(x, self.notes)

    def log_p(self, x, node, labels):
        return -self(x - labels.view(-1, 1, 1, 1)).square().sum((1, 2, 3))


@pytest.fixture
def noting(tf32):
    """A model that notes what it is allowed, in a program that allows TF32 everywhere: (model, notes)."""
    torch.set_float32_matmul_precision("high")
    network = Noting()
    model = evodiff.wrap(network, shape=(1, 2, 2), predicts="x0", schedule=EDM(), check=False)
    model = dataclasses.replace(model, num_classes=3, classifier=network.log_p, decode=network)
    return model, network.notes


BOTH_WAYS = {("forward", False, False), ("backward", False, False)}


def test_fp32_is_no_tf32_in_a_classifiers_gradient(noting):
    model, notes = noting
    x, labels = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.tensor([2, 0])
    grid = grid_for(3, DDIM(), LogSNR(), EDM())
    expected = integrate(DDIM(), Classifier()(model, labels), x, grid)
    assert {note[1:] for note in notes} == {(True, True)}, "the program's own choice"
    notes.clear()
    with products("fp32"):
        assert torch.equal(integrate(DDIM(), Classifier()(prepared(model), labels), x, grid), expected)
    assert set(notes) == BOTH_WAYS and len(notes) == 9


def test_fp32_is_no_tf32_in_a_run(noting, results, monkeypatch):
    """Its classifier's gradient and its decoder among them; and the program has its own choice again."""
    model, notes = noting
    guided = ["solver=ddim", "guidance=classifier"]
    job = Job.compose(["model=mnist_tiny", "protocol=none", "nfe=2", "seeds=0-1", *guided])
    monkeypatch.setattr(loaded, "build", lambda config, **_: model)
    assert sample_run(job)
    assert set(notes) == BOTH_WAYS and len(notes) == 2 * 3 + 1
    assert legacy() == (True, True, "high")


def test_fp32_is_no_tf32_in_a_trajectory(noting):
    model, notes = noting
    guided = ["solver=ddim", "guidance=classifier"]
    job = Job.compose(["model=mnist_tiny", "protocol=none", "nfe=2", "seeds=0-1", *guided])
    trajectory(job, model)
    assert set(notes) == BOTH_WAYS and len(notes) == 2 * 3 + 2, "the decoder is given what was seen, and the sample"
    assert legacy() == (True, True, "high")


def test_fp32_is_no_tf32_from_python(noting):
    model, notes = noting
    evodiff.sample(model, "ddim", 2, range(2), guidance=Classifier())
    assert set(notes) == BOTH_WAYS and len(notes) == 2 * 3 + 1, "denoiser, classifier, its gradient; the decoder"
    assert legacy() == (True, True, "high")


def test_fp32_is_no_tf32_where_a_command_follows_gradients(noting, monkeypatch, evodiff_command, tmp_path):
    model, notes = noting
    monkeypatch.setattr(settings, "build", lambda config, **_: model)
    assert evodiff_command("trace", "solver=ddim", "nfe=2", "seeds=0-1", f"out={tmp_path / 'traces'}")[0] == 0
    assert set(notes) == BOTH_WAYS
    with pytest.raises(ConfigError, match="precision=tf32 exists on CUDA only"):
        settings.model_of("trace", ["device=cpu", "precision=tf32"])


@pytest.mark.parametrize("text", ["threshold=clip", "guidance=classifier", "denoise_final=true", "noise=legacy"])
def test_a_command_refuses_what_it_would_not_read(text):
    with pytest.raises(ConfigError, match=f"{text}: evodiff gits does not read {text.partition('=')[0]}, only model,"):
        settings.model_of("gits", ["model=mixture", text])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_classifier_has_the_same_gradient():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 3))
    model = dataclasses.replace(
        mnist_tiny(), networks=(network,), classifier=lambda x, node, y: network(x.float()).log_softmax(1)[:, 0]
    )
    plain, compiled = (Classifier()(prepared(model, compile=how), torch.zeros(3))(X, NODE) for how in (False, True))
    assert relative(compiled, plain) < 1e-5


def test_a_classifier_computes_in_the_same_format_and_keeps_its_gradient():
    layer = torch.nn.Linear(1024, 3)
    seen = []

    def log_p(x, node, labels):
        logits = layer(x.float().flatten(1))
        seen.append(logits.dtype)
        return logits.float().log_softmax(1)[:, 0]

    model = dataclasses.replace(mnist_tiny(), classifier=log_p)
    leaf = X.clone().requires_grad_()
    prepared(model, "bf16", False, False).classifier(leaf, NODE, None).sum().backward()
    assert seen == [torch.bfloat16]
    assert leaf.grad.norm() > 0


def test_threads_are_as_many_as_asked_for_and_change_no_image(evodiff_command, results):
    before = torch.get_num_threads()
    run = ["run", "nfe=2", "solver=ddim", "metrics=[fid]", "device=cpu", "batch=4"]
    try:
        for seeds, threads in (("0-3", 2), ("0-4", 1)):
            assert evodiff_command(*run, f"seeds={seeds}", f"threads={threads}")[0] == 0
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    jobs = [Job.compose(["nfe=2", "solver=ddim", "metrics=[fid]", f"seeds={seeds}"]) for seeds in ("0-3", "0-4")]
    few, more = (store_of(job).first(4).astype(int) for job in jobs)
    assert abs(few - more).max() <= 1
    code, _, err = evodiff_command(*run, "threads=0")
    assert code == 1 and "threads=0 is impossible: expected a number of threads, at least 1, or null." in err


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="precision=fp8 does not exist; possible: fp32, tf32, bf16, fp16"):
        answer("fp8")
    with pytest.raises(ConfigError, match="precision=tf32 exists on CUDA only, not on cpu"):
        answer("tf32")
    mixture = GaussianMixture(torch.zeros(1, 1, 2, 2), torch.ones(1), torch.ones(1), None)
    exact = Pretrained(lambda labels: mixture, shape=(1, 2, 2))
    prepared(exact, "fp32")
    with pytest.raises(ConfigError, match="precision=bf16 and channels_last=true: this model has no network"):
        prepared(exact, "bf16", True, False)


def test_without_a_compiler_compile_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile=true needs a C\+\+ compiler"):
        answer(compile=True)


class OneBuffer:
    """A network that, like a recorded CUDA graph, writes every result to the same memory."""

    def __init__(self):
        self.out, self.mode = torch.zeros(1), None

    def compile(self, mode):
        self.mode = mode

    def __call__(self, x, node):
        return self.out.copy_(x)


def test_what_a_cuda_graph_returned_outlives_its_next_replay():
    network = OneBuffer()
    on_gpu = Pretrained(lambda labels: network, shape=(1,), device=torch.device("cuda"), networks=(network,))
    denoise = prepared(on_gpu, compile=True, cuda_graphs=True).denoiser(None)
    first, second = denoise(torch.ones(1), NODE), denoise(torch.full((1,), 2.0), NODE)
    assert (first.item(), second.item()) == (1, 2)
    assert network.mode == "reduce-overhead"
    prepared(on_gpu, compile=True)
    assert network.mode is None


@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_elsewhere_are_refused(compile):
    with pytest.raises(ConfigError, match="cuda_graphs=true needs compile=true and a CUDA device.* the device is cpu"):
        prepared(mnist_tiny(), compile=compile, cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_are_the_same_function(plain):
    denoise = prepared(mnist_tiny(device="cuda"), compile=True, cuda_graphs=True).denoiser(None)
    with torch.no_grad():
        outs = [denoise(X.cuda() * k, NODE) for k in (1, 2, 1)]
    assert relative(outs[0].cpu(), plain) < 1e-5 and torch.equal(outs[0], outs[2])


def test_it_is_part_of_the_runs_name_and_of_its_record(evodiff_command, results):
    keys = {Job.compose([*how]).run.key() for how in WAYS}
    assert len(keys) == len(WAYS)
    assert Job.compose(["precision=fp32", "compile=false"]).run.key() == Job.compose([]).run.key()
    run = ["run", "nfe=1", "solver=ddim", "seeds=0-3", "metrics=[fid]", "device=cpu"]
    for precision in ("fp32", "bf16"):
        assert evodiff_command(*run, f"precision={precision}")[0] == 0
    records = [json.loads(path.read_text()) for path in sorted(results.glob("runs/mnist_tiny/*/score.json"))]
    assert {record["run"]["precision"] for record in records} == {"fp32", "bf16"}
    code, _, err = evodiff_command(*run, "precision=half")
    assert code == 1 and "precision=half does not exist; possible: fp32, tf32, bf16, fp16" in err
