"""Drawings (.svg) stand in the page itself, where its light or dark style reaches them."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx


def inline(app: Sphinx, doctree: nodes.document, _name: str) -> None:
    """Put each .svg file in the place of the image that names it."""
    for image in list(doctree.findall(nodes.image)):
        if str(image["uri"]).endswith(".svg"):
            svg = Path(app.srcdir, image["uri"]).read_text("utf-8")
            image.replace_self(nodes.raw("", f'<div class="drawing">{svg}</div>', format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """After the images were found."""
    app.connect("doctree-resolved", inline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
