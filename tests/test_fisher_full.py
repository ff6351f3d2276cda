"""The Fisher matrix of the whole vocabulary: against the Hessian of the KL divergence, and the best possible."""

import pytest
import torch
from devices import on
from models import VOCABULARY, WIDTH, block, fresh, padded, prompts, tiny
from oracles import dense_svd, kl_hessian, linear_fisher, plain_scores, position_scores, relative
from torch import nn
from toys import LinearLM, ToyLM
from toys.chains import Looped
from toys.functions import NoForward, WrongForward
from toys.heads import ScaledTwice
from toys.state import LateStateful

from fisher_vmap import FisherModel, compress, fisher_full, fisher_scores
from fisher_vmap.decomposition import quality
from fisher_vmap.linearize.linear_map import LinearMap

LENGTHS = (5, 1, 8)
# transformers' own eager attention, which the Hessian needs, is float32 inside but for gpt2's.
EXACT = {"gpt2": 1e-8, "gpt_neox": 1e-6, "llama": 1e-5, "gemma2": 1e-5, "cohere": 1e-5}

# As many vectors as the width is take no search. With one fewer the search itself is exact: a norm hides a direction.
EVERY = [WIDTH - 1, WIDTH]


def hessians(family, layer, rows):
    """F of each prompt by the second derivative, on a model of its own whose attention can be differentiated twice."""
    model = fresh(family)
    model.set_attn_implementation("eager")
    return [kl_hessian(model, row, layer) for row in rows]


def best_error(F, rank):
    """The relative error of the best matrix of a rank [Eckart and Young]."""
    S, _ = dense_svd(F)
    return float(S[rank:].norm() / S.norm())


def cut(factor, rank):
    low = compress(factor[None], rank)
    return (low.vectors[0].T * low.singular_values[0]) @ low.vectors[0]


@pytest.mark.parametrize("vectors", EVERY)
@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("kernel", ["auto", "layerwise", "whole"])
@pytest.mark.parametrize("family", EXACT)
def test_with_vectors_for_every_direction_it_is_the_exact_matrix(family, kernel, number, vectors, device):
    model, layer, rows = tiny(family), block(family, number), prompts(LENGTHS)
    ids, mask = padded(rows, "left", extra=1)
    found = on(device, fisher_full)(model, ids, mask, layers=layer, rank=vectors, oversampling=0, kernel=kernel)
    for A, F in zip(found.factors[layer], hessians(family, layer, rows), strict=True):
        assert relative(A.T @ A, F) < EXACT[family]


@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
def test_the_exact_matrices_of_all_layers_take_one_pullback(kernel, monkeypatch):
    pulls, pull = [], LinearMap.pull

    def counted(self, cotangents, *args):
        pulls.append(cotangents.shape[1])
        return pull(self, cotangents, *args)

    layers, rows = [block("gpt2", number) for number in (0, 2)], prompts(LENGTHS)
    fisher_full(tiny("gpt2"), *padded(rows, "left"), layers=layers, rank=1, kernel=kernel)  # proves J adjoint to J^T
    monkeypatch.setattr(LinearMap, "pull", counted)
    monkeypatch.setattr(LinearMap, "push", None)
    found = fisher_full(tiny("gpt2"), *padded(rows, "left"), layers=layers, rank=WIDTH - 6, kernel=kernel, audit="off")
    assert pulls == [WIDTH]
    for layer in layers:
        for b, F in enumerate(hessians("gpt2", layer, rows)):
            A = found.factors[layer][b]
            assert relative(A.T @ A, F) < EXACT["gpt2"]
        assert found.remainder[layer].shape == (len(rows), 4, WIDTH)
        assert not found.remainder[layer].any()  # nothing is lacking


@pytest.mark.parametrize("rank", [2, 5, 10])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_small_rank_is_within_a_tenth_of_the_best(family, rank, device):
    layer, rows = block(family, 1), prompts((5, 9, 14, 3))
    found = on(device, fisher_full)(tiny(family), *padded(rows, "right"), layers=layer, rank=rank)
    for A, F in zip(found.factors[layer], hessians(family, layer, rows), strict=True):
        assert A.shape == (rank + 6, WIDTH)
        assert best_error(F, rank) > 0.02  # there is something to miss
        assert relative(cut(A, rank), F) < 1.1 * best_error(F, rank)
        assert torch.linalg.eigvalsh(F - A.T @ A).min() > -1e-5 * float(F.trace())  # it never exceeds F


def test_more_passes_come_nearer():
    layer, rows = block("gpt2", 1), prompts((9,))
    (F,) = hessians("gpt2", layer, rows)
    errors = []
    for passes in (1, 2, 3):
        found = fisher_full(tiny("gpt2"), rows[0][None], layers=layer, rank=5, oversampling=0, passes=passes)
        errors.append(relative(cut(found.factors[layer][0], 5), F))
    assert errors[0] > errors[1] > errors[2] > best_error(F, 5)
    assert errors[2] < 1.1 * best_error(F, 5)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
def test_a_linear_model_in_closed_form(kernel, number):
    model, layer, rows = LinearLM(), f"blocks.{number}", prompts(LENGTHS)
    found = fisher_full(model, *padded(rows, "right"), layers=layer, rank=WIDTH, kernel=kernel)
    for A, row in zip(found.factors[layer], rows, strict=True):
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, -1]
        expected = linear_fisher(model.jacobian(number), model.unembed.weight.detach(), logits)
        assert relative(A.T @ A, expected) < 1e-10
        fewer = fisher_full(model, row[None], layers=layer, rank=5, oversampling=WIDTH - 6, kernel=kernel)
        assert relative(cut(fewer.factors[layer][0], 5), expected) < 1.01 * best_error(expected, 5)


def test_a_head_that_cannot_be_taken_apart():
    model, layer, rows = ScaledTwice(), "blocks.1", prompts(LENGTHS)
    found = fisher_full(model, *padded(rows, "right"), layers=layer, rank=WIDTH, oversampling=0, passes=2)
    small = fisher_full(model, *padded(rows, "right"), layers=layer, rank=5)
    for A, A_small, row in zip(found.factors[layer], small.factors[layer], rows, strict=True):
        F = kl_hessian(model, row, layer)
        assert relative(A.T @ A, F) < 1e-8
        assert relative(cut(A_small, 5), F) < 1.1 * best_error(F, 5)


@pytest.mark.parametrize("vectors", EVERY)
@pytest.mark.parametrize("kernel", ["auto", "whole"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_blocks_that_are_called_twice(kernel, number, vectors):
    model, layer, rows = Looped(), f"blocks.{number}", prompts(LENGTHS)
    found = fisher_full(model, *padded(rows, "right"), layers=layer, rank=vectors, oversampling=0, kernel=kernel)
    other = fisher_full(
        model,
        *padded(rows, "right"),
        layers=[f"blocks.{(number - 1) % 4}", layer],
        rank=vectors,
        oversampling=0,
        kernel=kernel,
    )
    for b, row in enumerate(rows):
        F = plain_scores(model, row, layer).fisher
        for A in (found.factors[layer][b], other.factors[layer][b]):
            assert relative(A.T @ A, F) < 1e-8


def test_state_that_begins_after_the_proof_is_caught_in_its_batch(caplog):
    model, layer, rows = LateStateful(), "blocks.0", prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    fisher_full(model, ids, mask, layers=layer, rank=5)
    model.blocks[2].faulty = True
    found = fisher_full(model, ids, mask, layers=layer, rank=WIDTH - 1, oversampling=0, passes=2)
    assert "given up from here on: it broke off: the replay of blocks.2" in caplog.text
    for A, row in zip(found.factors[layer], rows, strict=True):
        assert relative(A.T @ A, plain_scores(model, row, layer).fisher) < 1e-8
    with pytest.raises(ValueError, match=r"disagrees|broke off|cannot be trusted"):
        fisher_full(model, ids, mask, layers=layer, kernel="layerwise")


def test_several_layers_and_modules_of_two_forms():
    model, rows, names = tiny("gpt2"), prompts(LENGTHS), [block("gpt2", 2), "transformer.h.1.mlp", block("gpt2", 0)]
    ids, mask = padded(rows, "left")
    together = fisher_full(model, ids, mask, layers=names, rank=6, top_k=4)
    assert list(together.factors) == list(together.loadings) == list(together.remainder) == names
    for name in names:
        alone = fisher_full(model, ids, mask, layers=name, rank=6, top_k=4)
        F, G = (x.mT @ x for x in (together.factors[name], alone.factors[name]))
        assert relative(F, G) < 1e-9
        assert relative(together.position_energy[name], alone.position_energy[name]) < 1e-9
        assert relative(together.residual_norm[name], alone.residual_norm[name]) < 1e-12
        assert relative(together.remainder[name], alone.remainder[name]) < 1e-6


@pytest.mark.parametrize("vectors", EVERY)
@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
def test_the_bias_at_the_last_position_or_where_a_mask_says(kernel, vectors, device):
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts((7, 4, 9))
    ids, mask = padded(rows, "left", extra=1)
    some = [torch.arange(len(row)) % 3 == 1 for row in rows]
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[mask == 1] = torch.cat(some)
    for positions, chosen in (("last", [torch.arange(len(r)) == len(r) - 1 for r in rows]), (where, some)):
        options = {"positions": positions, "kernel": kernel}
        found = on(device, fisher_full)(model, ids, mask, layers=layer, rank=vectors, oversampling=0, **options)
        for b, row in enumerate(rows):
            F = plain_scores(model, row, layer, where_T=chosen[b]).fisher
            A = found.factors[layer][b]
            assert relative(A.T @ A, F) < 1e-8
            energy = found.position_energy[layer][b, mask[b] == 1]
            assert (energy[chosen[b]] > 0).all() and (energy[~chosen[b]] == 0).all()


@pytest.mark.parametrize("vectors", EVERY)
def test_the_position_energy_is_the_trace_of_each_positions_own_matrix(vectors):
    model, layer, (row,) = tiny("gpt2"), block("gpt2", 1), prompts((6,))
    found = fisher_full(model, row[None], layers=layer, rank=vectors, oversampling=0)
    log_p = plain_scores(model, row, layer).log_probs
    every = plain_scores(model, row, layer).token_ids
    grads_KTD = position_scores(model, row, layer, every)
    # Directions that the sum over positions does not see are not in A: the energy is at most that of all tokens.
    expected = torch.einsum("k,ktd->t", log_p.exp(), grads_KTD**2)
    energy = found.position_energy[layer][0]
    assert (energy <= expected * (1 + 1e-9)).all()
    torch.testing.assert_close(energy, expected, rtol=0.02, atol=0)


def test_a_prompt_does_not_depend_on_its_neighbours():
    model, layer, rows = tiny("llama", torch.float32), block("llama", 1), prompts((7, 2, 15, 9, 1))
    together = fisher_full(model, *padded(rows, "right"), layers=layer, rank=4)
    order = [3, 0, 4, 2, 1]
    permuted = fisher_full(model, *padded([rows[b] for b in order], "left"), layers=layer, rank=4)
    for b, row in enumerate(rows):
        alone = fisher_full(model, row[None], layers=layer, rank=4)
        F = cut(alone.factors[layer][0], 4)
        for other, at in ((together, b), (permuted, order.index(b))):
            assert relative(cut(other.factors[layer][at], 4), F) < 1e-4
            assert relative(other.remainder[layer][at], alone.remainder[layer][0]) < 1e-3


@pytest.mark.parametrize("vectors", EVERY)
def test_the_loadings_are_the_tokens_rows(vectors, device):
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    found = on(device, fisher_full)(model, *padded(rows, "right"), layers=layer, rank=vectors, oversampling=0, top_k=5)
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, top_k=5)
        assert torch.equal(found.token_ids[b], expected.token_ids)
        torch.testing.assert_close(found.log_probs[b], expected.log_probs)
        rows_KD = found.loadings[layer][b] @ found.factors[layer][b]
        assert relative(rows_KD, (expected.log_probs / 2).exp()[:, None] * expected.gradients) < 1e-8


def test_chunks_of_vectors_do_not_matter(device):
    model, (ids, mask), layer = tiny("llama"), padded(prompts(LENGTHS), "right"), block("llama", 0)
    expected = on(device, fisher_full)(model, ids, mask, layers=layer, rank=5)
    for kernel in ("auto", "whole"):
        for chunk_size in (1, 4, 11):
            found = on(device, fisher_full)(
                model, ids, mask, layers=layer, rank=5, chunk_size=chunk_size, kernel=kernel
            )
            A, B = found.factors[layer], expected.factors[layer]
            assert relative(A.mT @ A, B.mT @ B) < 1e-6


def test_a_prompt_that_is_not_finite_leaves_its_neighbours_alone():
    model, layer, rows = fresh("llama"), block("llama", 1), prompts((5, 8, 3), vocabulary=90)
    expected = fisher_full(model, *padded(rows, "right"), layers=layer, rank=4)
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = torch.nan
    spoilt = torch.cat([rows[1], torch.tensor([95])])
    found = fisher_full(model, *padded([rows[0], spoilt, rows[2]], "right"), layers=layer, rank=4)
    assert found.factors[layer][1].isnan().all()
    for b in (0, 2):
        assert relative(cut(found.factors[layer][b], 4), cut(expected.factors[layer][b], 4)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"oversampling": -1}, "oversampling is -1"),
        ({"passes": 0}, "passes is 0"),
        ({"trace_samples": -1}, "trace_samples is -1; expected at least 0"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"kernel": "loop"}, "kernel loop has no forward derivatives"),
        ({"kernel": "fast"}, "kernel is 'fast'"),
        ({"precision": "high"}, "precision is 'high'"),
        ({"top_k": VOCABULARY + 1}, f"top_k is {VOCABULARY + 1}"),
        ({"layers": 9}, "layer 9 was asked for"),
        ({"positions": "first"}, "positions is 'first'"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        fisher_full(tiny("gpt2"), torch.arange(12).view(2, 6), **{"layers": 1, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kernel", ["auto", "whole"])
@pytest.mark.parametrize(
    ("function", "message"), [(NoForward, "no forward derivatives"), (WrongForward, "away from the backward ones")]
)
def test_a_model_without_forward_derivatives_is_refused_in_one_line(function, message, kernel):
    model = ToyLM()

    class Odd(nn.Module):
        def forward(self, x):
            return function.apply(x)

    for toy_block in model.blocks:
        toy_block.add_module("odd", Odd())
        own = type(toy_block).think

        def think(x, own=own, toy_block=toy_block):
            return own(toy_block, toy_block.odd(x))

        toy_block.think = think
    with pytest.raises(ValueError, match=message) as refusal:
        fisher_full(model, torch.arange(6)[None], layers="blocks.1", kernel=kernel)
    assert "use estimator topk" in str(refusal.value) and "\n" not in str(refusal.value)


# What a matrix lacks.


def test_the_quality_of_a_matrix_is_estimated_without_bias():
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    exact = hessians("gpt2", layer, rows)
    for include_rest, estimator in ((False, "topk"), (True, "topk"), (False, "full")):
        opened = FisherModel(
            model,
            layers=layer,
            top_k=6,
            estimator=estimator,
            include_rest=include_rest,
            trace_samples=2000,
            oversampling=2,
        )
        found = opened.estimate(ids, mask, rank=4)
        low = compress(found.factors[layer], 4)
        how_good = quality(found.factors[layer], low, found.remainder[layer])
        for b, F in enumerate(exact):
            error = float(how_good.trace_full_error[b])
            assert 0 < error < 0.02 * float(F.trace())
            assert abs(float(how_good.trace_full[b] - F.trace())) < 5 * error
            stored = (low.vectors[b].T * low.singular_values[b]) @ low.vectors[b]
            assert abs(float(how_good.relative_error[b]) - relative(stored, F)) < 0.02
            r, A = found.remainder[layer][b], found.factors[layer][b]
            assert float((r.T @ r / len(r) - (F - A.T @ A)).norm() / F.norm()) < 0.05


def test_without_random_vectors_nothing_is_estimated():
    model, layer = tiny("gpt2"), block("gpt2", 1)
    for samples in (0, 1):
        scores = fisher_scores(model, torch.arange(6)[None], layers=layer, top_k=3, trace_samples=samples)
        assert scores.remainder[layer].shape == (1, samples, WIDTH) and scores.gradients[layer].shape == (1, 3, WIDTH)
        how_good = quality(scores.factor(), compress(scores.factor(), 3), scores.remainder[layer])
        assert bool(how_good.trace_full.isnan()) == (samples == 0)
        assert how_good.trace_full_error.isnan() and how_good.relative_error.isnan()


# Any other token.


@pytest.mark.parametrize("top_k", [1, 3, 20])
@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_any_other_token_is_one_more_outcome(kernel, top_k):
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "left")
    scores = fisher_scores(
        model, ids, mask, layers=layer, top_k=top_k, include_rest=True, kernel=kernel, trace_samples=3
    )
    plain = fisher_scores(model, ids, mask, layers=layer, top_k=top_k, kernel=kernel)
    assert (scores.token_ids[:, -1] == -1).all() and torch.equal(scores.token_ids[:, :-1], plain.token_ids)
    assert scores.remainder[layer].shape == (len(rows), 3, WIDTH)
    torch.testing.assert_close(scores.log_probs.exp().sum(1), torch.ones(len(rows), dtype=torch.float64))
    assert relative(scores.gradients[layer][:, :-1], plain.gradients[layer]) < 1e-9
    for b, row in enumerate(rows):
        every = plain_scores(model, row, layer)
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[:top_k] = False  # of the oracle's order, likeliest first
        p = every.log_probs.exp()[rest]
        g_rest = (p[:, None] * every.gradients[rest]).sum(0) / p.sum()
        assert relative(scores.gradients[layer][b, -1], g_rest) < 1e-9
        torch.testing.assert_close(scores.log_probs[b, -1], p.sum().log())
        grads_KTD = position_scores(model, row, layer, every.token_ids)
        rest_TD = torch.einsum("k,ktd->td", p, grads_KTD[rest]) / p.sum()
        energy = torch.einsum("k,ktd->t", every.log_probs[~rest].exp(), grads_KTD[~rest] ** 2)
        expected = energy + p.sum() * rest_TD.square().sum(1)
        torch.testing.assert_close(scores.position_energy[layer][b, mask[b] == 1], expected, rtol=1e-8, atol=1e-12)


def test_a_rest_that_is_next_to_nothing_is_as_right_as_the_tokens():
    """In float32, where one token has almost all of the probability: neither p nor the score of the rest may cancel."""
    model, layer, (row,) = fresh("gpt2", torch.float32), block("gpt2", 1), prompts((6,))
    with torch.no_grad():
        hidden = model.transformer(input_ids=row[None]).last_hidden_state[0, -1]
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[17] = 22 * hidden / hidden.square().sum()
    exact = fresh("gpt2")
    exact.lm_head.weight = nn.Parameter(model.lm_head.weight.double())
    scores = fisher_scores(model, row[None], layers=layer, top_k=4, include_rest=True)
    every = plain_scores(exact, row, layer)
    p = every.log_probs[4:].exp()
    assert 1e-9 < float(p.sum()) < 1e-5
    torch.testing.assert_close(scores.log_probs[0, -1].double(), p.sum().log(), atol=1e-5, rtol=0)
    g_rest = (p[:, None] * every.gradients[4:]).sum(0) / p.sum()
    assert relative(scores.gradients[layer][0, -1], g_rest) < 1e-4
    F = every.log_probs[:4].exp()[:, None] * every.gradients[:4]
    F = every.gradients[:4].T @ F + p.sum() * torch.outer(g_rest, g_rest)
    A = scores.factor()[0].double()
    assert relative(A.T @ A, F) < 1e-3


def test_there_must_be_another_token():
    with pytest.raises(ValueError, match="leaves no other one; lower top_k"):
        fisher_scores(tiny("gpt2"), torch.arange(6)[None], layers=1, top_k=VOCABULARY, include_rest=True)


# Mixed precision.


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_mixed_precision_is_nearer_to_the_truth_and_leaves_the_weights_alone(family):
    model, layer, rows = fresh(family, torch.bfloat16), block(family, 0), prompts((18, 5, 40))
    exact = fresh(family, torch.bfloat16).double()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    ids, mask = padded(rows, "right")
    tokens = torch.stack([plain_scores(exact, row, layer, top_k=6).token_ids for row in rows])
    errors = {}
    for precision in ("model", "mixed"):
        scores = fisher_scores(model, ids, mask, layers=layer, token_ids=tokens, precision=precision)
        pairs = [
            (A.T @ A, plain_scores(exact, row, layer, token_ids=tokens[b]).fisher)
            for b, (A, row) in enumerate(zip(scores.factor(), rows, strict=True))
        ]
        errors[precision] = torch.tensor([relative(F, G) for F, G in pairs])
        if precision == "mixed":
            for b, row in enumerate(rows):
                expected = plain_scores(exact, row, layer, token_ids=tokens[b]).log_probs
                torch.testing.assert_close(scores.log_probs[b].double(), expected, atol=1e-4, rtol=0)
    assert errors["mixed"].max() < 0.05
    assert errors["mixed"].mean() < 0.6 * errors["model"].mean()
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16 and p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
    full = fisher_full(model, ids, mask, layers=layer, rank=8, precision="mixed")
    for b, row in enumerate(rows):
        A, F = full.factors[layer][b], plain_scores(exact, row, layer).fisher
        assert relative(cut(A, 8), F) < best_error(F, 8) * 1.1 + 0.03


def test_mixed_precision_leaves_the_weights_alone_after_an_error():
    model = fresh("llama", torch.bfloat16)
    fisher_scores(model, torch.arange(6)[None], layers=0, precision="mixed")

    def fail(*_):
        raise KeyError("planted")

    for target in ("model.layers.2.mlp", "model.layers.3", "model.embed_tokens"):
        handle = model.get_submodule(target).register_forward_hook(fail)
        with pytest.raises(ValueError, match=f"the hook .*fail on {target} .*planted"):
            fisher_scores(model, torch.arange(6)[None], layers=0, precision="mixed")
        handle.remove()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_mixed_precision_needs_the_layerwise_form():
    model = tiny("llama", torch.bfloat16)
    for function in (fisher_scores, fisher_full):
        with pytest.raises(ValueError, match="needs the layerwise kernel"):
            function(model, torch.arange(6)[None], layers="model.layers.1.mlp", precision="mixed")


# Vectors of one's own.


def test_scores_and_changes_of_chosen_tokens():
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    tokens = torch.stack(prompts((4,) * len(rows), seed=5))
    v = torch.randn(len(rows), 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with FisherModel(model, layers=layer).linearize(*padded(rows, "left", extra=1)) as net:
        pulled, moved = net.pullback(token_ids=tokens), net.pushforward(v, token_ids=tokens)
        with pytest.raises(ValueError, match="give one of the two"):
            net.pullback(v, token_ids=tokens)
        with pytest.raises(ValueError, match=r"token_ids has shape \(3,\)"):
            net.pushforward(v, token_ids=tokens[:, 0])
        with pytest.raises(ValueError, match="outside 0 to 100"):
            net.pullback(token_ids=tokens + 101)
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, token_ids=tokens[b]).gradients
        assert relative(pulled[b], expected) < 1e-10
        assert relative(moved[b], v[b] @ expected.T) < 1e-10
