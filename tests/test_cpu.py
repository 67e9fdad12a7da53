"""Freed memory is kept for the next call of a network."""

import os
import platform
import subprocess
import sys

import pytest

from evodiff.cpu import SETTINGS

FAULTS = """
import resource, sys
import torch
from evodiff.cpu import keep_freed_memory, use_cpu

if sys.argv[1] == "kept":
    use_cpu(None)
def call():  # ten buffers of 8 MB, as a network's, all freed at its end
    buffers = [torch.ones(1 << 21) for _ in range(10)]
call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")


def faults(how, **environment):
    """How often the system had to give fresh pages to ten calls."""
    told = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    out = subprocess.run([sys.executable, "-c", FAULTS, how], env=told, capture_output=True, text=True, check=True)
    return int(out.stdout)


def test_buffers_are_taken_again_without_fresh_pages():
    assert faults("kept") < 0.1 * faults("given back")


def test_what_the_environment_says_stands():
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="0") > 10 * faults("kept")
