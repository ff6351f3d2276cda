"""Math as MathML, made while the book is built: the pages need neither network nor JavaScript for it."""

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

CONVERTER = LatexToMathML(fancy_error=False, annotation=True)


def visit_inline(self, node: nodes.math) -> None:
    """A formula within a line."""
    self.body.append(converted(node, display=False))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    """A formula that stands by itself."""
    self.body.append(f'<div class="formula">{converted(node, display=True)}</div>\n')
    raise nodes.SkipNode


def converted(node: nodes.Element, *, display: bool) -> str:
    """The MathML of a node's TeX.

    Raises:
        ExtensionError: it is not TeX that the converter understands; the build ends.
    """
    try:
        return CONVERTER.convert_with_local_state(node.astext(), displaystyle=display)
    except LatexError as error:
        raise ExtensionError(f"{node.source}:{node.line}: {node.astext()!r}: {error}") from error


def setup(app: Sphinx) -> dict[str, bool]:
    """Make it the renderer "mathml"."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
