"""How networks compute: number format, memory layout, compilation. Never changed silently, and part of a run's name."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evodiff.errors import ConfigError

if TYPE_CHECKING:
    from evodiff.models.pretrained import Pretrained

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats, and what convolutions and matrix products are cast to; norms and sums stay in float32."""


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Networks called inside compute in `precision`; with fp32, on CUDA too, in float32 and not in TF32."""
    dtype = PRECISIONS[precision]
    autocast = torch.autocast(device.type, dtype) if dtype else torch.autocast(device.type, enabled=False)
    with products(precision), autocast:
        yield


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of float32 inside are in TF32, or in earnest with fp32, whatever the program around has chosen, and has
    again afterwards. For all of a run: a gradient computes as is said where it is taken, not where the network was.

    torch 2.9 brought a second way to say this, and refuses to read the first where the two disagree. torch.compile and
    some networks read the first, and only the second can overrule `torch.backends.fp32_precision`: so it is said twice.
    """
    allowed = precision != "fp32"
    of: Any = torch.backends
    operations, cudnn = [], of.cudnn
    if hasattr(of, "fp32_precision"):
        operations = [of.cuda.matmul, cudnn.conv, cudnn.rnn, of.mkldnn.matmul, of.mkldnn.conv, of.mkldnn.rnn]
    matmul, conv = _answer(torch.get_float32_matmul_precision), _answer(lambda: cudnn.allow_tf32)
    own = [operation.fp32_precision for operation in operations]
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    for operation in operations:
        operation.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if conv is not None:
            cudnn.allow_tf32 = conv
        for operation, value in zip(operations, own, strict=True):
            operation.fp32_precision = "none"  # it follows its backend, as it did before unless that differs
            if operation.fp32_precision != value:
                operation.fp32_precision = value


def _answer(ask: Callable[[], Any]) -> Any:
    """What torch answers; None where it refuses to, because the program has set it in both ways."""
    try:
        return ask()
    except RuntimeError:
        return None


def prepared(
    model: "Pretrained",
    precision: str = "fp32",
    channels_last: bool = False,
    compile: bool = False,
    cuda_graphs: bool = False,
) -> "Pretrained":
    """The model, its networks computing in `precision` (a key of PRECISIONS), on channels-last memory, or compiled.

    With `cuda_graphs` a compiled network's kernels are recorded once and launched together after that, which pays
    where the network is small enough to wait for its launches. The networks are changed in place. The first call of a
    compiled network takes a minute, and so does the first of another batch size. A model without networks stays as it
    is. Raises ConfigError for what this model or this machine cannot do.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision} does not exist; possible: {', '.join(PRECISIONS)}.")
    asked = [f"precision={precision}"] * (precision != "fp32") + ["channels_last=true"] * channels_last
    asked += ["compile=true"] * compile + ["cuda_graphs=true"] * cuda_graphs
    if asked and not model.networks:
        raise ConfigError(f"{' and '.join(asked)}: this model has no network to which that applies. Leave it out.")
    if not model.networks:
        return model
    if precision == "tf32" and model.device.type != "cuda":
        raise ConfigError(f"precision=tf32 exists on CUDA only, not on {model.device.type}. Use fp32 or bf16.")
    if cuda_graphs and not (compile and model.device.type == "cuda"):
        raise ConfigError(
            f"cuda_graphs=true needs compile=true and a CUDA device; here compile={str(compile).lower()}, and the "
            f"device is {model.device.type}. Set compile=true on a GPU, or leave it out."
        )
    if compile and model.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ConfigError("compile=true needs a C++ compiler on the CPU, and none was found. Install g++, or leave it.")
    for network in model.networks:
        if channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            network.compile(mode="reduce-overhead" if cuda_graphs else None)
    within: Any = partial(_Within, precision=precision, device=model.device, cuda_graphs=cuda_graphs)
    return replace(
        model,
        denoiser=lambda labels: within(model.denoiser(labels)),
        classifier=within(model.classifier) if model.classifier else None,
    )


class _Within:
    """A denoiser or classifier, called in a precision."""

    def __init__(self, inner: Any, precision: str, device: torch.device, cuda_graphs: bool):
        self.inner, self.precision, self.device, self.cuda_graphs = inner, precision, device, cuda_graphs
        self.schedule = getattr(inner, "schedule", None)

    def __call__(self, *args: Any) -> Tensor:
        with computing(self.precision, self.device):
            if not self.cuda_graphs:
                return self.inner(*args)
            # the next replay writes over the memory of this one's result, and solvers remember results
            torch.compiler.cudagraph_mark_step_begin()
            return self.inner(*args).clone()
