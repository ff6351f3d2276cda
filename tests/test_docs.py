"""The pages in docs/ are what their scripts write from the measured numbers, and their links lead somewhere."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.accuracy_page import page as accuracy_page
from fisher_vmap.config import Settings
from fisher_vmap.settings.run_options import RunOptions

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", ["steering", "study"])
def test_the_page_is_written_from_the_measured_numbers(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = json.loads((DOCS / f"{name}.json").read_text("utf-8"))
    assert module.page(numbers) == (DOCS / f"{name}.md").read_text("utf-8")


def test_the_page_of_accuracy_is_written_from_the_measured_numbers():
    numbers = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text("utf-8"))
    assert accuracy_page(numbers) == (DOCS / "accuracy.md").read_text("utf-8")


def test_the_cluster_in_the_docs_is_one_that_ray_takes():
    jsonschema, ray = pytest.importorskip("jsonschema"), pytest.importorskip("ray")
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
