"""Docstrings are plain text with `names` in backticks; reStructuredText would read more into some of their characters."""

import re

from sphinx.application import Sphinx

QUOTED = re.compile(r"(``.*?``|`[^`]*`|\"[^\"]*\")")
SPECIAL = re.compile(r"([|*\\]|_(?=\W|$))")


def escape(_app: Sphinx, _what: str, _name: str, _thing: object, _options: object, lines: list[str]) -> None:
    """Take |norms|, products with * and trailing underscores for what they are."""
    for number, line in enumerate(lines):
        pieces = QUOTED.split(line)
        pieces[::2] = [SPECIAL.sub(r"\\\1", piece) for piece in pieces[::2]]
        lines[number] = "".join(pieces)


def setup(app: Sphinx) -> dict[str, bool]:
    """Before napoleon, which writes markup of its own."""
    app.connect("autodoc-process-docstring", escape, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
