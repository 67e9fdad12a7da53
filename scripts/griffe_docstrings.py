"""Docstrings are written for readers of the code; here their formulas and examples are made safe for Markdown."""

import re
from typing import Any

import griffe


def as_markdown(docstring: str) -> str:
    """Indented paragraphs stay code, examples become it, and elsewhere signs like `*` and `<` mean themselves."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", docstring)))


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("    ") for line in lines):
        return text
    if lines[0].startswith(">>>"):
        return f"```pycon\n{text}\n```"
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else re.sub(r"(?<!^)([*_<\[\]])", r"\\\1", part) for i, part in enumerate(parts))


class Docstrings(griffe.Extension):
    """Applies `as_markdown` to every docstring that mkdocstrings shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
