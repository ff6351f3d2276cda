"""A lens reads what plain hooks, a plain softmax and dense Jacobians by autograd say."""

import json

import pytest
import torch
from models import BLOCKS, VOCABULARY, WIDTH, block, fresh, prompts, tiny, word_tokenizer

from fisher_vmap import FisherModel, fisher_scores, steer
from fisher_vmap.lens.jacobian_lens import JacobianLens

IDS = prompts([9])[0]
K = 7


def lens_of(layers=(0, 1, 2), metric=True, width=WIDTH, seed=0):
    """A lens of matrices drawn near the identity, so that every entry counts."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {n: torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5 for n in layers}
    root = torch.randn(width, width, generator=generator) / width**0.5
    return JacobianLens(matrices, 3, root @ root.T if metric else None)


def outputs(model, ids, names):
    """{name: [T, D]} by hooks."""
    seen = {}

    def keep(name):
        def hook(_module, _args, output):
            seen[name] = (output if isinstance(output, torch.Tensor) else output[0])[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def head(model, family, h):
    """Log p of rows of the last block's output, by the model's own modules."""
    if family == "gpt2":
        return model.lm_head(model.transformer.ln_f(h)).log_softmax(-1)
    z = model.lm_head(model.model.norm(h))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)


def plain(model, family, lens, ids, layer, use_jacobian=True):
    """Log p of a lens [T, V], the last block's output [T, D], and where a layer's goes, by length one, [T, D]."""
    seen = outputs(model, ids, [block(family, layer), block(family, -1)])
    h, top = seen[block(family, layer)], seen[block(family, -1)]
    moved = h @ lens.jacobians[layer].to(h).T if use_jacobian else h
    with torch.no_grad():
        return head(model, family, moved), top, moved / h.norm(dim=1, keepdim=True)


CASES = {
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0}),
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
}


def tolerance(family):
    """llama and gemma2 compute their norms in float32, whatever the dtype."""
    return 1e-8 if family == "gpt2" else 2e-5


@pytest.mark.parametrize("use_jacobian", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_readout_is_the_softmax_of_the_head_at_J_h(case, use_jacobian):
    family, changes = CASES[case]
    model, lens, near = tiny(family, **changes), lens_of(), tolerance(family)
    found = lens.readout(model, IDS, top_k=K, use_jacobian=use_jacobian)
    assert found.layers == [0, 1, 2] and torch.equal(found.tokens, IDS)
    for layer in found.layers:
        log_p, top, _ = plain(model, family, lens, IDS, layer, use_jacobian)
        values, ids = log_p.topk(K)
        assert found.log_probs[layer].dtype == torch.float64
        torch.testing.assert_close(found.log_probs[layer], values, rtol=near, atol=near)
        torch.testing.assert_close(log_p.gather(1, found.token_ids[layer]), values, rtol=near, atol=near)
        assert family != "gpt2" or torch.equal(found.token_ids[layer], ids)
    with torch.no_grad():
        own = model(input_ids=IDS[None]).logits[0].log_softmax(1)
    torch.testing.assert_close(head(model, family, top), own, rtol=near, atol=near)
    torch.testing.assert_close(found.model_log_probs, own.topk(K).values, rtol=near, atol=near)


def test_a_neighbouring_position_or_layer_reads_otherwise():
    """The comparison above would see a readout that is off by one."""
    model, lens = tiny("gpt2"), lens_of()
    found = lens.readout(model, IDS, top_k=K)
    for layer in (1, 2):
        log_p = plain(model, "gpt2", lens, IDS, layer)[0].topk(K).values
        below = found.log_probs[layer - 1]
        assert (found.log_probs[layer][1:] - log_p[:-1]).abs().max() > 0.1
        assert (below - log_p).abs().max() > 0.1
    transposed = JacobianLens({n: J.T.contiguous() for n, J in lens.jacobians.items()}, 3)
    assert (transposed.readout(model, IDS, top_k=K).log_probs[1] - found.log_probs[1]).abs().max() > 0.1


@pytest.mark.parametrize("use_jacobian", [True, False])
@pytest.mark.parametrize("case", ["gpt2", "gemma2", "tied"])
def test_the_order_by_kl_is_that_of_the_dense_jacobian(case, use_jacobian):
    family, changes = CASES[case]
    model, lens, near = tiny(family, **changes), lens_of(), 1e-8 if family == "gpt2" else 1e-4
    found = lens.readout(model, IDS, layers=[1, 2], top_k=K, order="kl", use_jacobian=use_jacobian)
    for layer in (1, 2):
        log_p, top, moves = plain(model, family, lens, IDS, layer, use_jacobian)
        shares = []
        for h, u in zip(top, moves, strict=True):
            a_VD = torch.autograd.functional.jacobian(lambda x: head(model, family, x), h)
            shares.append(head(model, family, h).detach().exp() * (a_VD @ u).square() / 2)
        shares = torch.stack(shares)
        torch.testing.assert_close(found.kl[layer], shares.topk(K).values, rtol=near, atol=near * float(shares.max()))
        at = found.token_ids[layer]
        torch.testing.assert_close(shares.gather(1, at), found.kl[layer], rtol=near, atol=near * float(shares.max()))
        torch.testing.assert_close(found.log_probs[layer], log_p.gather(1, at), rtol=2e-5, atol=2e-5)
        assert not torch.equal(at, log_p.topk(K).indices)


def test_all_shares_are_half_the_scores_along_the_step():
    """Above the last block's output nothing but the head comes: the shares are those of the package's scores."""
    model, lens = tiny("gpt2"), lens_of((BLOCKS - 1,))
    found = lens.readout(model, IDS, top_k=VOCABULARY, order="kl", use_jacobian=False)
    h = outputs(model, IDS, [block("gpt2", -1)])[block("gpt2", -1)][-1]
    scores = fisher_scores(model, IDS[None], layers=BLOCKS - 1, positions="last", top_k=VOCABULARY)
    g_VD = scores.gradients[block("gpt2", -1)][0]
    expected = (scores.log_probs[0].exp() * (g_VD @ h / h.norm()).square() / 2).sort(descending=True).values
    torch.testing.assert_close(found.kl[BLOCKS - 1][-1], expected, rtol=1e-8, atol=1e-12)


def test_the_identity_is_the_logit_lens_and_the_last_block_the_model():
    model = tiny("gpt2")
    lens = JacobianLens({n: torch.eye(WIDTH) for n in range(BLOCKS)}, 1)
    one, other = (lens.readout(model, IDS, top_k=K, use_jacobian=how) for how in (True, False))
    for layer in range(BLOCKS):
        torch.testing.assert_close(one.log_probs[layer], other.log_probs[layer], rtol=0, atol=1e-12)
    torch.testing.assert_close(one.log_probs[BLOCKS - 1], one.model_log_probs, rtol=0, atol=1e-12)
    assert torch.equal(one.token_ids[BLOCKS - 1][-1], one.model_token_ids[-1])


def test_positions_in_chunks_read_alike(monkeypatch):
    model, lens = tiny("gpt2"), lens_of()
    for order in ("logit", "kl"):
        whole = lens.readout(model, IDS, top_k=K, order=order)
        with monkeypatch.context() as patched:
            patched.setattr("fisher_vmap.lens.reading.LOGITS_AT_ONCE", {"cpu": 4 * VOCABULARY})
            patched.setattr("fisher_vmap.model.head.VOCABULARY_CHUNK_ELEMENTS", {"cpu": 10 * WIDTH})
            parts = lens.readout(model, IDS, top_k=K, order=order)
        assert torch.equal(whole.token_ids[1], parts.token_ids[1])
        torch.testing.assert_close(whole.log_probs[1], parts.log_probs[1], rtol=0, atol=1e-10)


def test_a_prompt_of_one_token_and_a_half_precision_model():
    model, lens = tiny("llama", torch.bfloat16), lens_of()
    fisher = FisherModel(model, layers=1, precision="model")
    found = lens.readout(fisher, [5], top_k=K)
    assert found.log_probs[2].dtype == torch.float32 and found.log_probs[2].shape == (1, K)
    wide = lens.readout(fresh("llama", torch.float32), IDS, top_k=K)
    assert (lens.readout(fisher, IDS, top_k=K).log_probs[2] - wide.log_probs[2]).abs().max() < 0.2


def test_it_reads_a_steered_model_and_leaves_it_as_it_was():
    model, lens = fresh("gpt2"), lens_of()
    before = lens.readout(model, IDS, top_k=K)
    with steer(model, 1, torch.ones(WIDTH), 20.0, residual_norm=1.0):
        inside = lens.readout(model, IDS, top_k=K)
    after = lens.readout(model, IDS, top_k=K)
    assert torch.equal(before.log_probs[0], inside.log_probs[0])
    assert (before.log_probs[1] - inside.log_probs[1]).abs().max() > 0.1
    assert torch.equal(before.log_probs[1], after.log_probs[1])


def test_texts_and_json():
    model, tokenizer, lens = tiny("llama"), word_tokenizer(), lens_of()
    found = lens.readout(model, "w3 w5 w8", tokenizer=tokenizer, layers=1, top_k=3, order="kl")
    same = lens.readout(FisherModel(model, tokenizer, layers=0), [{"role": "user", "content": "w3 w5 w8"}], top_k=3)
    assert torch.equal(found.tokens, same.tokens) and found.text == "w3 w5 w8"
    told = json.loads(json.dumps(found.as_json(tokenizer)))
    assert list(told) == ["text", "tokens", "layers", "top", "kl", "model"]
    assert told["tokens"] == [" w3", " w5", " w8"] and told["layers"] == [1]  # each as after another word
    token, value = told["top"]["1"][2][0]
    assert token == found.top_tokens(tokenizer, 1)[1][2][0] == " " + tokenizer.decode([int(found.token_ids[1][2, 0])])
    assert value == round(float(found.log_probs[1][2, 0]), 4)
    assert told["kl"]["1"][2][0] == [token, pytest.approx(float(found.kl[1][2, 0]), rel=1e-3)]
    assert len(told["model"]) == 3 and len(told["model"][0]) == 3
    plain_ids = lens.readout(model, found.tokens[None], top_k=3).as_json(tokenizer)
    assert plain_ids["text"] is None and plain_ids["kl"] == {} and list(plain_ids["top"]) == ["0", "1", "2"]


def test_sensitivity_is_that_of_the_dense_matrix():
    lens = lens_of()
    J, C = lens.jacobians[1].double(), lens.metric.double()
    v = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack([x @ J.T @ C @ J @ x / (x @ x) / 2 for x in v])
    torch.testing.assert_close(lens.sensitivity(v, 1), expected, rtol=1e-12, atol=0)
    assert isinstance(lens.sensitivity(v[0].numpy(), 1), float)
    assert lens.sensitivity(-3 * v[0], 1) == pytest.approx(float(expected[0]), rel=1e-12)
    found = lens.sensitive_directions(1, 3)
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(lens.sensitivity(found.directions, 1), found.kl, rtol=1e-10, atol=0)
    singular = torch.linalg.svdvals(torch.linalg.cholesky(C + 1e-14 * torch.eye(WIDTH)).T @ J)[:3]
    torch.testing.assert_close(found.kl, singular.square() / 2, rtol=1e-6, atol=0)


def test_sensitivity_at_the_last_block_is_the_measured_kl():
    """With J = I and the metric C of one position, a small step there has that KL."""
    model = tiny("gpt2")
    h = outputs(model, IDS, [block("gpt2", -1)])[block("gpt2", -1)][-1]
    a_VD = torch.autograd.functional.jacobian(lambda x: head(model, "gpt2", x), h)
    with torch.no_grad():
        log_p = head(model, "gpt2", h)
        metric = (a_VD.T * log_p.exp()) @ a_VD
        v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        kl = (log_p.exp() * (log_p - head(model, "gpt2", h + 1e-4 * v / v.norm()))).sum()
    lens = JacobianLens({BLOCKS - 1: torch.eye(WIDTH, dtype=torch.float64)}, 1, metric)
    assert 1e-8 * lens.sensitivity(v, BLOCKS - 1) == pytest.approx(float(kl), rel=1e-3)


def refused(message, function):
    with pytest.raises(ValueError, match=message) as caught:
        function()
    assert "\n" not in str(caught.value)


def test_what_a_lens_cannot_read():
    model, lens = tiny("gpt2"), lens_of()
    refused("layer 3 has no lens", lambda: lens.readout(model, IDS, layers=[1, 3]))
    refused("layer 9 was asked for", lambda: lens.readout(model, IDS, layers=9, use_jacobian=False))
    refused("the lens is 20 wide, this model's blocks 36", lambda: lens_of(width=20).readout(model, IDS))
    refused("order is 'rank'", lambda: lens.readout(model, IDS, order="rank"))
    refused("top_k is 0", lambda: lens.readout(model, IDS, top_k=0))
    refused("no tokenizer", lambda: lens.readout(model, "w1 w2"))
    refused("reads one prompt", lambda: lens.readout(model, ["w1", "w2"], tokenizer=word_tokenizer()))
    refused("has its own", lambda: lens.readout(FisherModel(model, layers=0), IDS, tokenizer=word_tokenizer()))
    refused("expected token ids", lambda: lens.readout(model, torch.stack([IDS, IDS])))
    refused("expected token ids", lambda: lens.readout(model, []))
    refused("input_ids run from", lambda: lens.readout(model, [5, VOCABULARY]))
    refused("k is 9", lambda: lens.readout(model, IDS, top_k=3).top_tokens(word_tokenizer(), 9))


def test_what_has_no_sensitivity():
    lens = lens_of()
    refused("has no metric", lambda: lens_of(metric=False).sensitivity(torch.ones(WIDTH), 1))
    refused("has no metric", lambda: lens_of(metric=False).sensitive_directions(1, 2))
    refused("layer 3 has no lens", lambda: lens.sensitivity(torch.ones(WIDTH), 3))
    refused("expected \\[36\\] or", lambda: lens.sensitivity(torch.ones(WIDTH + 1), 1))
    refused("zero or not finite", lambda: lens.sensitivity(torch.zeros(2, WIDTH), 1))
    refused("count is 37", lambda: lens.sensitive_directions(1, WIDTH + 1))
