"""The book's settings: `make docs` builds it with Sphinx, warnings as errors, without network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from fisher_vmap import __version__  # noqa: E402 (the path comes first)

project = "fisher_vmap"
author = "The fisher_vmap authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "drawings",
    "from_code",
    "mathml",
]
exclude_patterns = ["_build", "*.template.md"]

# Pages are plain markdown, as GitHub shows it; MyST's own syntax is only used where a page is generated from code.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# Reference from docstrings, whose `names` are Python's.
default_role = "py:obj"
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "fisher_vmap"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#3a5fb0", "color-brand-content": "#3a5fb0"},
    "dark_css_variables": {"color-brand-primary": "#8fb0f5", "color-brand-content": "#8fb0f5"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
