"""Whatever ends a run, the same command goes on with it, and the outcome is the one of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("crash_server.py")
RUN = ["model=mixture", "protocol=none", "solver=evodiff", "nfe=5", "batch=2", "device=cpu"]
SMALL = [*RUN, "reference_run=null", "seeds=0-3", "shard=2"]
LARGER = [*RUN, "seeds=0-47", "shard=4"]
"""With the reference run, which scoring makes, and compares with."""


def serve(mode, folder, number, run):
    done = subprocess.run(
        [sys.executable, SERVER, mode, folder, str(number), *run],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def outcome(folder):
    """Everything that a run left, without what times, threads and lists in another order may change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or ".locks" in name:
            continue
        if path.name == "score.json":
            found[name] = json.loads(path.read_text()) | {"seconds": None, "device": None}
        elif path.name == "manifest.json":
            content = json.loads(path.read_text())
            shards = sorted([s["first"], s["last"], s["sha256"], s["nfe"]] for s in content.pop("shards"))
            assert len({first for first, *_ in shards}) == len(shards), "nothing doubled"
            found[name] = content, shards
        else:
            found[name] = path.read_bytes()
    return found


def without_leftovers(found):
    """A killed process cannot remove the file it was writing; nothing reads it."""
    return {name: content for name, content in found.items() if ".tmp." not in name}


@pytest.fixture
def whole(results, evodiff_command):
    """What an undisturbed run leaves."""

    def run(overrides):
        assert evodiff_command("run", *overrides)[0] == 0
        return outcome(results)

    return run


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 14])
def test_killed_before_any_change_of_a_file(whole, tmp_path_factory, stride):
    folder = tmp_path_factory.mktemp("killed")
    answers = serve("kill", folder, stride, SMALL)
    assert len(answers) > 36 / stride
    assert answers == [None] * len(answers)
    expected = whole(SMALL)
    for n in range(len(answers)):
        assert without_leftovers(outcome(folder / str(n))) == expected


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 14])
def test_full_disk_at_any_change_of_a_file(whole, tmp_path_factory, stride):
    """Either that change does not matter, or one line says what to do and the run can go on."""
    folder = tmp_path_factory.mktemp("full")
    answers = serve("full", folder, stride, SMALL)
    assert len(answers) > 27 / stride
    failed = [said.splitlines()[-1] for code, said in answers if code != 0]
    assert len(failed) > 12 / stride
    assert all(said.startswith("evodiff: cannot write ") and "No space left on device. " in said for said in failed)
    expected = whole(SMALL)
    for n in range(len(answers)):
        assert outcome(folder / str(n)) == expected


@pytest.mark.slow
def test_killed_at_random_moments(whole, tmp_path_factory):
    """30 runs, each killed at random moments of its sampling and scoring until it survives."""
    folder = tmp_path_factory.mktemp("random")
    kills = serve("random", folder, 30, LARGER)
    assert min(kills) >= 1
    expected = whole(LARGER)
    for seed in range(30):
        assert without_leftovers(outcome(folder / str(seed))) == expected
