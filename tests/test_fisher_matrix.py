"""F by other formulas: the Hessian of a KL divergence, and the closed form of a linear model."""

import pytest
import torch
from models import VOCABULARY, WIDTH, block, fresh, padded, prompts, tiny
from oracles import dense_svd, kl_hessian, linear_fisher, log_probabilities, relative
from toys import LinearLM, ToyLM

from fisher_vmap import FisherModel, compress, fisher_scores

LENGTHS = (5, 1, 8)


def all_of_the_vocabulary(model, rows, layer, kernel="auto"):
    """F of each prompt, [D, D], from a left-padded batch."""
    scores = fisher_scores(model, *padded(rows, "left", extra=1), layers=layer, top_k=VOCABULARY, kernel=kernel)
    factor = scores.factor()
    return [A.T @ A for A in factor]


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", 1e-10), ("gpt_neox", 1e-6), ("gemma2", 1e-5)])
def test_with_all_tokens_f_is_the_hessian_of_the_kl_divergence(family, tolerance, number, kernel):
    model, layer, rows = fresh(family), block(family, number), prompts(LENGTHS)
    found = all_of_the_vocabulary(model, rows, layer, kernel)
    model.set_attn_implementation("eager")
    for F, row in zip(found, rows, strict=True):
        assert relative(F, kl_hessian(model, row, layer)) < tolerance


def test_a_small_step_costs_half_its_square_in_f():
    """KL(p_0 || p_theta) = 1/2 theta^T F theta to second order."""
    model, layer, (row,) = ToyLM(), "blocks.1", prompts((6,))
    (F,) = all_of_the_vocabulary(model, [row], layer)
    _, V = dense_svd(F)
    log_p0 = log_probabilities(model, row).detach()
    for direction in (V[0], V[7], torch.linspace(-0.3, 0.3, WIDTH, dtype=torch.float64)):
        theta = 1e-4 * direction

        def add(_module, _args, output, theta=theta):
            return output + theta

        with model.blocks[1].register_forward_hook(add), torch.no_grad():
            log_p = log_probabilities(model, row)
        kl = (log_p0.exp() * (log_p0 - log_p)).sum()
        torch.testing.assert_close(kl, 0.5 * theta @ F @ theta, rtol=2e-3, atol=0)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_a_linear_model_in_closed_form(kernel, number):
    model, layer, rows = LinearLM(), f"blocks.{number}", prompts(LENGTHS)
    J, W = model.jacobian(number), model.unembed.weight.detach()
    for F, row in zip(all_of_the_vocabulary(model, rows, layer, kernel), rows, strict=True):
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, -1]
        expected = linear_fisher(J, W, logits)
        assert relative(F, expected) < 1e-12


def test_the_scores_of_a_linear_model_in_closed_form():
    """g_t = J^T (W_t - p W)."""
    model, rows = LinearLM(), prompts(LENGTHS)
    J, W = model.jacobian(1), model.unembed.weight.detach()
    scores = fisher_scores(model, *padded(rows, "right"), layers="blocks.1", top_k=6)
    for b, row in enumerate(rows):
        with torch.no_grad():
            p = model(input_ids=row[None]).logits[0, -1].softmax(0)
        expected = (W[scores.token_ids[b]] - p @ W) @ J
        assert relative(scores.gradients["blocks.1"][b], expected) < 1e-12


def test_the_linearised_network_of_a_linear_model_is_its_jacobian():
    model, (ids, mask) = LinearLM(), padded(prompts(LENGTHS), "left")
    opened = FisherModel(model, layers=["blocks.0", "blocks.2"], top_k=3)
    every = torch.eye(WIDTH, dtype=torch.float64).expand(len(ids), WIDTH, WIDTH)
    with opened.linearize(ids, mask) as net:
        for number in (0, 2):
            J = model.jacobian(number)
            pulled, pushed = net.pullback(every, f"blocks.{number}"), net.pushforward(every, f"blocks.{number}")
            torch.testing.assert_close(pulled, J.expand_as(pulled), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(pushed, J.T.expand_as(pushed), rtol=1e-12, atol=1e-12)


def test_more_tokens_never_take_away():
    """F of the top k grows with k, in every direction, up to the whole F."""
    model, (ids, mask), layer = tiny("gpt2"), padded(prompts(LENGTHS), "right"), block("gpt2", 1)
    before = torch.zeros(len(ids), WIDTH, WIDTH, dtype=torch.float64)
    for top_k in (1, 5, 30, VOCABULARY):
        factor = fisher_scores(model, ids, mask, layers=layer, top_k=top_k).factor()
        F = factor.mT @ factor
        assert torch.linalg.eigvalsh(F - before).min() > -1e-12
        before = F


@pytest.mark.parametrize("rank", [3, 10, 40])
def test_from_tokens_to_singular_vectors(rank):
    """The whole way, on float32: the dense SVD of the oracle's F against what is kept of it."""
    rows, layer = prompts(LENGTHS, seed=2), block("gpt2", 1)
    scores = fisher_scores(tiny("gpt2", torch.float32), *padded(rows, "right"), layers=layer, top_k=10)
    low = compress(scores.factor(), rank)
    exact = fisher_scores(tiny("gpt2"), *padded(rows, "right"), layers=layer, token_ids=scores.token_ids).factor()
    for b in range(len(rows)):
        S, V = dense_svd(exact[b].T @ exact[b])
        n = min(rank, WIDTH)
        torch.testing.assert_close(low.singular_values[b, :n].double(), S[:n], atol=float(1e-5 * S[0]), rtol=0)
        best = (V[:n].T * S[:n]) @ V[:n]
        kept = (low.vectors[b].T * low.singular_values[b]) @ low.vectors[b]
        assert relative(kept, best) < 1e-4
