"""Steering adds exactly the step it says, where it says, and takes it away again."""

import numpy as np
import pytest
import torch
from models import BLOCKS, VOCABULARY, WIDTH, block, fresh, prompts, tiny

from fisher_vmap import FisherModel, measured_kl
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.model.recording import hidden_of
from fisher_vmap.steering import steer

V = np.random.default_rng(0).normal(size=WIDTH)


def hidden(model, ids, layer):
    """What the block above takes in: `output_hidden_states` notes a block's output before any hook has changed it."""
    seen = []
    above = list(decoder_blocks(model).values())[layer + 1]
    handle = above.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(hidden_of(args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_the_step_is_added_at_every_position_of_that_layer_alone(family, scale):
    model, ids = tiny(family), prompts([7])[0][None]
    before = [hidden(model, ids, layer) for layer in range(BLOCKS - 1)]
    with steer(model, block(family, 1), V, scale, residual_norm=3.0):
        after = [hidden(model, ids, layer) for layer in range(BLOCKS - 1)]
    torch.testing.assert_close(after[0], before[0])
    step = torch.tensor(scale * 3.0 * V / np.linalg.norm(V))
    torch.testing.assert_close(after[1] - before[1], step.expand(1, 7, WIDTH))
    assert not torch.allclose(after[2], before[2], atol=1e-3)
    torch.testing.assert_close(hidden(model, ids, 2), before[2])


def test_without_a_norm_each_position_counts_in_its_own():
    model, ids = tiny("llama"), prompts([5])[0][None]
    before = hidden(model, ids, 1)
    with steer(model, 1, V, -0.1):
        after = hidden(model, ids, 1)
    unit = torch.tensor(V / np.linalg.norm(V))
    torch.testing.assert_close(after - before, -0.1 * before.norm(dim=-1, keepdim=True) * unit)


def test_steps_add_up_and_opposite_ones_cancel():
    model, ids = tiny("llama"), prompts([5])[0][None]
    before = hidden(model, ids, 2)
    with steer(model, 1, V, 0.3, residual_norm=1.0), steer(model, 1, torch.tensor(2 * V), -0.3, residual_norm=1.0):
        torch.testing.assert_close(hidden(model, ids, 2), before)
    with steer(model, 1, V, 0.1, residual_norm=1.0), steer(model, 1, list(V), 0.2, residual_norm=1.0):
        twice = hidden(model, ids, 2)
    with steer(model, 1, V, 0.3, residual_norm=1.0):
        torch.testing.assert_close(hidden(model, ids, 2), twice)


def test_the_model_is_as_it_was_whatever_happens():
    model = fresh("llama")
    with pytest.raises(KeyError), steer(model, 1, V, 1.0):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_generated_text_is_steered_with_the_cache_as_without():
    model, ids = tiny("llama"), prompts([6])[0][None]
    choices = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **choices)
    with steer(model, 1, V, 8.0, residual_norm=1.0):
        cached = model.generate(ids, attention_mask=torch.ones_like(ids), **choices)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **choices)
    assert torch.equal(cached, again) and not torch.equal(cached, plain)


def test_what_it_does_is_what_the_fisher_matrix_predicts():
    """In float64 with all tokens in F: 1/2 step^T F step is the KL divergence of the steered model, to third order."""
    model, ids = tiny("llama"), prompts([6])[0]
    fisher = FisherModel(model, layers=1, top_k=VOCABULARY)
    (numbers,) = fisher.numbers([ids.tolist()], rank=WIDTH)
    found = numbers.layers[fisher.layers[0]]
    v = found.V[0].astype(np.float64)
    scale = 1e-3 / found.residual_norm

    def steered(sign):
        with torch.no_grad():
            origin = model(input_ids=ids[None]).logits[0, -1].double().log_softmax(0)
            with steer(model, 1, v, sign * scale, residual_norm=found.residual_norm):
                log_p = model(input_ids=ids[None]).logits[0, -1].double().log_softmax(0)
        return float((origin.exp() * (origin - log_p)).sum())

    predicted = 0.5 * 1e-3**2 * found.S[0]
    measured = np.mean([steered(1), steered(-1)])
    np.testing.assert_allclose(measured, predicted, rtol=1e-3)
    np.testing.assert_allclose(measured_kl(model, ids, 1, torch.tensor(1e-3 * v)[None]), steered(1), rtol=1e-4)


def test_a_direction_of_another_width_is_told_when_the_model_runs():
    model, ids = fresh("llama"), prompts([5])[0][None]
    told = pytest.raises(ValueError, match=r"has 35 entries, but model.layers.1 gives \(1, 5, 36\)")
    with told, steer(model, 1, V[1:], 1.0):
        model(input_ids=ids)
    assert not any(module._forward_hooks for module in model.modules())


def test_entering_the_context_runs_nothing_where_the_layer_is_named():
    model = fresh("llama")
    called = []
    model.get_submodule("model.layers.1").register_forward_hook(lambda *_: called.append(1))
    with steer(model, "model.layers.1", V, 1.0):
        assert not called


@pytest.mark.needs("peft")
def test_a_wrapper_is_steered_by_either_name():
    import peft

    model, ids = fresh("llama", torch.float32), prompts([5])[0][None]
    with steer(model, "model.layers.1", V, 1.0), torch.no_grad():
        expected = model(input_ids=ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))  # B is zero
    for name in ("model.layers.1", "base_model.model.model.layers.1", 1):
        with steer(wrapped, name, V, 1.0), torch.no_grad():
            torch.testing.assert_close(wrapped(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, V, 1.0), "layer 9 was asked for; this model has layers 0 to 3"),
        ((1, np.outer(V, V), 1.0), r"shape \(36, 36\).*expected \[D\]"),
        ((1, 0 * V, 1.0), "length 0; expected"),
        ((1, np.full(WIDTH, np.nan), 1.0), "length nan; expected"),
        ((1, V, float("inf")), "scale is inf"),
    ],
)
def test_what_cannot_steer_is_said_before_anything_runs(arguments, message):
    with pytest.raises(ValueError, match=message), steer(tiny("llama"), *arguments):
        raise AssertionError


@pytest.mark.parametrize("change", [lambda v: v.bfloat16(), lambda v: v.clone().requires_grad_()])
def test_directions_of_any_dtype_and_with_gradients(change):
    model, ids = fresh("llama"), torch.arange(5)[None]
    vector = torch.ones(36)
    with torch.no_grad(), steer(model, 1, vector, 0.5):
        expected = model(input_ids=ids).logits
    with torch.no_grad(), steer(model, 1, change(vector), 0.5):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
