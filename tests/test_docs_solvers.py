"""docs/solvers.md is what the solvers say of themselves."""

import importlib
import re

import pytest

from evodiff import docs_solvers
from evodiff.cli import main
from evodiff.config import choices
from evodiff.errors import ConfigError
from evodiff.paths import ROOT
from evodiff.solvers.ddim import DDIM

ROWS = {line.split("`")[1]: line for line in docs_solvers.PAGE.read_text().splitlines() if line.startswith("| `")}


def test_every_solver_has_its_row_and_no_other_is_there():
    assert list(ROWS) == choices("solver")


@pytest.mark.parametrize("name", choices("solver"))
def test_what_is_known_without_measuring_is_up_to_date(name):
    _, *cells, _ = (cell.strip() for cell in ROWS[name].split("|"))
    measured, error = cells[3], cells[-1]
    assert docs_solvers.facts(name).row(measured, error) == ROWS[name]


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_3s", "evodiff", "pc", "probability_flow", "scire_2m"])
def test_what_is_measured_is_up_to_date(name):
    assert docs_solvers.table([name]) == [ROWS[name]]


@pytest.mark.slow
def test_the_page_is_what_the_command_writes():
    assert main(["docs", "solvers", "--check"]) == 0


def test_a_page_that_is_out_of_date_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(docs_solvers, "choices", lambda group: ["ddim"])
    monkeypatch.setattr(docs_solvers, "PAGE", tmp_path / "solvers.md")
    assert main(["docs", "solvers", "--check"]) == 1
    assert "out of date; run: evodiff docs solvers" in capsys.readouterr().out
    assert not docs_solvers.PAGE.exists()
    assert main(["docs", "solvers"]) == 0
    assert main(["docs", "solvers", "--check"]) == 0
    docs_solvers.PAGE.write_text(docs_solvers.PAGE.read_text().replace("1.0", "2.0"))
    assert main(["docs", "solvers", "--check"]) == 1


@pytest.mark.parametrize("name", docs_solvers.EXACT)
def test_the_exact_test_that_is_named_is_of_this_solver(name):
    text = (ROOT / "tests" / docs_solvers.EXACT[name][0]).read_text()
    assert re.search(rf"\b{type(docs_solvers.configured(name)).__name__}\b", text)


def test_the_commands_of_the_findings_select_tests():
    for file, words in re.findall(r"`pytest tests/(\w+\.py) -k \"?([\w ]+)\"?`", docs_solvers.FOUND):
        names = re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text())
        assert any(word in name for word in words.split(" or ") for name in names), (file, words)


def test_a_solver_without_a_paper_is_refused(monkeypatch):
    class Nameless(DDIM):
        """No paper."""

    monkeypatch.setattr(importlib.import_module(Nameless.__module__), "__doc__", "None here.")
    with pytest.raises(ConfigError, match="Nameless names no paper"):
        docs_solvers.paper("ddim", Nameless())


def test_a_solver_that_is_proved_against_nothing_is_refused(monkeypatch):
    monkeypatch.delitem(docs_solvers.EXACT, "bdia")
    with pytest.raises(ConfigError, match="solver=bdia is proved against nothing yet: write a test"):
        docs_solvers.facts("bdia")


def test_errors_are_rounded_to_what_does_not_depend_on_the_machine():
    rounded = [docs_solvers.rounded_up(error) for error in (0.0, 3e-15, 2e-12, 7e-7)]
    assert rounded == ["1e-12", "1e-12", "1e-11", "1e-6"]
