"""Steering adds exactly the step it says, where it says, and takes it away again."""

import numpy as np
import pytest
import torch
from models import BLOCKS, VOCABULARY, WIDTH, block, fresh, prompts, tiny
from oracles import plain_scores, relative

from fisher_vmap import FisherModel, Step, fisher_scores, measured_kl
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.model.recording import hidden_of, output_of, with_output
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


def by_columns(model, ids, step, columns, attention_mask=None):
    """Logits [B, T, V] with a step at chosen columns [B, T], by a plain hook."""
    hook = decoder_blocks(model)[block("llama", 1)].register_forward_hook(
        lambda _m, _i, out: with_output(out, output_of(out) + columns[..., None] * step)
    )
    try:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        hook.remove()


def written(model, ids, mask, step, columns_of, new):
    """[B, T + new]: the likeliest tokens, each from the whole sequence again with a step at some of its columns."""
    for _ in range(new):
        position, at = (mask.cumsum(1) - 1).clamp(min=0), columns_of(ids.shape[1])
        hook = decoder_blocks(model)[block("llama", 1)].register_forward_hook(
            lambda _m, _i, out, at=at: with_output(out, output_of(out) + at[..., None] * step)
        )
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        hook.remove()
        ids = torch.cat([ids, logits[:, -1:].argmax(2)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
COLUMNS = {
    "last": lambda T: (torch.arange(T) == 5).expand(3, -1),
    "prompt": lambda T: torch.nn.functional.pad(LEFT, (0, T - 6)),
    "completion": lambda T: (torch.arange(T) > 5).expand(3, -1),
    "mask": lambda T: torch.nn.functional.pad(LEFT * torch.tensor([1, 0, 0, 1, 1, 0]), (0, T - 6)),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", COLUMNS)
def test_generation_is_steered_at_these_positions_alone(positions, use_cache):
    """A batch padded on the left, the cache and no cache, twice in one context: as the whole sequences with a mask."""
    model, ids = tiny("llama"), torch.stack(prompts([6, 6, 6])) * LEFT
    step = torch.tensor(9.0 * V / np.linalg.norm(V))
    expected = written(model, ids, LEFT, step, COLUMNS[positions], 7)
    plain = written(model, ids, LEFT, 0 * step, COLUMNS[positions], 7)
    assert not torch.equal(expected, plain)
    where = LEFT * torch.tensor([1, 0, 0, 1, 1, 0]) if positions == "mask" else positions
    choices = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": use_cache}
    with steer(model, 1, V, 9.0, residual_norm=1.0, positions=where):
        for _ in range(2):
            assert torch.equal(model.generate(ids, attention_mask=LEFT, **choices), expected)
    assert torch.equal(model.generate(ids, attention_mask=LEFT, **choices), plain)


def test_the_last_token_of_prompts_padded_on_the_right():
    model, ids = tiny("llama"), torch.stack(prompts([6, 6, 6]))
    mask = LEFT.flip(1)
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, 6)
    step = torch.tensor(3.0 * V / np.linalg.norm(V))
    expected = by_columns(model, ids, step, last, mask)
    with torch.no_grad(), steer(model, 1, V, 3.0, residual_norm=1.0, positions="last"):
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_a_cache_given_by_hand_goes_on():
    """Passes with a cache of the caller's, of several tokens each: all after the first are the completion."""
    model, ids = tiny("llama"), prompts([9])[0][None]
    columns = (torch.arange(9) >= 4).double()[None]
    expected = by_columns(model, ids, torch.tensor(3.0 * V / np.linalg.norm(V)), columns)
    with torch.no_grad(), steer(model, 1, V, 3.0, residual_norm=1.0, positions="completion"):
        out, found = None, []
        for part in ids.split([4, 3, 2], 1):
            out = model(input_ids=part, past_key_values=out and out.past_key_values, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_several_layers_at_once():
    model, ids, other = tiny("llama"), prompts([6])[0][None], V[::-1].copy()
    with torch.no_grad():
        with steer(model, 1, V, 2.0, residual_norm=1.0), steer(model, 2, other, 2.0, residual_norm=1.0):
            expected = model(input_ids=ids).logits
        with steer(model, {1: V, 2: other}, scale=2.0, residual_norm=1.0):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        steps = [Step(torch.tensor(2 * v / np.linalg.norm(v)), name) for v, name in
                 ((V, block("llama", 1)), (other, block("llama", 2)))]  # fmt: skip
        with steer(model, steps):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        with steer(model, steps, scale=-1.0), steer(model, steps):
            torch.testing.assert_close(model(input_ids=ids).logits, by_columns(model, ids, 0, torch.zeros(1, 6)))


@pytest.mark.parametrize("positions", ["last", "prompt", "completion", torch.tensor([[1, 0, 0, 1, 0, 0]])])
def test_scores_of_a_model_that_is_steered_at_some_positions(positions):
    """The package's own runs add the step where it belongs, whatever way they lay out a prompt."""
    model, ids = fresh("llama"), prompts([6])[0][None]
    columns = {"last": [0, 0, 0, 0, 0, 1], "prompt": [1] * 6, "completion": [0] * 6}
    at = torch.tensor(columns[positions])[None] if isinstance(positions, str) else positions
    step = torch.tensor(3.0 * V / np.linalg.norm(V))
    expected = by_columns(model, ids, step, at)[0, -1].log_softmax(0)
    handle = decoder_blocks(model)[block("llama", 1)].register_forward_hook(
        lambda _m, _i, out: with_output(out, output_of(out) + at[..., None] * step)
    )
    by_hand = plain_scores(model, ids[0], block("llama", 2), top_k=5)
    handle.remove()
    with steer(model, 1, V, 3.0, residual_norm=1.0, positions=positions):
        found = fisher_scores(model, ids, layers=2, top_k=5, audit="always")
    torch.testing.assert_close(found.log_probs[0], expected.topk(5).values)
    assert relative(found.factor().mT[0] @ found.factor()[0], by_hand.fisher) < 1e-6  # its norms are float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, V, 1.0), {"positions": "first"}), "positions is 'first'; expected one of all, last, prompt, completion"),
        (((1, V), {}), "scale is missing"),
        (((1,), {}), "no direction"),
        ((([V],), {}), "is no Step"),
        (((1, Step(torch.ones(36), "x"), 1.0), {"residual_norm": 2.0}), "residual_norm was given with a Step"),
    ],
)
def test_what_is_no_step_is_said(arguments, message):
    given, named = arguments
    with pytest.raises(ValueError, match=message), steer(tiny("llama"), *given, **named):
        raise AssertionError


def test_positions_of_another_shape_and_a_part_of_the_model_are_told_when_it_runs():
    model, ids = tiny("llama"), prompts([5])[0][None]
    with steer(model, 1, V, 1.0, positions=torch.ones(1, 4)), pytest.raises(ValueError, match=r"positions has shape"):
        model(input_ids=ids)
    with steer(model, 1, V, 1.0, positions="last"), pytest.raises(ValueError, match="the causal LM itself"):
        model.model(input_ids=ids)
