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


INSIDE = (ROOT / "docs" / "inside.md").read_text("utf-8")
PACKAGE = ROOT / "fisher_vmap"


def test_inside_fits_on_a_screen_and_its_path_is_of_files_that_there_are():
    assert len(INSIDE.splitlines()) <= 60
    path = re.findall(r"(?m)^([\w/]+\.py)  ", INSIDE.split("## The path of a batch")[1])
    assert len(path) == 18
    for name in path:
        assert (PACKAGE / name).is_file(), name


def test_inside_has_a_line_for_each_folder():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"(?m)^  (\w+)/ ", INSIDE)) == folders


def test_each_folder_has_a_line_for_each_of_its_modules_and_no_other():
    for init in PACKAGE.glob("*/__init__.py"):
        listed = set(re.findall(r"(?m)^(\w+)(?::| {2,})", init.read_text("utf-8")))
        there = {path.stem for path in init.parent.glob("*.py")} - {"__init__"}
        assert listed == there, init.parent.name
