"""Links that leave docs/: pictures come along into the site, other files of the repository are named without a link."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(?:#[^)]*)?\)")


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
