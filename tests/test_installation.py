"""What an installation holds and needs."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import evodiff
from evodiff.paths import ROOT

PACKAGE = Path(evodiff.__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_wheel_holds_every_file_of_the_package():
    packed = {
        path
        for pattern in PYPROJECT["tool"]["setuptools"].get("package-data", {}).get("evodiff", [])
        for path in PACKAGE.glob(pattern)
    }
    assert {path for path in PACKAGE.rglob("*.*") if path.suffix not in (".py", ".pyc")} == packed != set()


def test_every_package_that_is_imported_is_declared():
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {canonical(re.split(r"[^\w.-]", line)[0]) for line in lines}
    owners = packages_distributions()
    imported = {name for path in PACKAGE.rglob("*.py") for name in imports(path)} & owners.keys() - {"evodiff"}
    assert {name for name in imported if not declared & {*map(canonical, owners[name])}} == set()


def canonical(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_a_table_that_fails_does_not_keep_the_others_from_being_made(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for table in ("a", "b", "c"):
        (tmp_path / "configs/table").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"configs/table/{table}.yaml").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/.ready").touch()
    command = tmp_path / ".venv/bin/evodiff"
    command.write_text('#!/bin/sh\necho "$*" >> made\ntest "$2" != a\n')
    command.chmod(0o755)
    done = subprocess.run(["make", "tables"], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "made").read_text().split("\n") == ["table a", "table b", "table c", ""]
    assert done.returncode != 0


COMMANDS = """
from evodiff.cli import main
for command in ["run model=mixture", "table smoke", "status", "show table=demo", "score path=x protocol=mnist",
                "models", "fetch --table smoke", "fetch inception"]:
    assert main(command.split()) == 1, command
"""


def test_without_a_checkout_every_command_says_where_evodiff_runs(tmp_path):
    """As from a wheel, which has no configs/."""
    environment = {**os.environ, "EVODIFF_ROOT": "elsewhere", "PYTHONPATH": str(PACKAGE.parent)}
    pipes = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", COMMANDS], env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    said = f"evodiff: there is no folder {tmp_path / 'elsewhere' / 'configs'}: evodiff runs from its checkout, so"
    assert [line for line in done.stderr.splitlines() if not line.startswith(said)] == []
    assert done.stderr.count("\n") == 8
