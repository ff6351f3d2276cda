"""The attention's pullback against plain autograd through a softmax attention written out, in float64."""

import pytest
import torch
from attention_cases import EV, SCALE, B, E, K, causal, draw, no_vmap_fallback, tensors, window
from devices import on, on_cpu, placed
from models import block, fresh, padded, prompts
from oracles import plain_scores, relative, softmax_attention
from torch.func import vjp, vmap

from fisher_vmap import fisher_scores
from fisher_vmap.kernels import attention as attention_module
from fisher_vmap.kernels.attention import AttentionKind, attention
from fisher_vmap.kernels.hf_attention import _attention_forward, prompts_packed
from fisher_vmap.model.layout import lay_out, pack_rows

TOLERANCE = 1e-11


def assert_matches(q, k, v, mask, kind, allowed, device) -> None:
    """Forward, and the pullback of K cotangents at once without the fallback, and of one without vmap."""
    H, T = q.shape[1:3]
    allowed = None if allowed is None else allowed.expand(B, H, T, k.shape[2])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = softmax_attention(*leaves, kind.scale, allowed)
    cotangents = draw(K, *expected.shape, seed=4)
    expected_grads = [torch.autograd.grad(expected, leaves, c, retain_graph=True) for c in cotangents]

    with no_vmap_fallback():
        mask_there, *there = placed((mask, q, k, v), device)
        out, pull = vjp(lambda q, k, v: attention(q, k, v, mask_there, kind), *there)
        grads = on_cpu(vmap(pull)(cotangents.to(device)))
    torch.testing.assert_close(out.cpu(), expected, atol=TOLERANCE, rtol=0)
    for i, found in enumerate(grads):
        reference = torch.stack([g[i] for g in expected_grads])
        torch.testing.assert_close(found, reference, atol=TOLERANCE, rtol=0)  # every entry: no position can hide

    plain = [x.clone().requires_grad_() for x in there]
    one = on_cpu(torch.autograd.grad(attention(*plain, mask_there, kind), plain, cotangents[0].to(device)))
    for found, reference in zip(one, expected_grads[0], strict=True):
        torch.testing.assert_close(found, reference, atol=TOLERANCE, rtol=0)


HEADS = pytest.mark.parametrize(("H", "G"), [(3, 3), (6, 2), (4, 1)])


@HEADS
@pytest.mark.parametrize("T", [1, 16, 17, 37])
def test_causal_without_a_mask(H, G, T, block_elements, device):
    q, k, v = tensors(H, G, T, T)
    assert_matches(q, k, v, None, AttentionKind(SCALE, T > 1), causal(T, T), device)


@HEADS
def test_every_position_seen(H, G, block_elements, device):
    q, k, v = tensors(H, G, 37, 37)
    assert_matches(q, k, v, None, AttentionKind(SCALE, False), None, device)


@pytest.mark.parametrize(("T", "S"), [(20, 33), (33, 20), (1, 9)])
def test_as_many_keys_as_there_are(T, S, block_elements, device):
    q, k, v = tensors(6, 2, T, S)
    assert_matches(q, k, v, None, AttentionKind(SCALE, False), None, device)


@pytest.mark.parametrize(("T", "S"), [(97, 97), (33, 33), (50, 110)])
def test_causal_blocks_that_see_a_part_of_the_keys(T, S, block_elements, device):
    """Long enough that early blocks of queries leave keys out, some of which they are given and must not see."""
    assert_matches(*tensors(4, 2, T, S), None, AttentionKind(SCALE, True), causal(T, S), device)


def test_blocks_take_at_least_the_keys_that_they_see_and_in_few_sizes():
    for S in (1, 31, 33, 100, 2048):
        taken = [attention_module.keys_seen(keys, S) for keys in range(1, S + 1)]
        assert all(keys <= n <= S for keys, n in zip(range(1, S + 1), taken, strict=True))
        assert len(set(taken)) <= 17 and taken[0] <= max(32, S // 16)


def test_causal_with_more_keys_than_queries(device):
    T, S = 20, 33
    q, k, v = tensors(6, 2, T, S)
    assert_matches(q, k, v, None, AttentionKind(SCALE, True), causal(T, S), device)


@HEADS
@pytest.mark.parametrize("shape", ["TS", "11TS", "B1TS", "BHTS", "B11S"])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(H, G, shape, kind, block_elements, device):
    T = 37
    q, k, v = tensors(H, G, T, T)
    rows = {"TS": (), "11TS": (1, 1), "B1TS": (B, 1), "BHTS": (B, H), "B11S": (B, 1)}[shape]
    if shape == "B11S":
        mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
        mask[1, ..., :9] = False
    else:
        mask = window(T, T).expand(*rows, T, T).clone()
        if rows and rows[0] == B:
            mask[1] |= causal(T, T)  # the prompts of the batch are masked differently
    if kind == "added":
        mask = torch.where(mask, draw(*mask.shape, seed=7), -torch.inf)
    for is_causal in (True, False):  # with a mask, the mask says it all
        assert_matches(q, k, v, mask, AttentionKind(SCALE, is_causal), mask, device)


@pytest.mark.parametrize("lengths", [(5, 1, 20, 11), (7, 7, 8, 6, 1), (37,), (1, 1, 1)])
def test_prompts_laid_end_to_end_do_not_see_one_another(lengths, block_elements, device):
    """Against each prompt alone, through the function that the models call."""
    layout = pack_rows(lay_out(*placed(padded(prompts(lengths), "right"), device)))
    module, N = torch.nn.Module(), sum(lengths)
    q, k, v = (x[:1] for x in tensors(6, 2, N, N))
    cotangents = draw(K, 1, N, 6, EV, seed=4)

    def packed(q, k, v):
        return _attention_forward(module, q, k, v, None, scaling=SCALE)[0]

    with prompts_packed(layout), no_vmap_fallback():
        out, pull = vjp(packed, *placed((q, k, v), device))
        out, grads = on_cpu((out, vmap(pull)(cotangents.to(device))))
    for start, stop in layout.ranges():
        T = stop - start
        leaves = [x[:, :, start:stop].clone().requires_grad_() for x in (q, k, v)]
        alone = softmax_attention(*leaves, SCALE, causal(T, T).expand(1, 6, T, T)).transpose(1, 2)
        torch.testing.assert_close(out[:, start:stop], alone, atol=TOLERANCE, rtol=0)
        expected = [torch.autograd.grad(alone, leaves, c[:, start:stop], retain_graph=True) for c in cotangents]
        for i, found in enumerate(grads):
            reference = torch.stack([g[i] for g in expected])
            torch.testing.assert_close(found[:, :, :, start:stop], reference, atol=TOLERANCE, rtol=0)


def test_only_cotangents_can_be_batched():
    """Queries of their own for every cotangent would need another rule: an error, never a wrong answer."""
    q, k, v = tensors(3, 3, 5, 5)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"shared by all of them|vmap support"):
        vmap(lambda q: vjp(lambda k: attention(q, k, v, None, AttentionKind(SCALE, True)), k)[1](draw(B, 3, 5, EV)))(
            torch.stack([q, -q])
        )


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in tensors(3, 3, 5, 5))
    (grad,) = torch.autograd.grad(attention(q, k, v, None, AttentionKind(SCALE, True)).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="eager"):
        grad.sum().backward()


def test_bfloat16_is_about_as_far_from_the_truth_as_attention_written_out(device):
    """Scores and probabilities in float32, the rest in bfloat16: against float64 on the same bfloat16 numbers."""
    T = 40
    q, k, v = (x.bfloat16() for x in tensors(3, 3, T, T))
    cotangents = draw(K, B, 3, T, EV, seed=4).bfloat16()

    def plain(q, k, v):
        scores = torch.where(causal(T, T), SCALE * q @ k.mT, -torch.inf)
        return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v

    def gradients(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = plain(*leaves)
        rows = [torch.autograd.grad(out, leaves, c.to(dtype), retain_graph=True) for c in cotangents]
        return [torch.stack(grads) for grads in zip(*rows, strict=True)]

    kind = AttentionKind(SCALE, True)
    _, pull = vjp(lambda q, k, v: attention(q, k, v, None, kind), *placed((q, k, v), device))
    ours = on_cpu(vmap(pull)(cotangents.to(device)))
    for found, theirs, exact in zip(ours, gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found, exact) < 1.4 * relative(theirs, exact)


@pytest.mark.parametrize("kernel", ["auto", "layerwise", "whole"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_no_operator_of_a_supported_model_falls_back_to_a_loop(family, kernel, device):
    model, rows, layer = fresh(family), prompts((7, 2, 12)), block(family, 0)
    with no_vmap_fallback():
        scores = on(device, fisher_scores)(model, *padded(rows, "left"), layers=layer, top_k=5, kernel=kernel)
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, token_ids=scores.token_ids[b])
        assert relative(scores.gradients[layer][b], expected.gradients) < 1e-6


def test_the_fallback_switch_is_what_it_seems():
    """torch's own fused attention does fall back on a CPU: turned off, it is an error."""
    q, k, _ = (x.float() for x in tensors(3, 3, 5, 5))
    with no_vmap_fallback(), pytest.raises(RuntimeError, match=r"fallback|batching rule"):
        _, pull = vjp(lambda q: torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True), q)
        vmap(pull)(torch.ones(2, *q.shape))


def test_the_interface_passes_on_scale_and_mask():
    q, k, v = tensors(6, 2, 9, 9)
    module = torch.nn.Module()
    module.is_causal = True
    for scaling, mask, allowed in ((None, None, causal(9, 9)), (SCALE, window(9, 9)[None, None], window(9, 9))):
        out, weights = _attention_forward(module, q, k, v, mask, scaling=scaling)
        expected = softmax_attention(q, k, v, E**-0.5 if scaling is None else scaling, allowed.expand(B, 6, 9, 9))
        assert weights is None
        torch.testing.assert_close(out, expected.transpose(1, 2))
