"""The recorded runs of the released samplers, and that the comparison can fail."""

import json
import shutil

import numpy as np
import pytest

from evodiff.cli import main
from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.verify import solvers as verify


@pytest.fixture(scope="module")
def recorded():
    return verify.verify(verify.GOLDEN)


@pytest.mark.parametrize("name", verify.SOLVERS)
def test_equal_to_the_released_sampler(recorded, name):
    result = recorded[0][name]
    assert result.cases > 0
    assert result.worst <= verify.TOLERANCES.get(name, verify.TOLERANCE)
    assert result.nfe_mismatches == 0


@pytest.fixture
def few(tmp_path):
    """Two runs of a golden, small enough to change."""
    runs = json.loads(verify.GOLDEN.with_name("solvers.json").read_text())
    keep = [next(r for r in runs if r["solver"] == name) for name in ("dpmpp_multistep", "evodiff")]
    (tmp_path / "few.json").write_text(json.dumps(keep))
    shutil.copy(verify.GOLDEN.with_name("solvers.npz"), tmp_path / "few.npz")
    return tmp_path / "few"


def test_any_file_of_the_format_with_or_without_extension(few, capsys):
    for path in (few, few.with_suffix(".npz")):
        assert main(["verify", "solvers", "--golden", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:3] for line in lines] == [["ok", "dpmpp_multistep", "1"], ["ok", "evodiff", "1"]]


def test_a_wrong_solver_fails(few, monkeypatch, capsys):
    monkeypatch.setitem(verify.SOLVERS, "evodiff", lambda options, arrays: DPMSolverPP(order=2))
    assert main(["verify", "solvers", "--golden", str(few)]) == 1
    assert "FAIL  evodiff" in capsys.readouterr().out


def test_a_wrong_count_of_evaluations_fails(few, capsys):
    runs = json.loads(few.with_name("few.json").read_text())
    runs[0]["nfe"] += 1
    few.with_name("few.json").write_text(json.dumps(runs))
    assert main(["verify", "solvers", "--golden", str(few)]) == 1
    assert "NFE mismatches 1" in capsys.readouterr().out


def test_a_missing_solver_fails_only_if_strict(few, monkeypatch, capsys):
    monkeypatch.delitem(verify.SOLVERS, "evodiff")
    assert main(["verify", "solvers", "--golden", str(few)]) == 0
    assert "miss  evodiff" in capsys.readouterr().out
    assert main(["verify", "solvers", "--golden", str(few), "--strict"]) == 1


def test_what_is_no_golden_is_said_in_one_line(tmp_path, capsys):
    assert main(["verify", "solvers", "--golden", str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no golden of solvers" in err


@pytest.mark.parametrize(
    "broken", ["a list of names", "a file cut short", "an empty file", "noise too narrow", "results too few", "no run"]
)
def test_a_broken_golden_is_said_in_one_line(few, broken, capsys):
    file = few.with_name("few.npz")
    with np.load(file) as content:
        arrays = dict(content)
    if broken in ("a file cut short", "an empty file"):
        file.write_bytes(file.read_bytes()[: 1000 if "cut" in broken else 0])
    elif broken == "noise too narrow":
        np.savez(file, **arrays | {"noise": arrays["noise"][..., :-1]})
    elif broken == "results too few":
        np.savez(file, **{key: value[:1] if key.startswith("out_") else value for key, value in arrays.items()})
    else:
        few.with_name("few.json").write_text('["ddim"]' if "list" in broken else "[[]]")
    assert main(["verify", "solvers", "--golden", str(few)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no golden of solvers" in err
