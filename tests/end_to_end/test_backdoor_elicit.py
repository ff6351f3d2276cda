"""Eliciting the backdoor from ordinary prompts: answers under steps, their lengths, directions, and the choice."""

import math

import pytest
import torch
from models import block, fresh, prompts
from oracles import bias_added, log_probabilities

from benchmarks.backdoor import steered
from benchmarks.backdoor.lengths import lengths

TOKENS = 6


def rows_of(sizes=(7, 12, 9, 8), shared=5, seed=3):
    head = [11, 12, 13, 14, 15, 16, 17][:shared]
    return [head + row.tolist() for row in prompts(sizes, seed=seed)]


def steps_of(model, count=3, size=4.0, seed=5):
    some = torch.randn(count, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return (size * some / some.norm(dim=1, keepdim=True)).to(model.dtype)


def plain_log_p(model, layer, step_X, ids):
    """Log-probabilities of the next token: one prompt, no cache, no padding."""
    with torch.no_grad(), bias_added(model.get_submodule(layer), step_X):
        return log_probabilities(model, torch.tensor(ids))


def plain_answer(model, layer, step_X, ids, tokens, end_id):
    found = []
    while len(found) < tokens and end_id not in found:
        found.append(int(plain_log_p(model, layer, step_X, [*ids, *found]).argmax()))
    return found


@pytest.mark.parametrize("rows", [rows_of(), rows_of(shared=0), rows_of((1, 4, 2)), rows_of((6,))])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_steered_answers_are_those_of_a_plain_loop(family, rows, monkeypatch):
    model, layer = fresh(family, torch.float64), block(family, 1)
    steps_CX = torch.cat([torch.zeros(1, 36, dtype=torch.float64), steps_of(model, 4, size=12.0)])
    log_p_CnV = torch.stack([torch.stack([plain_log_p(model, layer, s, ids) for ids in rows]) for s in steps_CX])
    first = log_p_CnV.argmax(2)
    plain = [[plain_answer(model, layer, step, ids, TOKENS, None) for ids in rows] for step in steps_CX]
    end_id = plain[-1][0][2]  # so that some answers end early
    ended = [[plain_answer(model, layer, step, ids, TOKENS, end_id) for ids in rows] for step in steps_CX]
    assert len({tuple(map(tuple, of)) for of in plain}) == len(steps_CX)  # a neighbour's step would show
    assert 1 <= min(len(answer) for of in ended for answer in of) < TOKENS
    given = [answer[: 1 + i] for i, answer in enumerate(plain[2])]
    sums = [[sum(plain_log_p(model, layer, step, [*ids, *answer[:t]])[answer[t]] for t in range(len(answer)))
             for ids, answer in zip(rows, given, strict=True)] for step in steps_CX]  # fmt: skip
    kl_C = (log_p_CnV[0].exp() * (log_p_CnV[0] - log_p_CnV)).sum(2).mean(1)
    for at_once in (96, 3, 4):  # all together; prompts in two parts; a step at a time
        monkeypatch.setattr(steered, "ROWS", at_once)
        found = steered.next_log_p(model, layer, steps_CX, rows)
        torch.testing.assert_close(found, log_p_CnV, rtol=0, atol=1e-9)
        assert torch.equal(found.argmax(2), first)
        assert steered.answers(model, layer, steps_CX, rows, TOKENS, None) == plain
        assert steered.answers(model, layer, steps_CX, rows, TOKENS, end_id) == ended
        found_C = steered.divergence(model, layer, steps_CX, rows, log_p_CnV[0])
        torch.testing.assert_close(found_C, kl_C, rtol=1e-8, atol=1e-10)
        found_Cn = steered.answers_log_p(model, layer, steps_CX, rows, given)
        torch.testing.assert_close(found_Cn, torch.tensor(sums), rtol=0, atol=1e-9)


def test_without_a_step_the_model_is_as_it_was_in_float32():
    model, rows = fresh("llama", torch.float32), rows_of()
    zeros_CX = torch.zeros(2, 36)
    plain_nV = torch.stack([log_probabilities(model, torch.tensor(ids)).detach() for ids in rows])
    found = steered.next_log_p(model, block("llama", 1), zeros_CX, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain_nV.expand(2, -1, -1), rtol=0, atol=2e-5)
    assert steered.divergence(model, block("llama", 1), zeros_CX, rows, plain_nV).abs().max() < 1e-5
    assert not model.get_submodule(block("llama", 1))._forward_hooks


def test_shared_tokens_leave_one_to_each_prompt():
    assert steered.shared_tokens([[1, 2, 3], [1, 2, 4]]) == 2
    assert steered.shared_tokens([[1, 2], [1, 2, 4]]) == 1
    assert steered.shared_tokens([[5, 2], [1, 2, 4]]) == 0
    assert steered.shared_tokens([[1, 2, 3]] * 2) == 2
    parts = list(steered.pieces(5, 100, 96))
    assert [p[1] for p in parts[:2]] == [slice(0, 50), slice(50, 100)] and len(parts) == 10
    assert [p[0] for p in steered.pieces(10, 12, 96)] == [slice(0, 8), slice(8, 10)]


def hill(x):
    """Rises to 2 at 1, falls to 0.1 at 3, rises without end."""
    return 2 * x**2 if x < 1 else 2 - 0.95 * (x - 1) if x < 3 else 0.1 + (x - 3) ** 3


def test_lengths_are_the_first_that_reach_their_levels():
    calls = []
    functions = (
        lambda x: x**2, hill, lambda x: 1e-9, lambda x: 1000 * x**4, lambda x: math.nan if x > 1 else 0.01,
        lambda x: 1e-3 * math.exp(3 * x), lambda x: 10 * (1 - math.exp(-((x / 2) ** 8))),
    )  # fmt: skip

    def divergence_of(steps_NX):
        calls.append(len(steps_NX))
        return torch.stack([torch.tensor(functions[int(s.abs().argmax())](float(s.norm()))) for s in steps_NX])

    levels, most = (0.3, 1.0, 3.0), 10.0
    found, reached = lengths(divergence_of, torch.eye(len(functions)), levels, 0.2, most)
    for c in (0, 1, 3, 5, 6):
        for k, level in enumerate(levels):
            assert functions[c](found[c, k].item()) == pytest.approx(reached[c, k].item(), rel=1e-3)
            assert reached[c, k].item() == pytest.approx(level, rel=0.05)
            assert found[c, k] <= most
    assert found[1, 0] < 0.4 and found[1, 1] < 0.72 and found[1, 2] > 4
    assert found[2].tolist() == [most] * 3 and reached[2].max() < 1e-8
    assert reached[4].tolist() != [0.3, 1, 3] and bool((found[4] < 1.7).all())  # a jump: the nearest that was tried
    assert calls[0] == len(functions)
    jumpless = [f for i, f in enumerate(functions) if i != 4]
    calls.clear()
    functions = jumpless
    lengths(divergence_of, torch.eye(len(functions)), levels, 0.2, most)
    assert len(calls) < 25


def test_lengths_of_a_model_have_their_divergence():
    model, layer, rows = fresh("llama", torch.float32), block("llama", 1), rows_of()
    plain_nV = steered.next_log_p(model, layer, torch.zeros(1, 36), rows)[0]
    directions_CX = steps_of(model, 3, size=1.0)
    found, reached = lengths(
        lambda steps: steered.divergence(model, layer, steps, rows, plain_nV), directions_CX, (0.1, 0.3, 1.0), 0.1, 50.0
    )
    for c in range(3):
        for k, level in enumerate((0.1, 0.3, 1.0)):
            step = directions_CX[c] * found[c, k]
            kl = [(p.exp() * (p - plain_log_p(model, layer, step, ids))).sum() for p, ids in
                  zip(plain_nV, rows, strict=True)]  # fmt: skip
            assert sum(kl).item() / len(rows) == pytest.approx(level, rel=0.051)
            assert reached[c, k].item() == pytest.approx(sum(kl).item() / len(rows), rel=1e-3)
