"""Hand-written forward derivatives: against the Jacobian of the plain formula, and as adjoint to their pullbacks."""

import pytest
import torch
from attention_cases import SCALE, causal, draw, no_vmap_fallback, packed_prompts, tensors, window
from models import padded, prompts, tiny
from oracles import relative, softmax_attention
from torch.func import jacrev, jvp, vjp, vmap

from fisher_vmap.kernels.attention import AttentionKind, attention
from fisher_vmap.kernels.decoder_block import fused_forward
from fisher_vmap.kernels.hf_attention import (
    NAME,
    Among,
    _attention_forward,
    attending_among,
    attention_set_to,
    prompts_packed,
)
from fisher_vmap.kernels.rotary_attention import fused_attention_forward
from fisher_vmap.model import layout as layout_module
from fisher_vmap.model.layout import first_target, lay_out, narrowed, pack_rows

K, TOLERANCE = 4, 1e-11


def push(function, inputs, tangents):
    """K tangents at once, under no_grad and without a loop behind the scenes."""
    with torch.no_grad(), no_vmap_fallback():
        return vmap(lambda *t: jvp(function, inputs, t)[1])(*tangents)


def jacobian_push(function, inputs, tangents):
    """The same by the full Jacobian of a function that autograd knows all about."""
    jacobians = jacrev(function, argnums=tuple(range(len(inputs))))(*inputs)
    out = 0
    for J, x, t in zip(jacobians, inputs, tangents, strict=True):
        out = out + torch.einsum("kx,...x->k...", t.flatten(1), J.flatten(J.dim() - x.dim()))
    return out


@pytest.mark.parametrize(("H", "G"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("masked", ["causal", "none", "window", "added", "more keys"])
def test_attention(H, G, masked, block_elements):
    T, S = (20, 20) if masked != "more keys" else (12, 20)
    q, k, v = (x[:1] for x in tensors(H, G, T, S))
    mask, allowed = None, causal(T, S)
    if masked == "none":
        allowed = torch.ones(T, S, dtype=torch.bool)
    elif masked == "window":
        mask = allowed = window(T, S)
    elif masked == "added":
        mask = allowed = torch.where(window(T, S), draw(T, S, seed=7), -torch.inf)
    kind = AttentionKind(SCALE, masked in ("causal", "more keys"))
    tangents = tuple(draw(K, *x.shape, seed=20 + i) for i, x in enumerate((q, k, v)))

    def plain(q, k, v):
        return softmax_attention(q, k, v, SCALE, allowed.expand(1, H, T, S))

    found = push(lambda q, k, v: attention(q, k, v, mask, kind), (q, k, v), tangents)
    torch.testing.assert_close(found, jacobian_push(plain, (q, k, v), tangents), atol=TOLERANCE, rtol=0)
    for i in range(3):  # one of the three alone, and a single tangent without vmap
        only = [torch.zeros_like(t) if j != i else t for j, t in enumerate(tangents)]
        inputs = [q, k, v]

        def of_one(x, i=i, inputs=inputs):
            return attention(*inputs[:i], x, *inputs[i + 1 :], mask, kind)

        expected = jacobian_push(plain, (q, k, v), only)
        found = push(of_one, (inputs[i],), (tangents[i],))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        with torch.no_grad():
            _, one = jvp(of_one, (inputs[i],), (tangents[i][0],))
        torch.testing.assert_close(one, expected[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lengths", [(5, 1, 20, 11), (7, 7, 8, 6, 1), (17,)])
def test_prompts_laid_end_to_end_do_not_see_one_another(lengths):
    layout = pack_rows(lay_out(*padded(prompts(lengths), "right")))
    module, N = torch.nn.Module(), sum(lengths)
    q, k, v = (x[:1] for x in tensors(6, 2, N, N))
    tangents = tuple(draw(K, *x.shape, seed=20 + i) for i, x in enumerate((q, k, v)))
    last = layout.target_rows(q.device)
    among = Among.of(layout, layout, None, narrowed(layout, first_target(layout))[0])
    with prompts_packed(layout):
        found = push(lambda q, k, v: _attention_forward(module, q, k, v, None, scaling=SCALE)[0], (q, k, v), tangents)

        def last_queries(q, k, v):
            with attending_among(among, live=(k, v)):
                own = (x[:, :, last] for x in (q, k, v))
                return _attention_forward(module, *own, None, scaling=SCALE)[0]

        found_last = push(last_queries, (q, k, v), tangents)
    for b, (start, stop) in enumerate(layout.ranges()):
        T = stop - start

        def alone(q, k, v, T=T):
            return softmax_attention(q, k, v, SCALE, causal(T, T).expand(1, 6, T, T)).transpose(1, 2)

        inputs, own = ([x[..., start:stop, :] for x in xs] for xs in ((q, k, v), tangents))
        expected = jacobian_push(alone, tuple(inputs), own)
        torch.testing.assert_close(found[:, :, start:stop], expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found_last[:, :, b], expected[:, :, -1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.input_layernorm"),
        ("gemma2", "model.layers.1.post_feedforward_layernorm"),
        ("gpt2", "transformer.h.1.ln_2"),
        ("llama", "model.layers.1.mlp"),
        ("gemma2", "model.layers.2.mlp"),
        ("gpt2", "transformer.h.1.mlp"),
        ("phi", "model.layers.1.mlp"),
    ],
)
def test_norms_and_mlps(family, name):
    dtype = torch.float64 if family == "gpt2" or name.endswith("mlp") else torch.float32  # in any case float32 inside
    module = tiny(family, dtype).get_submodule(name)
    forward = fused_forward(module)
    x, tangents = (1.5 * draw(2, 5, 36) + 0.3).to(dtype), draw(K, 2, 5, 36, seed=1).to(dtype)
    expected = jacobian_push(lambda x: module(x), (x,), (tangents,))
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    assert relative(push(forward, (x,), (tangents,)), expected) < exact


@pytest.mark.parametrize("alone_from", [1, None])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_whole_attention_module_pushes_as_it_pulls(monkeypatch, family, alone_from):
    """u . (J v) = (J^T u) . v, on packed prompts; the pullback has its own test against each prompt alone."""
    monkeypatch.setattr(layout_module, "ALONE_FROM", {} if alone_from is None else {"cpu": alone_from})
    model = tiny(family)
    layout, D = packed_prompts(), model.config.hidden_size
    N = layout.input_ids.numel()
    x, v, u = draw(1, N, D), draw(K, 1, N, D, seed=1), draw(3, 1, N, D, seed=2)
    rotary = model.model.rotary_emb(x, layout.position_ids)
    fused = fused_attention_forward(model.model.layers[1].self_attn)

    def module(x):
        return fused(hidden_states=x, position_embeddings=rotary)[0]

    with attention_set_to(model, NAME), prompts_packed(layout):
        moved = push(module, (x,), (v,))
        with torch.no_grad():
            (pulled,) = vmap(vjp(module, x)[1])(u)
    left, right = u.flatten(1) @ moved.flatten(1).T, pulled.flatten(1) @ v.flatten(1).T
    assert relative(left, right) < 1e-12 and left.abs().min() > 1e-6


def test_bfloat16_is_about_as_far_from_the_truth_as_attention_written_out():
    T = 40
    q, k, v = (x.bfloat16() for x in tensors(3, 3, T, T))
    tangents = tuple(draw(K, *x.shape, seed=20 + i).bfloat16() for i, x in enumerate((q, k, v)))

    def plain(q, k, v):
        scores = torch.where(causal(T, T), SCALE * q @ k.mT, -torch.inf)
        return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v

    def truth(dtype):
        inputs, own = (tuple(x.to(dtype) for x in xs) for xs in ((q, k, v), tangents))
        return vmap(lambda *t: jvp(plain, inputs, t)[1])(*own)

    ours = push(lambda q, k, v: attention(q, k, v, None, AttentionKind(SCALE, True)), (q, k, v), tangents)
    exact, theirs = truth(torch.float64), truth(torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 1.4 * relative(theirs, exact)
