"""Number formats, memory layout and compilation of networks: explicit, named, and of known effect."""

import dataclasses
import json
import shutil

import pytest
import torch

from evodiff.errors import ConfigError
from evodiff.models.analytic import GaussianMixture
from evodiff.models.mnist import mnist_tiny
from evodiff.models.pretrained import Pretrained
from evodiff.precision import computing, prepared
from evodiff.run import Job, store_of
from evodiff.schedule import EDM

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


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_tf32_is_only_on_inside_and_where_asked_for(precision, allowed):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with computing(precision, torch.device("cpu")):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    assert not torch.is_autocast_enabled("cpu")


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
    jobs = [Job.compose(["nfe=2", "solver=ddim", f"seeds={seeds}"]) for seeds in ("0-3", "0-4")]
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
