"""What once passed for a number and was none: models that change, that ban tokens, that begin with NaN."""

import copy
import threading

import numpy as np
import pytest
import torch
from command_cases import tiny_tokenizer
from models import block, fresh, padded, prompts, tiny
from oracles import plain_scores, relative

from fisher_vmap import FisherModel, fisher_full, fisher_scores, measured_kl
from fisher_vmap.data.pieces import Pieces

LENGTHS = (9, 4, 7)


def agrees(model, rows, layer, top_k=4, **options):
    """The scores of a batch are those of plain autograd through the model as it is now."""
    found = fisher_scores(model, *padded(rows, "left"), layers=layer, top_k=top_k, **options)
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, top_k=top_k)
        assert found.token_ids[b].tolist() == expected.token_ids.tolist()
        assert relative(found.gradients[layer][b], expected.gradients) < 1e-6
        torch.testing.assert_close(found.log_probs[b], expected.log_probs, atol=1e-5, rtol=0)
    return found


def ban(model, *tokens):
    def hook(_module, _args, logits):
        logits = logits.clone()
        logits[..., list(tokens)] = -torch.inf
        return logits

    return model.lm_head.register_forward_hook(hook)


def test_a_token_banned_on_the_unembedding_stays_banned():
    model, layer = fresh("llama"), block("llama", 1)
    first, second = prompts(LENGTHS), prompts(LENGTHS, seed=1)
    likeliest = agrees(model, first, layer).token_ids[:, 0].tolist()
    likeliest += agrees(model, second, layer).token_ids[:, 0].tolist()
    ban(model, *likeliest)
    for rows in (first, second):
        assert not set(likeliest) & set(agrees(model, rows, layer).token_ids.flatten().tolist())


def test_a_hook_that_moves_single_logits_is_part_of_the_model():
    model = fresh("gemma2")
    agrees(model, prompts(LENGTHS), block("gemma2", 1))
    model.lm_head.register_forward_hook(lambda _m, _a, z: z * torch.linspace(0.5, 2, z.shape[-1], dtype=z.dtype))
    agrees(model, prompts(LENGTHS), block("gemma2", 1))


def test_more_tokens_than_have_a_probability():
    model, rows, layer = fresh("llama"), prompts(LENGTHS), block("llama", 1)
    ban(model, *range(5, 101))
    found = FisherModel(model, layers=layer, top_k=8).numbers([row.tolist() for row in rows], 8)
    for numbers, row in zip(found, rows, strict=True):
        assert numbers.reason is None and np.isneginf(numbers.log_probs[5:]).all()
        expected = plain_scores(model, row, layer, top_k=5).fisher
        S = torch.linalg.eigvalsh(expected).flip(0)[:8]
        np.testing.assert_allclose(numbers.layers[layer].S[:5], S[:5], atol=1e-6 * float(S[0]))


def test_measured_divergences_of_a_model_that_bans_tokens():
    model, (row,), layer = fresh("llama"), prompts((6,)), block("llama", 2)
    ban(model, 3, 50)
    steps = 0.05 * torch.randn(2, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = measured_kl(model, row, layer, steps)
    for step, kl in zip(steps, found, strict=True):
        with torch.no_grad():
            p = model(row[None]).logits[0, -1].log_softmax(0)
            handle = model.get_submodule(layer).register_forward_hook(lambda _m, _a, out, s=step: out + s)
            q = model(row[None]).logits[0, -1].log_softmax(0)
            handle.remove()
        alive = p > -torch.inf
        assert float(kl) == pytest.approx(float((p.exp() * (p - q))[alive].sum()), rel=1e-6)


def _uncap(model):
    model.config.final_logit_softcapping = None


def _other_eps(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm.eps = 0.3


def _exchange(model):
    for layer in model.model.layers:
        norm = layer.input_layernorm
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 1.7 + 0.1)


@pytest.mark.parametrize("change", [_uncap, _other_eps, _exchange])
def test_what_changes_between_two_calls_is_seen(change):
    model, rows, layer = fresh("gemma2", final_logit_softcapping=2.0), prompts(LENGTHS), block("gemma2", 0)
    before = agrees(model, rows, layer)
    change(model)
    after = agrees(model, rows, layer)
    assert relative(after.gradients[layer], before.gradients[layer]) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_nothing_is_kept_of_a_first_batch_that_is_not_finite(family):
    model, layer, rows = fresh(family), block(family, 1), prompts(LENGTHS, vocabulary=90)
    model.get_input_embeddings().weight.data[95] = torch.nan
    bad = torch.tensor([95, 3, 95])
    found = fisher_scores(model, *padded([bad, rows[0]], "right"), layers=layer, top_k=4)
    assert found.gradients[layer][0].isnan().all()
    expected = plain_scores(model, rows[0], layer, top_k=4)
    assert relative(found.gradients[layer][1], expected.gradients) < 1e-6
    opened = FisherModel(model, layers=layer, top_k=4)
    agrees(model, rows, layer)
    assert opened.forms[layer]["form"] == "packed"


def test_threads_wait_for_one_another():
    model, rows = fresh("llama"), prompts(LENGTHS)
    model.set_attn_implementation("sdpa")
    layers = [block("llama", i) for i in (0, 1, 2, 3)]
    ids, mask = padded(rows, "right")
    expected = {layer: fisher_scores(model, ids, mask, layers=layer, top_k=3).gradients[layer] for layer in layers}
    failed: list[BaseException] = []

    def work(layer):
        try:
            for _ in range(5):
                found = fisher_scores(model, ids, mask, layers=layer, top_k=3).gradients[layer]
                assert torch.equal(found, expected[layer])
                fisher_full(model, ids, mask, layers=layer, rank=2)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and model.config._attn_implementation == "sdpa"


def test_any_other_token_where_nothing_of_it_is_left_in_float32():
    """The likeliest tokens hold all but e^-200: the rest's own score is taken from the logits."""
    model, rows, layer = fresh("llama", torch.float32), prompts(LENGTHS), block("llama", 2)
    weight = model.lm_head.weight.data
    weight[:3] *= 60
    wide = copy.deepcopy(model).double()
    found = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=101 - 1, include_rest=True)
    few = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=3, include_rest=True)
    assert found.gradients[layer].isfinite().all() and few.gradients[layer].isfinite().all()
    for b, row in enumerate(rows):
        bias = torch.zeros(36, dtype=torch.float64, requires_grad=True)
        handle = wide.get_submodule(layer).register_forward_hook(lambda _m, _a, out, x=bias: out + x)
        z = wide(row[None]).logits[0, -1]
        handle.remove()
        rest = torch.ones(101, dtype=torch.bool).index_fill(0, few.token_ids[b, :-1], False)
        (expected,) = torch.autograd.grad(z[rest].logsumexp(0) - z.logsumexp(0), bias)
        assert relative(few.gradients[layer][b, -1], expected) < 1e-4


@pytest.mark.parametrize("layers", [True, [True], [np.True_], (0, False)])
def test_a_truth_value_is_no_layer(layers):
    with pytest.raises(ValueError, match="expected names of modules, numbers of blocks, or 'all'"):
        fisher_scores(tiny("llama"), torch.tensor([[3, 4]]), layers=layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_another_default_device_changes_nothing(family):
    """Whatever is made without a place would be made there; on the meta device it would have no numbers."""
    rows, layer = prompts(LENGTHS), block(family, 1)
    ids, mask = padded(rows, "left")
    expected = fisher_scores(fresh(family), ids, mask, layers=layer, trace_samples=2, include_rest=True)
    full = fisher_full(fresh(family), ids, mask, layers=layer, rank=3)
    model = fresh(family)
    torch.set_default_device("meta")
    try:
        found = fisher_scores(model, ids, mask, layers=layer, trace_samples=2, include_rest=True)
        also = fisher_full(model, ids, mask, layers=layer, rank=3)
        (numbers,) = FisherModel(model, layers=layer).numbers([rows[0].tolist()], 3)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found.gradients[layer], expected.gradients[layer])
    assert torch.equal(also.factors[layer], full.factors[layer]) and numbers.reason is None


def test_a_token_that_the_tokenizer_does_not_know_is_shown_by_its_number():
    tokenizer = tiny_tokenizer()
    pieces = Pieces(tokenizer)
    assert pieces.single(len(tokenizer)) == f"<id {len(tokenizer)}>" and pieces.single(len(tokenizer) - 1)


def test_a_model_that_is_run_in_another_thread_meanwhile_says_so():
    model, (row,), said = fresh("llama"), prompts((9,)), []

    def run():
        try:
            model(row[None])
        except RuntimeError as error:
            said.append(str(error))

    def beside(_module, _args, _output):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    handle = model.model.norm.register_forward_hook(beside)
    fisher_scores(model, row[None], layers=1, top_k=3)
    handle.remove()
    assert any("fisher_vmap is computing on this model in another thread" in line for line in said)
    model(row[None])  # and now it runs
