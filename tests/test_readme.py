"""What the README says of settings, names and files is what there is."""

import re
from pathlib import Path

import fisher_vmap
from fisher_vmap.config import Settings
from fisher_vmap.settings_input import written

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_settings_table_is_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| `([^|]*)` \| (.*) \|$", README, re.MULTILINE)
    expected = [(name, written(field.default), field.description) for name, field in Settings.model_fields.items()]
    assert rows == expected


def test_public_names_are_there():
    for name in fisher_vmap.__all__:
        assert getattr(fisher_vmap, name) is not None
    for name in re.findall(r"from fisher_vmap import ([\w, ]+)", README):
        assert set(name.replace(" ", "").split(",")) <= set(fisher_vmap.__all__)


def test_every_file_it_names_is_there():
    block = README.split("## Where things are")[1]
    for name in re.findall(r"\b[\w/]+\.py\b", block):
        assert (ROOT / "fisher_vmap" / name).is_file(), name


def test_every_module_has_its_line():
    block = README.split("## Where things are")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", block))
    missing = {path.name for path in (ROOT / "fisher_vmap").glob("[a-z]*.py")} - named
    assert not missing, f"README's tree does not name {sorted(missing)}"
