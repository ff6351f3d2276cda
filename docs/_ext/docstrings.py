"""Docstrings are plain text with `names` in backticks; reStructuredText would read more into some characters."""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.locale import _

QUOTED = re.compile(r"(``.*?``|`[^`]*`|\"[^\"]*\")")
ARRAY = re.compile(r"ndarray\[tuple\[Any, \.\.\.\], dtype\[(\w+)\]\]")
# numpy's ArrayLike, spelled out
ARRAY_LIKE = re.compile(r"_Buffer \| .*? \| _NestedSequence\[complex \| bytes \| str\]")
BULLET = re.compile(r" *(?:\* )?")
SPECIAL = re.compile(r"([|*\\]|_(?=\W|$))")


def escape(_app: Sphinx, _what: str, _name: str, _thing: object, _options: object, lines: list[str]) -> None:
    """Take |norms|, products with * and trailing underscores for what they are."""
    for number, line in enumerate(lines):
        _, start = BULLET.match(line).span()  # the asterisk of a list's item is markup
        pieces = QUOTED.split(line[start:])
        pieces[::2] = [SPECIAL.sub(r"\\\1", piece) for piece in pieces[::2]]
        lines[number] = line[:start] + "".join(pieces)
    lines[:] = [line for line in lines if not line.startswith("Create new instance of ")]  # a NamedTuple's __new__


def shorten(_app: Sphinx, doctree: nodes.document) -> None:
    """Types of arrays by their names: ndarray[float32], ArrayLike."""
    for kind in (addnodes.desc_parameter, addnodes.desc_returns, addnodes.desc_annotation):
        for node in doctree.findall(kind):
            text = node.astext()
            short = ARRAY_LIKE.sub("ArrayLike", ARRAY.sub(r"ndarray[\1]", text))
            if short != text:
                name, colon, rest = short.partition(":")
                node.clear()
                if kind is addnodes.desc_parameter:
                    node += [addnodes.desc_sig_name("", name), nodes.Text(colon + rest)]
                else:
                    node += nodes.Text(short.removeprefix(" -> "))  # a return type's arrow is drawn anyway


def setup(app: Sphinx) -> dict[str, bool]:
    """Before napoleon, which writes markup of its own; and what it calls variables are attributes here."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = _("Attributes")
    app.connect("autodoc-process-docstring", escape, priority=100)
    app.connect("doctree-read", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
