"""The fused pullback of an attention module against autograd of the module itself, one unpadded prompt at a time."""

import pytest
import torch
from attention_cases import LENGTHS, packed_prompts
from devices import on_cpu, placed
from models import tiny
from torch.func import vjp, vmap

from fisher_vmap.fisher import fisher_scores
from fisher_vmap.kernels.hf_attention import NAME, attention_set_to, prompts_packed
from fisher_vmap.kernels.rotary_attention import fused_attention_forward, parts_of, proven_attentions
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model import layout as layout_module


@pytest.mark.parametrize("alone_from", [1, None])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_it_is_the_pullback_of_each_prompt_alone(monkeypatch, family, alone_from, device):
    monkeypatch.setattr(layout_module, "ALONE_FROM", {} if alone_from is None else {device.type: alone_from})
    own = tiny(family)
    model = placed(own, device)
    attention = model.model.layers[1].self_attn
    layout, D = packed_prompts(device), model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, sum(LENGTHS), D, generator=generator).to(model.dtype)
    g = torch.randn(3, 1, sum(LENGTHS), D, generator=generator).to(model.dtype)
    rotary = model.model.rotary_emb(x.to(device), layout.position_ids)
    fused = fused_attention_forward(attention)
    with attention_set_to(model, NAME), prompts_packed(layout):
        y, pull = vjp(lambda x: fused(hidden_states=x, position_embeddings=rotary)[0], x.to(device))
        with torch.no_grad():
            (pulled,) = vmap(pull)(g.to(device))
    y, pulled, rotary = on_cpu((y, pulled, rotary))
    attention = own.model.layers[1].self_attn
    with attention_set_to(own, "eager"):
        for a, z in layout.ranges():
            alone = tuple(t[:, a:z] for t in rotary)
            mask = torch.full((z - a, z - a), -torch.inf).triu(1).to(model.dtype)[None, None]
            y_alone, pull_alone = vjp(lambda x, r=alone, m=mask: attention(x, r, m)[0], x[:, a:z])
            (expected,) = vmap(pull_alone)(g[:, :, a:z])
            torch.testing.assert_close(y[:, a:z], y_alone, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(pulled[:, :, a:z], expected, rtol=1e-6, atol=1e-6)


def test_the_kernel_uses_it_and_modules_with_more_parts_are_left_alone(device):
    model = placed(tiny("llama"), device)
    fisher_scores(model, torch.arange(12, device=device).view(2, 6), layers=0, top_k=2)
    fused = {id(module) for module, _ in known_of(model).parts.fused}
    assert all(id(block.self_attn) in fused for block in model.model.layers)
    assert parts_of(tiny("gemma2").model.layers[0].self_attn) is not None  # its soft-cap keeps it out, not its parts
    assert parts_of(tiny("gpt2").transformer.h[0].attn) is None


def test_a_module_that_does_something_else_is_not_taken():
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    scale, attention.scaling = attention.scaling, 2 * attention.scaling
    forward = fused_attention_forward(attention)  # with the wrong scale
    attention.scaling = scale
    layout = packed_prompts()
    with torch.no_grad(), attention_set_to(model, NAME), prompts_packed(layout):
        run = lambda: model(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False)  # noqa: E731
        assert proven_attentions({attention: forward}, run) == {}
        assert set(proven_attentions({attention: fused_attention_forward(attention)}, run)) == {attention}
