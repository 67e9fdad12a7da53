"""`batch=auto`: how many images to give the network at one time."""

import time
from collections.abc import Callable

import torch

from evodiff.device import finished
from evodiff.errors import SamplingError

SMALLEST = 8
WORTHWHILE = 1.05
"""Throughput that a batch of twice the size must bring."""


def automatic(call: Callable[[int], object], most: int, device: str, clock: Callable[[], float]) -> int:
    """The batch size, a doubling of SMALLEST up to `most`, after which twice as many images a call no longer pay.

    `call(n)` computes n images once. Stops short of a size that the device has no memory for. Raises SamplingError if
    even the smallest does not fit.
    """
    best, rate, size = 0, 0.0, min(SMALLEST, most)
    while True:
        try:
            call(size)  # warm: kernels chosen, memory taken
            started = clock()
            call(size)
            found = size / max(clock() - started, 1e-9)
        except RuntimeError as e:
            if not (isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e)):  # MPS's has no class
                raise
            if not best:
                raise SamplingError(
                    f"batch=auto: not even {size} images at a time fit on {device}. Set batch=1, or another device."
                ) from e
            return best
        if found < WORTHWHILE * rate:
            return best
        best, rate = size, found
        if size == most:
            return best
        size = min(2 * size, most)


def synchronised_clock(device: str) -> Callable[[], float]:
    """Seconds, after everything asked of the device is done."""

    def now() -> float:
        finished(device)
        return time.perf_counter()

    return now
