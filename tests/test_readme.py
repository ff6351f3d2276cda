"""What the README says of settings and names, and the book of files, is what there is."""

import re
from pathlib import Path

import yaml

import fisher_vmap
from fisher_vmap.run.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_settings_that_it_shows_are_settings():
    shown = yaml.safe_load(re.search(r"(?m)(^    \w+: .+\n)+", README.split("## Settings")[1])[0])
    assert len(shown) > 5
    Settings(**shown)


def test_public_names_are_there():
    for name in fisher_vmap.__all__:
        assert getattr(fisher_vmap, name) is not None
    for name in re.findall(r"from fisher_vmap import ([\w, ]+)", README):
        assert set(name.replace(" ", "").split(",")) <= set(fisher_vmap.__all__)


def tree() -> dict[str, set[str]]:
    """The files that the book's tree names, by their folder in the package; "" is the package itself."""
    block, found, folder = (ROOT / "docs" / "inside.md").read_text().split("## Where things are")[1], {}, ""
    for line in block.splitlines():
        if re.match(r" {2}\S", line):
            start = re.match(r" {2}(\w+)/ ", line)
            folder = start[1] if start else ""
        found.setdefault(folder, set()).update(re.findall(r"(?<![\w.])(\w+\.py)\b", line))
    return found


def test_every_file_it_names_is_there():
    for folder, names in tree().items():
        for name in names - {"__init__.py", "attention.py"}:
            assert (ROOT / "fisher_vmap" / folder / name).is_file(), f"{folder}/{name}"


def test_every_module_has_its_line():
    named = tree()
    listed_elsewhere = {"storage", "report", "engines"}
    for folder in {path.parent for path in (ROOT / "fisher_vmap").rglob("*.py")}:
        name = "" if folder.name == "fisher_vmap" else folder.name
        assert name in named or name == "engines", f"docs/inside.md does not name {name}/"
        if name not in listed_elsewhere:
            missing = {path.name for path in folder.glob("[a-z]*.py")} - named[name]
            assert not missing, f"docs/inside.md does not name {sorted(missing)} of {name or 'the package'}"


def test_the_storage_folder_says_what_each_of_its_files_is():
    text = (ROOT / "fisher_vmap" / "storage" / "__init__.py").read_text()
    assert {path.stem for path in (ROOT / "fisher_vmap" / "storage").glob("[a-z]*.py")} <= set(re.findall(r"\w+", text))
