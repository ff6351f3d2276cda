"""Every class of transformers' causal-LM mapping against plain autograd, tiny and random, padded on either side."""

import re
from pathlib import Path

import architectures
import pytest
from architecture_check import examined
from architecture_table import row_of

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
WELL_USED = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "olmo2"),
    *("mixtral", "mamba"),
)

# Classes that are no causal LM on plain tokens, or cannot be built from their config here, by what is said of them.
CANNOT = {
    "cpmant": "sees later tokens",
    "prophetnet": "sees later tokens",
    "musicgen": "cannot be run on plain tokens",
    "musicgen_melody": "cannot be run on plain tokens",
    "reformer": "cannot be differentiated",
    "gemma3n": "requires the (PIL|timm) library",
    "gemma4_assistant": "layer types producing a cache",
    "gemma4_unified_assistant": "layer types producing a cache",
}


@pytest.mark.parametrize("kind", WELL_USED)
def test_a_well_used_family(kind):
    found = examined(kind)
    assert found.outcome == "agrees", found.reason
    assert found.oracle == "float64" and not found.warnings
    assert len(found.blocks) == architectures.BLOCKS
    assert {form["form"] for form in found.forms.values()} <= {"packed", "layerwise"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", architectures.kinds())
def test_every_class_of_the_mapping(kind):
    found = examined(kind)
    if kind in CANNOT:
        assert found.outcome in ("refused", "not built") and re.search(CANNOT[kind], found.reason), found
    else:
        assert found.outcome == "agrees", f"{found.outcome}: {found.reason}"


@pytest.mark.slow
def test_at_least_95_per_cent_of_what_can_be_built_agrees():
    outcomes = [examined(kind).outcome for kind in architectures.kinds()]
    assert outcomes.count("agrees") >= 0.95 * (len(outcomes) - outcomes.count("not built"))


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_came_out():
    """Without its last column, the distance, which differs from machine to machine."""
    written = {line.rpartition("| ")[0].rsplit("|", 1)[0] for line in TABLE.read_text().splitlines()}
    for kind in architectures.kinds():
        row = row_of(examined(kind))
        assert row.rpartition("| ")[0].rsplit("|", 1)[0] in written, f"{row}: run `make architectures`"
