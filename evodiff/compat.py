"""Importing torchvision beside a torch of another build.

`pip install torch` may give a CPU build while torchvision's wheel was built for CUDA. Its compiled operators cannot be
loaded then, and `import torchvision` fails with "operator torchvision::nms does not exist", because it attaches shape
rules to two operators that nobody declared. Declaring these two names first is enough: everything written in Python
(the Inception network, transforms, data sets) works. Import torchvision, torch_fidelity and pytorch_fid only after
`import_torchvision()`.
"""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# a torch.library.Library withdraws its declarations when it is collected
_libraries: list[torch.library.Library] = []


@cache
def _declare_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if torch.version.cuda is not None or spec is None or spec.origin is None:
        return
    # read, not imported: version.py imports the package
    if "+cu" not in Path(spec.origin).with_name("version.py").read_text():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for name, schema in _OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)


def import_torchvision(name: str = "torchvision") -> ModuleType:
    """`import name`, for torchvision and for every package that imports it."""
    _declare_operators()
    return importlib.import_module(name)
