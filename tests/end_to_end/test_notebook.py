"""The example notebook runs, and what it shows was computed by it."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "fisher_geometry.ipynb"


def read():
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook) -> list[str]:
    """What each code cell printed; what libraries say on standard error depends on what else is installed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(output.text for output in cell.outputs if output.get("name") == "stdout") for cell in cells]


def test_it_is_stored_with_its_output_and_small():
    notebook = read()
    assert all(text for text in printed(notebook)[1:])
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))
    assert NOTEBOOK.stat().st_size < 50_000


@pytest.mark.needs("ipykernel", "nbclient")
@pytest.mark.slow
def test_it_runs_and_says_the_same(tmp_path):
    import nbclient

    from fisher_vmap.demo import demo_model
    from fisher_vmap.errors import UserError

    try:
        demo_model()
    except UserError as error:
        pytest.skip(str(error))
    stored, notebook = read(), read()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(printed(stored), printed(notebook), strict=True):
        assert re.sub(r"[-+]?[\d.]+(e[-+]\d+)?", "#", after) == re.sub(r"[-+]?[\d.]+(e[-+]\d+)?", "#", before)
    leading, other = re.findall(r"predicted (\S+) nats, measured (\S+)", printed(notebook)[-1])
    assert float(leading[1]) == pytest.approx(float(leading[0]), rel=0.3)
    assert float(other[1]) < 0.1 * float(leading[1])
