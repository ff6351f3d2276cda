"""Hooks that users have: patched positions, stored activations, a vector a prompt; and attention of their own."""

import pytest
import torch
import transformers
from models import block, draw, fresh, padded, prompts
from oracles import plain_scores, relative
from torch import Tensor, nn

from fisher_vmap import FisherModel, fisher_full, fisher_scores

LENGTHS = (12, 9, 11)
LAYER = block("llama", 0)
KERNELS = ("auto", "layerwise", "whole", "loop")


def vector(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    return torch.randn(*shape, 36, generator=torch.Generator().manual_seed(3)).to(dtype)


def hooked(change, dtype: torch.dtype = torch.float64, at: str = "model.layers.1", **changes) -> nn.Module:
    """A llama with a hook that gives what `change` makes of a module's output."""
    model = fresh("llama", dtype, **changes)
    model.get_submodule(at).register_forward_hook(lambda _module, _args, out: change(out.clone()))
    return model


def put(index, value):
    """What `out[index] = value` makes of a tensor."""

    def change(out: Tensor) -> Tensor:
        out[index] = value
        return out

    return change


def added(index, value):
    """What `out[index] += value` makes of a tensor."""

    def change(out: Tensor) -> Tensor:
        out[index] += value
        return out

    return change


def assert_agrees(model, rows, budget=1e-6, side="left", layer=LAYER, reference=None, **options):
    found = fisher_scores(model, *padded(rows, side), layers=layer, top_k=4, **options)
    for b, row in enumerate(rows):
        expected = plain_scores(reference or model, row, layer, token_ids=found.token_ids[b])
        assert relative(found.gradients[layer][b], expected.gradients) < budget
    return found


LAST = (slice(None), -1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["auto", "loop"])
@pytest.mark.parametrize(
    "change", [put((slice(None), 5), vector()), added(LAST, vector()), added((slice(None), slice(7, None)), vector())]
)
def test_a_hook_on_some_positions(change, kernel, side):
    assert_agrees(hooked(change), prompts(LENGTHS), side=side, kernel=kernel)


def test_a_hook_on_the_last_position_in_bfloat16():
    """The padding moves to the right inside, where -1 would meet it: 9 to 16% off, which is no rounding."""
    model = hooked(added(LAST, 0.2 * vector(torch.bfloat16)), torch.bfloat16)
    wide = hooked(added(LAST, 0.2 * vector(torch.bfloat16).float()), torch.bfloat16).float()
    assert_agrees(model, prompts(LENGTHS), 0.06, reference=wide, precision="model")


def test_a_hook_far_from_the_beginning_in_packed_rows():
    model = hooked(added((slice(None), slice(150, None)), vector()), max_position_embeddings=512)
    opened = FisherModel(model, layers=LAYER, top_k=4)
    assert_agrees(model, prompts(LENGTHS))
    rows = prompts((100, 90, 110))  # no position is 150, but rows of all three end to end are
    assert_agrees(model, rows)
    assert opened.forms[LAYER]["form"] != "packed"
    assert_agrees(model, prompts((200, 160)))


def test_a_stored_activation():
    assert_agrees(hooked(lambda out: out + vector(torch.float64, 1, 12)), prompts((12,)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_vector_for_each_prompt_of_the_batch(side):
    vectors, rows = vector(torch.float64, 3, 1), prompts(LENGTHS)
    found = fisher_scores(hooked(lambda out: out + vectors), *padded(rows, side), layers=LAYER, top_k=4)
    for b, row in enumerate(rows):
        single = hooked(lambda out, b=b: out + vectors[b : b + 1])
        expected = plain_scores(single, row, LAYER, token_ids=found.token_ids[b])
        assert relative(found.gradients[LAYER][b], expected.gradients) < 1e-6


def test_activations_stored_for_a_padded_batch():
    """[B, T, D] in the caller's own layout, padding and all: nothing else has that shape."""
    rows, stored = prompts((12, 9, 11)), vector(torch.float64, 3, 14)
    ids, mask = padded(rows, "left", extra=2)
    found = fisher_scores(hooked(lambda out: out + stored), ids, mask, layers=LAYER, top_k=4)
    for b, row in enumerate(rows):
        own = stored[b : b + 1, -len(row) :]
        single = hooked(lambda out, own=own: out + own)
        expected = plain_scores(single, row, LAYER, token_ids=found.token_ids[b])
        assert relative(found.gradients[LAYER][b], expected.gradients) < 1e-6


def test_hooks_and_the_other_ways_in():
    model, rows = hooked(added(LAST, vector())), prompts(LENGTHS)
    ids, mask = padded(rows, "left")
    full = fisher_full(model, ids, mask, layers=LAYER, rank=30, audit="always")
    with pytest.raises(ValueError, match="one at a time"), FisherModel(model, layers=LAYER).linearize(ids, mask):
        pass
    for b, row in enumerate(rows):
        F = plain_scores(model, row, LAYER).fisher
        A = full.factors[LAYER][b]
        assert relative(A.T @ A, F) < 1e-6
        with FisherModel(model, layers=LAYER).linearize(row[None]) as net:
            pulled = net.pullback(token_ids=torch.tensor([[3, 4]]))[0]
        assert relative(pulled, plain_scores(model, row, LAYER, token_ids=torch.tensor([3, 4])).gradients) < 1e-6
    numbers = FisherModel(model, layers=LAYER, top_k=4).numbers([row.tolist() for row in rows], 4)
    assert all(one.reason is None for one in numbers)


def test_a_hook_that_does_not_fit_the_batch_is_named():
    model = hooked(put((slice(None), 20), vector()))
    said = r"the hook hooked.<lambda> on model\.layers\.1 cannot be run on these 3 prompts of up to 12 tokens"
    with pytest.raises(ValueError, match=said):
        fisher_scores(model, *padded(prompts(LENGTHS), "left"), layers=LAYER)
    FisherModel(model, layers=LAYER)  # nothing is asked of it yet
    assert_agrees(model, prompts((25,)))


def test_a_hook_whose_vector_grows_between_calls():
    """Nothing about the hook shows it: the audit does."""
    strength = torch.zeros(1, dtype=torch.float64)
    model, rows = hooked(lambda out: added(LAST, strength * vector())(out)), prompts(LENGTHS)
    assert_agrees(model, rows)
    strength += 1
    assert_agrees(model, rows)


# Attention of a user's own, and rows that are no positions.


def far_and_sinks(module, query, key, value, mask, scaling=None, **_):
    """Attention to the first 4 keys and to the last 60."""
    groups, (T, S) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    at, to = torch.arange(T)[:, None], torch.arange(S)[None]
    seen = (to <= at) & ((to < 4) | (at - to < 60))
    scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_of_ones_own_beyond_the_prompts_of_the_proof(kernel):
    transformers.AttentionInterface.register("far_and_sinks", far_and_sinks)
    transformers.AttentionMaskInterface.register("far_and_sinks", lambda *_, **__: None)
    model = fresh("llama", max_position_embeddings=256)
    model.set_attn_implementation("far_and_sinks")
    for lengths in ((12, 9), (150, 130)):
        assert_agrees(model, prompts(lengths), kernel=kernel)
    assert model.config._attn_implementation == "far_and_sinks"


def test_a_temperature_that_grows_with_the_position_and_packed_rows():
    config = transformers.Llama4TextConfig(
        vocab_size=101, hidden_size=36, intermediate_size=58, intermediate_size_mlp=58, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=6, num_local_experts=2, moe_layers=[],
        no_rope_layers=[1, 0, 1, 0], attn_temperature_tuning=True, floor_scale=48, attn_scale=2.0,
        attention_chunk_size=4096, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    model = draw(transformers.AutoModelForCausalLM.from_config(config).eval(), 0).double()
    for lengths in ((9, 12), (40, 44, 41), (60, 100)):
        assert_agrees(model, prompts(lengths))
