"""The documentation: every block is run as a reader would run it, every link leads somewhere, the site builds.

A page's blocks run from top to bottom in one copy of the project: `sh` and `console` by bash, `python` by one Python
process. Where lines of `console` begin with `$ `, the others must be what is printed (numbers to 2 %, `...` is
anything). The line above a block may hold a mark: `<!-- file: PATH -->` writes the block to PATH, `<!-- needs: ... -->`
names what a test lacks, `<!-- output -->` says that it is no input.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from evodiff.models.analytic import mixture
from evodiff.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
QUICK = ("docs/index.md",)
"""Run by `make test`; the others by `make test-all`."""
ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/howto/cluster.md": "tests/test_sweeps.py",
    "docs/howto/wandb.md": "tests/test_sweeps.py",
}
"""Pages whose blocks another test runs."""
EXTRAS = {"docs/howto/diffusers.md": "diffusers"}
NEEDS = {"gpu", "download", "network", "slurm", "minutes"}
RUN = ("sh", "console", "python")
BLOCK = re.compile(r"^(?P<above>[^\n]*)\n```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
MARK = re.compile(r"<!-- (\w+)(?:: (.+?))? -->")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = r"(?<![\w.-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w-])"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    language: str
    text: str
    mark: str | None
    about: str

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.mark is None


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer("\n" + page.read_text()):
        mark = MARK.fullmatch(match["above"].strip())
        found.append(Block(match["language"], match["text"], mark and mark[1], mark[2] or "" if mark else ""))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_run_or_says_why_not(page):
    assert page.read_text().count("\n```") == 2 * len(blocks(page))  # none escapes the pattern
    for block in blocks(page):
        if block.mark == "needs":
            assert block.about in NEEDS, block
        elif block.mark == "file":
            assert not Path(block.about).is_absolute() and ".." not in Path(block.about).parts, block
        else:
            assert block.mark in (None, "output"), block


def test_what_is_tested_elsewhere_is():
    for page, test in ELSEWHERE.items():
        assert Path(page).stem in (ROOT / test).read_text()


def runnable() -> list:
    pages = [page for page in PAGES if any(block.runs for block in blocks(page)) and name(page) not in ELSEWHERE]
    return [pytest.param(page, id=name(page), marks=[] if name(page) in QUICK else pytest.mark.slow) for page in pages]


@pytest.mark.parametrize("page", runnable())
def test_the_blocks_of_a_page_run(page, tmp_path):
    if extra := EXTRAS.get(name(page)):
        pytest.importorskip(extra)
    project = copy_of_the_project(tmp_path / "evodiff")
    with Python(project) as python:
        for block in blocks(page):
            if block.mark == "file":
                (project / block.about).parent.mkdir(parents=True, exist_ok=True)
                (project / block.about).write_text(block.text)
            elif block.runs and block.language == "python":
                python.run(block.text)
            elif block.runs and block.text.startswith("$ "):
                for command, expected in session(block.text):
                    done = bash(project, command)
                    printed = done.stderr if done.returncode else done.stdout
                    assert same(expected, printed), f"$ {command}\n{printed}"
            elif block.runs:
                done = bash(project, block.text)
                assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


def copy_of_the_project(project: Path) -> Path:
    """What a fresh clone holds; large files are links to ours."""
    project.mkdir()
    for entry in ("evodiff", "configs"):
        shutil.copytree(ROOT / entry, project / entry)
    nothing_fetched = shutil.ignore_patterns("cache")
    shutil.copytree(ROOT / "checkpoints", project / "checkpoints", ignore=nothing_fetched, copy_function=os.symlink)
    shutil.copytree(ROOT / "results", project / "results", ignore=shutil.ignore_patterns("runs", "demo", "smoke"))
    for entry in ("scripts", "examples", "tests", "README.md", "Makefile", "pyproject.toml"):
        if (ROOT / entry).exists():
            (project / entry).symlink_to(ROOT / entry)
    (project / ".venv").symlink_to(sys.prefix)
    return project


def environment(project: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("EVODIFF_")}
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),  # before the installed package
        "EVODIFF_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    return kept | own


def bash(project: Path, text: str) -> subprocess.CompletedProcess:
    command = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, timeout=600)


class Python:
    """A Python process in which the blocks of a page run one after the other."""

    LOOP = """
import json, sys, traceback
for line in sys.stdin:
    error = None
    try:
        exec(json.loads(line), vars(sys.modules["__main__"]))
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps({"error": error}), flush=True)
"""

    def __init__(self, project: Path):
        command = [sys.executable, "-W", "error::RuntimeWarning", "-c", self.LOOP]
        pipe, env = subprocess.PIPE, environment(project)
        self.process = subprocess.Popen(command, cwd=project, env=env, stdin=pipe, stdout=pipe, text=True)

    def run(self, text: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(text) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"error": '):
                error = json.loads(line)["error"]
                assert error is None, f"{text}\n{error}"
                return
        raise AssertionError(f"Python ended in\n{text}")

    def __enter__(self) -> "Python":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def session(text: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it should print."""
    parts = re.split(r"^\$ ", text, flags=re.M)[1:]
    return [(command, printed) for command, _, printed in (part.partition("\n") for part in parts)]


def same(expected: str, printed: str) -> bool:
    """Equal but for white space, numbers within 2 %, and anything for `...`."""
    pattern, numbers = "", []
    for part in re.split(rf"({NUMBER}|\.\.\.|\s+)", expected.strip()):
        if part == "...":
            pattern += ".*?"
        elif part.isspace():
            pattern += r"\s+"
        elif re.fullmatch(NUMBER, part):
            pattern += f"({NUMBER})"
            numbers.append(float(part))
        else:
            pattern += re.escape(part)
    match = re.fullmatch(pattern, printed.strip(), re.S)
    return match is not None and all(
        math.isclose(a, float(b), rel_tol=0.02) for a, b in zip(numbers, match.groups(), strict=True)
    )


@pytest.mark.parametrize(
    ("expected", "printed", "equal"),
    [
        ("nfe 10  rmse 0.139", "nfe 10 rmse 0.1392", True),
        ("nfe 10  rmse 0.139", "nfe 10 rmse 0.149", False),
        ("a-nfe10  3", "a-nfe11  3", False),
        ("one\n...\nlast 2", "one\nmore\nlast 2", True),
        ("one\n...\nlast 2", "one\nmore\n", False),
    ],
)
def test_what_is_the_same_output(expected, printed, equal):
    assert same(expected, printed) is equal


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in re.findall(r"^#+ (.+)$", text, re.M))
    return {re.sub(r"[\s]", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), link


def navigation() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text()
    return re.findall(r"- (?:[\w-]+: )?([\w/]+\.md)$", text.partition("\nnav:")[2], re.M)


def test_every_page_is_in_the_navigation():
    written = [str(page.relative_to(DOCS)) for page in PAGES[1:]]
    assert sorted(page for page in navigation() if not page.startswith("api/")) == sorted(written)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((tmp_path / page).with_suffix(".html").exists() for page in navigation())


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_docs = script("make_docs")


LONG = ("reproduces.md", "results.md")
"""Pages that take half a minute to make; make_docs.py --check compares them too."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page in make_docs.NAMES]
)
def test_generated_pages_are_current(page):
    assert (DOCS / page).read_text() == make_docs.current(page), "make docs"


def test_every_module_is_in_the_reference():
    pytest.importorskip("mkdocs")
    pages = script("mkdocs_hooks").api_pages(ROOT / "evodiff")
    assert sorted(pages) == sorted(page for page in navigation() if page.startswith("api/"))
    shown = re.findall("::: (.+)", "".join(pages.values()))
    assert len(shown) == len(set(shown)) > 100
    assert {"evodiff.solvers.evodiff", "evodiff.api", "evodiff.models.networks"} <= set(shown)


def test_docstrings_keep_their_formulas():
    pytest.importorskip("griffe")
    given = "zeta* = <D_i, P> over `x_t`, zeta*\n\n    B = eta* D\n\n>>> f(1)\n2"
    shown = r"zeta\* = \<D\_i, P> over `x_t`, zeta\*" + "\n\n    B = eta* D\n\n```pycon\n>>> f(1)\n2\n```"
    assert script("griffe_docstrings").as_markdown(given) == shown


def nearly(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(nearly(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(nearly, a, b))
    return math.isclose(a, b, rel_tol=0.02, abs_tol=0.002)


def test_the_weights_of_the_figure_are_those_of_the_solver():
    rows = script("figures_method").weights(mixture(), nfe=6, samples=2, eta=0.3, zeta=0.8)
    assert len(rows) == 4
    for row in rows:
        assert (row["eta"], row["zeta"], row["of_second_order"]) == pytest.approx((0.3, 0.8, 0.5), abs=1e-9)


@pytest.mark.slow
def test_the_figures_show_what_the_code_does():
    figures = script("figures_method")
    assert nearly(json.loads((DOCS / "figures/method.json").read_text()), figures.numbers())
