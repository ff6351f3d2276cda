"""Soft-caps, windows, sinks and constant early keys in attention, against the plain formula by autograd, in float64."""

import itertools

import pytest
import torch
from attention_cases import EV, SCALE, B, E, K, causal, draw, no_vmap_fallback, tensors
from models import fresh, prompts
from oracles import softmax_attention
from torch.func import jvp, vjp, vmap

from fisher_vmap.kernels.attention import AttentionKind, attention, attention_to_live
from fisher_vmap.kernels.hf_attention import (
    NAME,
    Among,
    UnsupportedAttention,
    _attention_forward,
    _mask,
    attending_among,
    attention_set_to,
    noting_calls,
    prompts_packed,
)
from fisher_vmap.model.groups import group_prompts
from fisher_vmap.model.layout import first_live, first_target, lay_out, narrowed, pack_rows
from fisher_vmap.model.recording import KeptKeys

TOLERANCE = 1e-11
H, G = 6, 2
SINKS = torch.linspace(-1, 2, H, dtype=torch.float64)


def windowed(T: int, S: int, window: int | None) -> torch.Tensor:
    seen = causal(T, S)
    return seen if window is None else seen & (torch.arange(S) > torch.arange(T)[:, None] + (S - T) - window)


def derivatives(function, inputs, cotangents, tangents):
    """The value, K pullbacks and K pushforwards at once, and of the first one each without vmap."""
    with torch.no_grad(), no_vmap_fallback():
        out, pull = vjp(function, *inputs)
        pulled = vmap(pull)(cotangents)
        moved = vmap(lambda *t: jvp(function, inputs, t)[1])(*tangents)
        one, one_moved = pull(cotangents[0]), jvp(function, inputs, tuple(t[0] for t in tangents))[1]
    for found, alone in zip((*pulled, moved), (*one, one_moved), strict=True):
        torch.testing.assert_close(found[0], alone, atol=TOLERANCE, rtol=0)
    return out, pulled, moved


def assert_as_plain(function, plain, inputs):
    """Two functions of the same inputs agree in value, pullbacks and pushforwards."""
    expected = plain(*inputs)
    cotangents = draw(K, *expected.shape, seed=4)
    tangents = tuple(draw(K, *x.shape, seed=20 + i) for i, x in enumerate(inputs))
    leaves = [x.clone().requires_grad_() for x in inputs]
    rows = [torch.autograd.grad(plain(*leaves), leaves, c) for c in cotangents]
    out, pulled, moved = derivatives(function, inputs, cotangents, tangents)
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=0)
    for i, found in enumerate(pulled):
        torch.testing.assert_close(found, torch.stack([row[i] for row in rows]), atol=TOLERANCE, rtol=0)
    plainly = vmap(lambda *t: jvp(plain, inputs, t)[1])(*tangents)
    torch.testing.assert_close(moved, plainly, atol=TOLERANCE, rtol=0)


FEATURES = [f for f in itertools.product((None, 1.5), (None, 1, 5, 40), (None, SINKS)) if any(x is not None for x in f)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "S"), [(37, 37), (20, 97), (1, 9)])
@pytest.mark.parametrize(("softcap", "window", "sinks"), FEATURES)
def test_features(softcap, window, sinks, T, S, masked, block_elements):
    """The window by its width, or by a mask, beside which its width says nothing."""
    q, k, v = tensors(H, G, T, S)
    allowed = windowed(T, S, window).expand(B, H, T, S)
    mask = allowed[:1, :1] if masked else None
    kind = AttentionKind(SCALE, True, softcap=softcap, window=3 if masked else window)

    def plain(q, k, v):
        return softmax_attention(q, k, v, SCALE, allowed, softcap=softcap, sinks=sinks)

    assert_as_plain(lambda q, k, v: attention(q, k, v, mask, kind, sinks), plain, (q, k, v))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("T", "S", "first"), [(37, 37, 30), (20, 97, 77), (20, 97, 60), (1, 9, 8), (5, 9, 0)])
def test_early_keys_are_constants(T, S, first, softcap, window, block_elements):
    q, k, v = tensors(H, G, T, S)
    kind = AttentionKind(SCALE, True, first_live=first, softcap=softcap, window=window)
    allowed = windowed(T, S, window).expand(B, H, T, S)

    def plain(q, k_live, v_live):
        every = (torch.cat((x[:, :, :first], live), 2) for x, live in ((k, k_live), (v, v_live)))
        return softmax_attention(q, *every, SCALE, allowed, softcap=softcap)

    def ours(q, k_live, v_live):
        return attention_to_live((q, k_live, v_live), (k, v), None, kind)

    assert_as_plain(ours, plain, (q, k[:, :, first:].contiguous(), v[:, :, first:].contiguous()))


LENGTHS, STARTS = (9, 1, 20, 11, 8), (7, 0, 12, 4, 3)
ALIKE = (9, 9, 20, 20, 20), (4, 4, 12, 12, 12)  # neighbours of one length; the live ones are alike, too
UNLIKE = (9, 9, 20, 9, 9), (4, 3, 12, 4, 4)


@pytest.mark.parametrize(("lengths", "starts"), [(LENGTHS, STARTS), ALIKE, UNLIKE])
@pytest.mark.parametrize("alone_from", [{"cpu": 1}, {"cpu": 10}, {}])
@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("only_targets", [False, True])
def test_packed_prompts_at_some_rows(
    monkeypatch, only_targets, window, sinks, alone_from, block_elements, lengths, starts
):
    """Live keys of some rows, queries of the same or the last ones, through the function that the models call."""
    monkeypatch.setattr("fisher_vmap.model.layout.ALONE_FROM", alone_from)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    bias = (torch.arange(max(lengths)) >= torch.tensor(starts)[:, None]).long()
    layout = pack_rows(lay_out(ids, mask, bias))
    live, columns = narrowed(layout, first_live(layout))
    queries = narrowed(live, first_target(live))[0] if only_targets else live
    asked = torch.cat([torch.arange(z - n, z) for (_, z), n in zip(layout.ranges(), queries.lengths, strict=True)])
    N, module = sum(lengths), torch.nn.Module()
    q, k, v = (x[:1] for x in tensors(H, G, N, N))
    among = Among.of(layout, live, columns, queries)
    marker = None if window is None else torch.empty(1, 1, 0, window, dtype=torch.bool)

    def ours(q, k_live, v_live):
        wanted = (k_live, v_live) if only_targets else None
        given = [x[:, :, : q.shape[2]] for x in (k_live, v_live)] if only_targets else (k_live, v_live)
        with prompts_packed(layout), attending_among(among, [KeptKeys(module, 1 * k, 1 * v)], wanted):
            return _attention_forward(module, q, *given, marker, scaling=SCALE, s_aux=sinks)[0].transpose(1, 2)

    def plain(q, k_live, v_live):
        every = [x.index_copy(2, columns, live) for x, live in ((k, k_live), (v, v_live))]
        out, first = [], 0
        for (a, z), n in zip(layout.ranges(), queries.lengths, strict=True):
            seen = windowed(n, z - a, window).expand(1, H, n, z - a)
            keys = (x[:, :, a:z] for x in every)
            out.append(softmax_attention(q[:, :, first : first + n], *keys, SCALE, seen, sinks=sinks))
            first += n
        return torch.cat(out, 2)

    assert_as_plain(ours, plain, (q[:, :, asked], k[:, :, columns], v[:, :, columns]))


def test_when_all_rows_are_live_nothing_is_split():
    ranges = [(0, 5), (5, 6), (6, 10)]
    for group in group_prompts(ranges, torch.device("cpu")):
        assert group.queries is group.keys is group.live and group.mask is None and group.first_live == 0
    one = group_prompts([(4, 5)], torch.device("cpu"), [(2, 3)], [(2, 3)])[0]  # a single row, numbered anew
    assert (one.keys.single, one.live.single, one.queries.single) == ((4, 5), (2, 3), (2, 3))


@pytest.mark.parametrize("alone_from", [{"cpu": 1}, {"cpu": 10}, {}])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 7, 12, 12), (7, 12, 7, 12, 12), (12, 7, 7, 1, 1)])
def test_neighbours_of_one_length_attend_without_a_copy(lengths, alone_from, monkeypatch):
    """Every row is in one group, at its prompt and column; the forward is each prompt's alone."""
    monkeypatch.setattr("fisher_vmap.model.layout.ALONE_FROM", alone_from)
    stops = torch.tensor(lengths).cumsum(0).tolist()
    ranges = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    groups = group_prompts(ranges, torch.device("cpu"), alike=True)
    N = stops[-1]
    q, k, v = (x[:1] for x in tensors(H, G, N, N))
    found, rows_found = q.new_empty(*q.shape[:3], v.shape[3]), torch.full((N, 2), -1)
    for group in groups:
        x = group.queries
        asked = x.take(q)
        assert asked.shape[:3:2] == x.rows.shape
        if x.even is not None:
            assert asked.data_ptr() == q[:, :, x.even[0] :].data_ptr()  # a view
        (b, T), seen = x.rows.shape, causal(*[x.rows.shape[1]] * 2)
        out = softmax_attention(asked, x.take(k), x.take(v), SCALE, seen.expand(b, H, T, T))
        x.put(found, out)
        torch.testing.assert_close(x.take_rows(q[0].movedim(1, 0)), asked.movedim(2, 1))
        x.put_rows(rows_found, torch.stack([x.rows, x.rows], 2))
    assert rows_found[:, 0].tolist() == list(range(N))
    for a, z in ranges:
        alone = softmax_attention(*(x[:, :, a:z] for x in (q, k, v)), SCALE, causal(z - a, z - a).expand(1, H, -1, -1))
        torch.testing.assert_close(found[:, :, a:z], alone)
    if alone_from == {"cpu": 1}:
        assert max(len(group.queries.rows) for group in groups) == {3: 3, 4: 2, 5: 2}[len(lengths)]


def _masks(function, **more):
    return _mask(batch_size=1, q_length=13, kv_length=13, mask_function=function, **more)


def test_a_window_reaches_attention_as_a_mask_and_no_other_mask_passes_for_one():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    layout = pack_rows(lay_out(torch.zeros(2, 9, dtype=torch.int64), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])))
    shifted = lambda b, h, q, k: sliding_window_causal_mask_function(4)(b, h, q, k - 1)  # noqa: E731
    with prompts_packed(layout):
        assert _masks(sliding_window_causal_mask_function(9), local_size=9) is None
        assert _masks(sliding_window_causal_mask_function(4), local_size=4).shape == (1, 1, 0, 4)
        for other in (chunked_causal_mask_function(4, torch.zeros(1)), shifted, None):
            with pytest.raises(UnsupportedAttention, match="not a sliding window"):
                _masks(other, local_size=4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_calls_are_noted_with_what_they_compute_from(family):
    model, row = fresh(family), prompts((9,))[0][None]
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    layout = pack_rows(lay_out(row, None))
    calls = []
    with torch.no_grad(), attention_set_to(model, NAME), prompts_packed(layout), noting_calls(calls.append):
        model(input_ids=row, position_ids=layout.position_ids, use_cache=False)
    assert [call.module for call in calls] == [block.self_attn for block in model.model.layers]
    windows = [4 if "sliding" in kind else None for kind in model.config.layer_types]
    assert [call.kind.window for call in calls] == windows
    assert all(call.q.shape == (1, 6, 9, E) and call.k.shape == (1, 2, 9, E) for call in calls)
    assert all(call.kind.groups is None for call in calls)
    if family == "gemma2":
        assert {call.kind.softcap for call in calls} == {model.config.attn_logit_softcapping}
    else:
        assert all(torch.equal(call.sinks, call.module.sinks) for call in calls)


def test_sinks_of_another_shape_are_refused():
    q = draw(1, 2, 3, EV)
    _attention_forward(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(UnsupportedAttention, match="s_aux of shape"):
        _attention_forward(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(3))
