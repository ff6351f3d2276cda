"""Mixtures of experts: right, and without an operation that torch would run once for each cotangent."""

import pytest
import torch
from models import draw, padded, prompts
from oracles import plain_scores, relative
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from fisher_vmap.fisher import fisher_scores
from fisher_vmap.model.patches import experts_apart

SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=32),
}


def model_of(family: str) -> torch.nn.Module:
    return draw(AutoModelForCausalLM.from_config(CONFIGS[family]()).eval(), seed=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_without_the_fallback_of_vmap(family):
    model, rows = model_of(family), prompts((5, 1, 9, 12))
    before = model.config._experts_implementation
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        scores = fisher_scores(model, *padded(rows, "left", extra=2), layers=[0, 1], top_k=4)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    assert model.config._experts_implementation == before
    for layer, gradients in scores.gradients.items():
        for b, row in enumerate(rows):
            expected = plain_scores(model, row, layer, token_ids=scores.token_ids[b]).gradients
            assert relative(gradients[b], expected) < 1e-5


def test_every_configuration_has_its_own_word_back():
    model = model_of("mixtral")
    model.config._experts_implementation = "batched_mm"
    with pytest.raises(KeyError), experts_apart(model):
        assert model.config._experts_implementation == "eager"
        raise KeyError
    assert model.config._experts_implementation == "batched_mm"
