"""batch=auto, with a network and a clock that the test holds."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from evodiff.errors import SamplingError
from evodiff.grid import TimeGrid
from evodiff.models.mnist import mnist_tiny
from evodiff.runs import sample
from evodiff.runs.batch_size import automatic, synchronised_clock
from evodiff.runs.job import Job
from evodiff.schedule import EDM


class Device:
    """A call of n images takes `fixed` + n * `each` seconds, and there is room for `room` images."""

    def __init__(self, fixed=0.0, each=1.0, room=10**9, full=None):
        self.fixed, self.each, self.room, self.full = fixed, each, room, full or torch.OutOfMemoryError("full")
        self.now, self.calls = 0.0, []

    def call(self, n):
        self.calls.append(n)
        if n > self.room:
            raise self.full
        self.now += self.fixed + n * self.each

    def clock(self):
        return self.now

    def size(self, most=500):
        return automatic(self.call, most, "cpu", self.clock)


def test_it_grows_as_long_as_it_pays():
    assert Device(fixed=0, each=1).size() == 8, "nothing is gained by more"
    assert Device(fixed=100, each=1).size() == 500, "the fixed cost is shared by all there can be"
    # twice n images bring 2 (n + 40) / (2n + 40), which is 1.05 at n = 380: from 256 it pays, from 512 it does not
    assert Device(fixed=40, each=1).size(most=4096) == 512


def test_never_more_than_there_are():
    device = Device(fixed=100, each=1)
    assert device.size(most=20) == 20
    assert Device().size(most=3) == 3
    assert max(device.calls) == 20


def test_it_stops_where_memory_ends():
    assert Device(fixed=1000, each=1, room=100).size() == 64
    with pytest.raises(SamplingError, match="not even 8 images at a time fit on cpu"):
        Device(room=5).size()


def test_mps_tells_the_end_of_its_memory_in_words():
    full = RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB). Tried to allocate")
    assert Device(fixed=1000, each=1, room=100, full=full).size() == 64
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Device(room=5, full=RuntimeError("mat1 and mat2 shapes cannot be multiplied")).size()


@pytest.mark.parametrize(("device", "backend"), [("mps", torch.mps), ("cuda:1", torch.cuda)])
def test_the_clock_waits_for_the_device(device, backend, monkeypatch):
    waited = []
    monkeypatch.setattr(backend, "synchronize", lambda *device: waited.append(device))
    synchronised_clock(device)()
    assert waited == [() if device == "mps" else (device,)]


def test_auto_makes_the_same_images(evodiff_command, results):
    run = ["run", "solver=ddim", "nfe=1", "seeds=0-9", "metrics=[fid]", "device=cpu"]
    code, _, err = evodiff_command(*run, "batch=auto")
    assert code == 0 and "batch=auto is" in err
    code, _, err = evodiff_command(*run, "batch=many")
    assert code == 1
    assert "batch=many is impossible: expected a number of images, at least 1, or auto." in err


def test_no_more_than_the_images_of_a_shard_are_tried(evodiff_command, results, monkeypatch):
    most = []
    monkeypatch.setattr(sample, "automatic", lambda call, largest, *_: most.append(largest) or 4)
    run = ["sample", "model=mixture", "solver=ddim", "nfe=1", "device=cpu", "batch=auto", "protocol=none"]
    for seeds, shard in (("0-9", 1000), ("20-29", 6)):
        assert evodiff_command(*run, f"seeds={seeds}", f"shard={shard}")[0] == 0
    assert most == [10, 6]


def test_sizes_are_tried_without_compiling(monkeypatch, results):
    job = Job.compose(["model=mnist_tiny", "nfe=1", "device=cpu", "batch=auto", "protocol=none"])
    model, counter = mnist_tiny(), CompileCounter()
    (network,) = model.networks
    network.compile(backend=counter)
    tried = []
    monkeypatch.setattr(sample, "automatic", lambda call, *_: tried.extend(call(n).shape[0] for n in (1, 2, 4)) or 4)
    grid = TimeGrid.at([80, 0.002], EDM())
    assert (sample.batch_for(job, model, grid, 1000), tried, counter.frame_count) == (4, [1, 2, 4], 0)
    model.denoiser(None)(torch.zeros(4, *model.shape, dtype=torch.float64), grid.nodes[0])
    assert counter.frame_count > 0, "it is compiled for the batches themselves"
