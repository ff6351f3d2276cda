"""Pages made from code: {settings} from config.py, {commands} from what --help says, {notebook} NAME of an example."""

import contextlib
import importlib
import inspect
import io
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fisher_vmap.cli import COMMANDS
from fisher_vmap.run.cli_args import written
from fisher_vmap.run.settings import Settings

GROUP_OR_NAME = re.compile(r"^    (?:# (?P<group>.+)|(?P<name>\w+): \w)", re.MULTILINE)
LINE = "90"  # columns of the help texts
EXAMPLES = Path(__file__).parents[2] / "examples"


def settings_text() -> str:
    """A table for each group of settings; the groups are the comments between them in config.py."""
    lines, seen = [], set()
    for found in GROUP_OR_NAME.finditer(inspect.getsource(Settings)):
        if found["group"]:
            lines += ["", f"## {found['group']}", "", "| setting | default | meaning |", "| --- | --- | --- |"]
        elif found["name"] in Settings.model_fields:
            field = Settings.model_fields[found["name"]]
            lines.append(f"| `{found['name']}` | `{written(field.default)}` | {field.description} |")
            seen.add(found["name"])
    missing = set(Settings.model_fields) - seen
    assert not missing, f"config.py has settings that this page does not find: {missing}"
    return "\n".join(lines)


def commands_text() -> str:
    """What each command's --help says, but for the settings among the flags."""
    lines = []
    for name, (module, what) in COMMANDS.items():
        text = help_of(module)
        if name in ("run", "steer-to"):
            text = "\n".join(without_settings(text))
        text = text.replace(f"python -m {module.removesuffix('.command')}", f"fisher-vmap {name}")
        text = "\n".join(wrapped(text))
        lines += [f"## fisher-vmap {name}", "", f"{what[0].upper()}{what[1:]}.", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines)


def without_settings(text: str) -> Iterator[str]:
    """The lines of a help text that are not of a flag that is a setting."""
    shown = True
    for line in text.splitlines():
        if flag := re.match(r"  (?:-h, )?--(\w+)(?: (\[?VALUE)?)?", line):
            shown = flag[1] not in Settings.model_fields or flag[2] is None
        elif not line.startswith("   "):
            shown = True
        if shown:
            yield line


def wrapped(text: str) -> Iterator[str]:
    """The lines of a help text, none of them too long; the usage laid anew, for its command's name is shorter."""
    usage, _, rest = text.partition("\n\n")
    yield from textwrap.wrap(" ".join(usage.split()), int(LINE), subsequent_indent=" " * 7, break_on_hyphens=False)
    yield ""
    for line in rest.splitlines():
        yield from textwrap.wrap(line, int(LINE)) if len(line) > int(LINE) else [line]


def help_of(module: str) -> str:
    """What a command prints for --help."""
    said = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=LINE), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return said.getvalue()


def notebook_text(name: str) -> str:
    """An example notebook: its texts, its code, and what each cell has printed and drawn."""
    parts = []
    first, *cells = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4).cells
    for cell in [cells[0], first, *cells[1:]]:  # the title above the cell that installs
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        if printed := "".join(output.text for output in cell.outputs if output.get("name") == "stdout"):
            parts.append(f"```text\n{printed.rstrip()}\n```")
        drawn = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        parts += [f"![figure](data:image/png;base64,{''.join(png.split())})" for png in drawn]
    return "\n\n".join(parts)


TEXTS = {"settings": settings_text, "commands": commands_text, "notebook": notebook_text}


class FromCode(SphinxDirective):
    """A directive that stands for a text in markdown."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of the text."""
        return self.parse_text_to_nodes(TEXTS[self.name](*self.arguments), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Make them known."""
    for name in TEXTS:
        app.add_directive(name, FromCode)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
