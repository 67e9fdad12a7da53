"""Freed memory is kept for the next call of a network."""

import os
import platform
import subprocess
import sys

import pytest

from evodiff.cpu import SETTINGS

FAULTS = """
import ctypes
import resource
import torch
from evodiff.cpu import TRIM_THRESHOLD, keep_freed_memory, use_cpu

ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 0)  # give back every buffer; by itself glibc does so more or less often
use_cpu(None)
def call():  # ten buffers of 8 MB, as a network's, all freed at its end
    buffers = [torch.ones(1 << 21) for _ in range(10)]
for _ in range(5):  # until the heap is as large as it gets
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    call()
print(int(keep_freed_memory()), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")


def faults(**environment):
    """Whether freed memory is kept, and how often the system gives a fresh page to ten calls that write 200,000."""
    told = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    out = subprocess.run([sys.executable, "-c", FAULTS], env=told, capture_output=True, text=True, check=True)
    kept, pages = map(int, out.stdout.split())
    return bool(kept), pages


def test_buffers_are_taken_again_without_fresh_pages():
    kept, pages = faults()
    assert kept and pages < 100


def test_what_the_environment_says_stands():
    kept, pages = faults(MALLOC_TRIM_THRESHOLD_="0")
    assert not kept and pages > 100
