"""Docstrings as Markdown: a shape such as [batch pos] is set as code, so that neither its brackets nor its asterisks
are markup (a griffe extension)."""

import re
from typing import Any

import griffe

SHAPE = re.compile(r"(?<!\])(?:\[[*\w ,.|/+-]+\])+(?![(\w])")


def with_shapes(text: str) -> str:
    """The text with its bare shapes in backticks; what is in backticks already, and indented lines (which are code),
    stay."""
    return "\n".join(line if line.startswith("    ") else _line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(
        part if place % 2 else SHAPE.sub(lambda found: f"`{found[0]}`", part) for place, part in enumerate(parts)
    )


class Shapes(griffe.Extension):
    """Applied to every object that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring in place."""
        if obj.docstring is not None:
            obj.docstring.value = with_shapes(obj.docstring.value)
