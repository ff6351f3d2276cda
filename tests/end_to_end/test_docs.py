"""The pages in docs/ are what their scripts write from the measured numbers, and their links lead somewhere."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest
import yaml

from benchmarks.accuracy_page import page as accuracy_page
from benchmarks.attribution_page import page as attribution_page
from benchmarks.steering_page import page as steering_page
from fisher_vmap.run.settings import RunOptions, Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", ["steering", "study"])
def test_the_page_is_written_from_the_measured_numbers(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = json.loads((DOCS / f"{name}.json").read_text("utf-8"))
    assert module.page(numbers) == (DOCS / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "shown", "page"),
    [
        ("accuracy", "accuracy", accuracy_page),
        ("attribution", "attribution", attribution_page),
        ("steering", "steering-study", steering_page),
    ],
)
def test_the_page_of_a_benchmark_is_written_from_the_measured_numbers(name, shown, page):
    numbers = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))
    assert page(numbers) == (DOCS / f"{shown}.md").read_text("utf-8")


@pytest.mark.needs("jsonschema", "ray")
def test_the_cluster_in_the_docs_is_one_that_ray_takes():
    import jsonschema
    import ray

    text = (DOCS / "cluster.md").read_text("utf-8").split("```yaml\n")[1].split("```")[0]
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load(text)
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert all("resources" in kind and "node_config" in kind for kind in config["available_node_types"].values())


def test_settings_and_flags_in_the_docs_are_there():
    known = {*Settings.model_fields, *RunOptions.model_fields, "config"}
    text = (DOCS / "cluster.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if "fisher-vmap run" in line]
    assert len(lines) > 5
    for flag in re.findall(r"--(\w+)", "\n".join(lines).replace("--dependency", "").replace("--wrap", "")):
        assert flag in known, flag
    for name in re.findall(r"`(\w+): ", text):
        assert name in known, name


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_tables_of_the_peers_are_what_was_measured():
    jobs = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text("utf-8"))["jobs"]
    section = (ROOT / "benchmarks" / "README.md").read_text("utf-8").split("## Beside the peers")[1]
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    ratios = {}
    for job, found in jobs.items():
        table = section.split(f"`{job}`: ")[1].split("\n\n")[1].splitlines()[2:]
        shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        assert len(shown) == len(found["rows"])
        for (name, seconds, ratio, memory, lines, *_), row in zip(shown, found["rows"].values(), strict=True):
            assert name.split(",")[0] == row["peer"]
            measured = statistics.median(row["seconds"]), row["over_ours"]["median"]
            assert (seconds, ratio) == tuple(f"{value:.2f}" for value in measured)
            assert (memory, lines) == (f"{row['bytes_added_at_peak'] / 1e6:.0f}", str(row["lines"]))
        ratios[job] = [row["over_ours"]["median"] for name, row in found["rows"].items() if not name.startswith("ours")]
    real, tiny = ratios["top-k"] + ratios["leading"], ratios["whole"]
    assert min(real + tiny) > 1  # "In time none does at these sizes"
    assert f"{min(real):.1f} to {max(real):.0f} times faster on SmolLM2" in readme
    assert f"{min(tiny):.1f} to {max(tiny):.0f} times for the dense matrix" in readme
