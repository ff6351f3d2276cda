"""What the README and the book say of settings, names and files is what there is."""

import re
from pathlib import Path

import yaml

import fisher_vmap
from fisher_vmap.run.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BOOK = {path: path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts}
RUNNING = BOOK[ROOT / "docs" / "running.md"]


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 130, "what is longer belongs in docs/"


def test_it_leads_to_every_page_that_somebody_wrote():
    generated = {"index", "benchmarks", "changelog", "contributing", "notebook", "study.template"}
    for path in BOOK:
        assert path.stem in generated or f"({path.relative_to(ROOT)})" in README, path


def test_the_settings_that_it_shows_are_settings():
    shown = yaml.safe_load(re.search(r"(?m)(^\w+: .+\n)+", RUNNING.split("## Settings")[1].split("```yaml\n")[1])[0])
    assert len(shown) > 5
    Settings(**shown)


def test_public_names_are_there():
    for name in fisher_vmap.__all__:
        assert getattr(fisher_vmap, name) is not None
    for text in (README, *BOOK.values()):
        for name in re.findall(r"from fisher_vmap import ([\w, ]+)", text):
            assert set(name.replace(" ", "").split(",")) <= {*fisher_vmap.__all__, "algebra"}


def test_both_name_every_exit_code_alike():
    said = [" ".join(re.search(r"Exit codes: 0 done(.|\n)*?\.\n", text)[0].split()) for text in (README, RUNNING)]
    assert said[0] == said[1]
    assert [int(code) for code in re.findall(r"(?:: |, )(\d+) [a-z]", said[0])] == [0, 2, 3, 130, 1]


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
