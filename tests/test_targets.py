"""Fisher matrices of several targets a prompt: against the sum of single-target matrices by plain autograd."""

from contextlib import suppress

import pytest
import torch
from devices import on
from models import VOCABULARY, WIDTH, block, fresh, padded, prompts, tiny
from oracles import fisher_matrix, log_probabilities, plain_scores, relative

from fisher_vmap import FisherModel, fisher_full, fisher_sampled, fisher_scores
from fisher_vmap.estimators import sampled
from fisher_vmap.model.layout import Layout

LENGTHS, TARGETS = (6, 3, 8), ((1, 4, 5), (2,), (0, 7))
FAMILIES = ("gpt2", "gpt_neox", "gemma2", "olmo2", "mamba")
EXACT = {"gpt2": 1e-8, "gpt_neox": 1e-6}
FULL = 1e-5  # of a family that computes its norms or attention in float32 whatever the dtype


def mask_of(targets, ids, mask):
    """The targets, counted from each prompt's first token, in the columns of a padded batch."""
    chosen = torch.zeros_like(mask)
    for b, places in enumerate(targets):
        chosen[b, mask[b].argmax() + torch.tensor(places)] = 1
    return chosen


def where_of(row, positions):
    """The biased positions of a prompt, [T] bool."""
    where = torch.ones(len(row), dtype=torch.bool)
    if positions == "last":
        where[:-1] = False
    return where


def expected(model, row, layer, targets, positions="all", top_k=None):
    """The sum over the targets of the matrix of the prompt up to there: what follows a position cannot matter to it."""
    where, total = where_of(row, positions), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for at in targets:
        if where[: at + 1].any():
            total += plain_scores(model, row[: at + 1], layer, top_k=top_k, where_T=where[: at + 1]).fisher
    return total


def dense(log_probs_K, gradients_KD):
    real = log_probs_K.isfinite()
    return fisher_matrix(log_probs_K[real], gradients_KD[real])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("kernel", ["auto", "layerwise", "whole", "loop"])
def test_topk_is_the_sum_over_the_targets(kernel, positions, side, device):
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, side, extra=1)
    found = on(device, fisher_scores)(
        model, ids, mask, layers=layer, top_k=4, positions=positions, targets=mask_of(TARGETS, ids, mask), kernel=kernel
    )
    for b, row in enumerate(rows):
        F = expected(model, row, layer, TARGETS[b], positions, top_k=4)
        assert relative(dense(found.log_probs[b], found.gradients[layer][b]), F) < EXACT["gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_topk_of_every_kind_of_block(family, device):
    model, layer, rows = tiny(family), block(family, 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    found = on(device, fisher_scores)(model, ids, mask, layers=layer, top_k=4, targets=mask_of(TARGETS, ids, mask))
    for b, row in enumerate(rows):
        F = expected(model, row, layer, TARGETS[b], top_k=4)
        assert relative(dense(found.log_probs[b], found.gradients[layer][b]), F) < EXACT.get(family, FULL)


@pytest.mark.parametrize("kernel", ["auto", "layerwise", "whole"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_full_at_rank_d_is_the_sum_over_the_targets(positions, kernel, device):
    model, layers, rows = tiny("gpt2"), [block("gpt2", n) for n in (0, 2)], prompts(LENGTHS)
    ids, mask = padded(rows, "left", extra=1)
    targets = mask_of(TARGETS, ids, mask)
    found = on(device, fisher_full)(
        model, ids, mask, layers=layers, rank=WIDTH, oversampling=0, positions=positions, targets=targets, kernel=kernel
    )
    for layer in layers:
        for b, row in enumerate(rows):
            F, A = expected(model, row, layer, TARGETS[b], positions), found.factors[layer][b]
            assert relative(A.T @ A, F) < EXACT["gpt2"]
            each = [expected(model, row, layer, [at], positions).trace() for at in TARGETS[b]]
            trace = found.target_trace[layer][b]
            assert relative(trace[: len(each)], torch.stack(each)) < EXACT["gpt2"]
            assert not trace[len(each) :].any()


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_full_of_every_kind_of_block(family, device):
    model, layer, rows = tiny(family), block(family, 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    found = on(device, fisher_full)(
        model, ids, mask, layers=layer, rank=WIDTH, oversampling=0, targets=mask_of(TARGETS, ids, mask)
    )
    for b, row in enumerate(rows):
        A = found.factors[layer][b]
        assert relative(A.T @ A, expected(model, row, layer, TARGETS[b])) < EXACT.get(family, FULL)


def test_a_small_rank_of_many_targets_is_near_the_best():
    model, layer, (row,) = tiny("gpt2"), block("gpt2", 1), prompts((12,))
    F = expected(model, row, layer, range(12))
    S = torch.linalg.svdvals(F)
    for rank in (4, 8):
        found = fisher_full(model, row[None], layers=layer, rank=rank, targets="all")
        A = found.factors[layer][0]
        U, s, V = torch.linalg.svd(A.T @ A)
        error = relative((U[:, :rank] * s[:rank]) @ V[:rank], F)
        assert error < 1.15 * float(S[rank:].norm() / S.norm())


def test_the_estimated_trace_of_what_is_missing_is_that_of_all_targets():
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    targets = mask_of(TARGETS, ids, mask)
    found = fisher_scores(model, ids, mask, layers=layer, top_k=3, targets=targets, trace_samples=400)
    full = fisher_full(model, ids, mask, layers=layer, rank=3, oversampling=0, targets=targets, trace_samples=400)
    for b, row in enumerate(rows):
        F = expected(model, row, layer, TARGETS[b])
        top, A = dense(found.log_probs[b], found.gradients[layer][b]), full.factors[layer][b]
        for rest, missing in ((found.remainder[layer][b], F - top), (full.remainder[layer][b], F - A.T @ A)):
            energy = rest.square().sum(1)
            assert abs(energy.mean() - missing.trace()) < 4 * energy.std() / 20 + 1e-9


def test_drawn_scores_are_unbiased():
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    repeats, found = 200, []
    with FisherModel(model, layers=layer).linearize(ids, mask, targets=mask_of(TARGETS, ids, mask)) as net:
        for seed in range(repeats):
            one = sampled(net, samples=8, rank=2, seeds=[1000 * seed + b for b in range(len(rows))])
            found.append(one.factors[layer].mT @ one.factors[layer])
    every = torch.stack(found)
    for b, row in enumerate(rows):
        F = expected(model, row, layer, TARGETS[b])
        generator = torch.Generator().manual_seed(3)
        for v in torch.randn(4, WIDTH, dtype=torch.float64, generator=generator):
            along = every[:, b] @ v @ v
            assert abs(along.mean() - v @ F @ v) < 3.5 * along.std() / repeats**0.5
        trace = every[:, b].diagonal(dim1=1, dim2=2).sum(1)
        assert abs(trace.mean() - F.trace()) < 3.5 * trace.std() / repeats**0.5


def test_the_error_of_drawn_scores_is_told():
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts((9,))
    found = fisher_sampled(model, rows[0][None], layers=layer, samples=400, targets="all")
    A, F = found.factors[layer][0], expected(model, rows[0], layer, range(9))
    error = float(found.trace_error[layer][0])
    assert 0 < error < 0.2 * F.trace()
    assert abs(A.square().sum() - F.trace()) < 4 * error
    again = fisher_sampled(model, rows[0][None], layers=layer, samples=400, targets="all")
    assert torch.equal(again.factors[layer], found.factors[layer])


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_the_loadings_are_the_tokens_rows(estimator):
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "left")
    options = {"layers": layer, "top_k": 4, "targets": mask_of(TARGETS, ids, mask)}
    if estimator == "full":
        found = fisher_full(model, ids, mask, rank=WIDTH, oversampling=0, **options)
    else:
        found = fisher_sampled(model, ids, mask, samples=WIDTH + 10, rank=WIDTH, **options)
    plain = fisher_scores(model, ids, mask, **options)
    assert torch.equal(found.token_ids, plain.token_ids)
    for A, loadings, rows in zip(found.factors[layer], found.loadings[layer], plain.factor(layer), strict=True):
        seen = rows @ torch.linalg.pinv(A, rtol=1e-8) @ A  # as far as the drawn scores reach
        assert relative(loadings @ A, seen) < 1e-6
        assert estimator == "sampled" or relative(seen, rows) < 1e-6


def test_what_is_known_of_each_target():
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "left", extra=1)
    found = fisher_scores(model, ids, mask, layers=layer, top_k=2, targets=mask_of(TARGETS, ids, mask)).targets
    for b, row in enumerate(rows):
        start = int(mask[b].argmax())
        for rank, at in enumerate(TARGETS[b]):
            log_p = log_probabilities(model, row[: at + 1]).detach()
            assert int(found.columns[b, rank]) == start + at
            assert torch.allclose(found.entropy[b, rank], -(log_p.exp() * log_p).sum())
            if at + 1 < len(row):
                assert torch.allclose(found.log_probs[b, rank], log_p[row[at + 1]])
            else:
                assert found.log_probs[b, rank].isnan()
        assert (found.columns[b, len(TARGETS[b]) :] == -1).all()


def test_the_last_token_alone_is_the_default_to_the_bit():
    model, layer, rows = tiny("llama"), block("llama", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    last = mask_of([[n - 1] for n in LENGTHS], ids, mask)
    for one in (fisher_scores, fisher_full):
        plain, chosen = (one(model, ids, mask, layers=layer, **more) for more in ({}, {"targets": last}))
        for name in ("log_probs", "token_ids", "gradients" if one is fisher_scores else "factors"):
            a, b = getattr(plain, name), getattr(chosen, name)
            assert torch.equal(*(x[layer] if isinstance(x, dict) else x for x in (a, b)))


def test_a_prompt_does_not_depend_on_its_neighbours_targets():
    model, layer, rows = tiny("llama"), block("llama", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    together = fisher_full(model, ids, mask, layers=layer, rank=4, targets=mask_of(TARGETS, ids, mask))
    for b, row in enumerate(rows):
        chosen = mask_of([TARGETS[b]], row[None], torch.ones(1, len(row), dtype=torch.int64))
        alone = fisher_full(model, row[None], layers=layer, rank=4, targets=chosen)
        A, other = together.factors[layer][b], alone.factors[layer][0]
        assert relative(A.T @ A, other.T @ other) < 1e-6


def test_many_targets_are_pulled_in_several_passes(monkeypatch):
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    options = {"layers": layer, "top_k": 4, "targets": "all", "trace_samples": 2}
    expected_scores = fisher_scores(model, ids, mask, **options)
    monkeypatch.setattr("fisher_vmap.linearize.scores.FIELD_ELEMENTS", 1)
    found = fisher_scores(model, ids, mask, **options)
    for name in ("gradients", "position_energy", "remainder"):
        assert relative(getattr(found, name)[layer], getattr(expected_scores, name)[layer]) < 1e-12


@pytest.mark.parametrize("estimate", [fisher_scores, fisher_full], ids=["topk", "full"])
def test_an_audit_sees_a_target_that_is_off_by_one(estimate, monkeypatch, caplog):
    model, layer, rows = fresh("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    targets = mask_of(((1, 4), (2,), (3, 6)), ids, mask)
    estimate(model, ids, mask, layers=layer, targets=targets, audit="always")
    right = Layout.target_rows

    def shifted(layout, device):
        rows_M = right(layout, device)
        return rows_M - 1 if len(layout.lengths) > 1 and layout.targets is not None else rows_M

    monkeypatch.setattr(Layout, "target_rows", shifted)
    with suppress(ValueError):  # no form is left, or one that computes each prompt by itself
        estimate(model, ids, mask, layers=layer, targets=targets, audit="always", kernel="whole")
    assert "is given up from here on: the audit found" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "first"}, "targets is 'first'; expected 'all', 'last' or a mask"),
        ({"targets": torch.ones(2, 5)}, r"targets has shape \(2, 5\)"),
        ({"targets": torch.zeros(2, 6)}, "targets selects no real token of some prompt"),
        ({"targets": 3}, "targets"),
        ({"targets": "all", "token_ids": torch.zeros(2, 1, dtype=torch.int64)}, "token_ids are those of one target"),
        ({"targets": "all", "include_rest": True}, "include_rest is for one target"),
    ],
)
def test_what_is_wrong_with_targets_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        fisher_scores(tiny("gpt2"), torch.arange(12).view(2, 6) % VOCABULARY, layers=1, **arguments)
