"""What MkDocs asks while it builds the site: the pages of the reference, one entry for each module; and what becomes of
links that leave docs/: pictures come along, other files of the repository are named without a link."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

API = {
    "index": ("Reference", ["api", "models.wrap", "plugins", "interop", "errors"]),
    "sampling": (
        "Schedules, grids, the loop",
        ["schedule", "grid", "denoiser", "guidance", "noise", "sampling", "trace", "gits", "ems"],
    ),
    "solvers": ("Solvers", ["solvers"]),
    "models": ("Models and checkpoints", ["models", "checkpoints", "training", "data"]),
    "metrics": ("Metrics", ["metrics"]),
    "experiments": ("Runs, tables, the command line", [""]),
}
"""Page of api/: title, and the modules on it, by the beginning of their names; the first page that fits has one."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(?:#[^)]*)?\)")


def api_pages(package: Path) -> dict[str, str]:
    """Every module that says something is on one page."""
    paths = [path for path in sorted(package.rglob("*.py")) if path.read_text().strip()]
    names = [".".join(path.relative_to(package).with_suffix("").parts) for path in paths]
    left = [name.removesuffix(".__init__") for name in names if name != "__init__"]
    found = {}
    for page, (title, beginnings) in API.items():
        own = [name for start in beginnings for name in left if start in ("", name) or name.startswith(f"{start}.")]
        left = [name for name in left if name not in own]
        entries = "\n".join(f"::: evodiff.{name}\n" for name in own)
        found[f"api/{page}.md"] = f"# {title}\n\n{entries}"
    return found


def on_files(files: Files, *, config: Any) -> Files:
    for uri, content in api_pages(Path(config.docs_dir).parent / "evodiff").items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    docs = Path(config.docs_dir).resolve()
    here = docs / Path(page.file.src_uri).parent

    def inside(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        path = (here / target).resolve()
        if path.is_relative_to(docs) or not path.exists():
            return link[0]  # MkDocs checks these
        if not picture:
            return words
        uri = f"figures/{'-'.join(path.relative_to(docs.parent).parts)}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        return f"![{words}]({up}{uri})"

    return LINK.sub(inside, markdown)
