"""Targets of a `FisherModel`: completions that are given, and those that the model writes itself."""

import numpy as np
import pytest
import torch
from models import VOCABULARY, WIDTH, block, fresh, prompts, tiny
from oracles import plain_scores, relative

from fisher_vmap import FisherModel
from fisher_vmap.completions import Completions, complete
from fisher_vmap.data.sequences import Tokens

LAYER = block("gpt2", 1)


def whole(ids, targets, where=None):
    """The matrix of several targets of one sequence, by plain autograd."""
    model, row = tiny("gpt2"), torch.tensor(ids)
    where = torch.ones(len(ids), dtype=torch.bool) if where is None else where
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for at in targets:
        if where[: at + 1].any():
            total += plain_scores(model, row[: at + 1], LAYER, where_T=where[: at + 1]).fisher
    return total.numpy()


def stored(numbers):
    result = numbers.layers[LAYER]
    return (result.V.T * result.S) @ result.V


def opened(**options):
    return FisherModel(tiny("gpt2"), layers=1, estimator="full", oversampling=0, precision="model", **options)


GIVEN = [Tokens([5, 6, 7, 8, 9], 3), Tokens([4, 3, 2], 2), Tokens([11, 12, 13, 14, 15, 16, 17], 4)]


def test_the_targets_of_a_completion_are_one_before_its_tokens():
    for one, numbers in zip(GIVEN, opened(targets="completion").numbers(GIVEN, WIDTH), strict=True):
        places = range(one.start - 1, len(one.ids) - 1)
        assert numbers.targets.positions.tolist() == list(places)
        F = whole(one.ids, places)
        assert relative(torch.tensor(stored(numbers)), torch.tensor(F)) < 1e-5
        shifted = whole(one.ids, range(one.start, len(one.ids)))
        assert relative(torch.tensor(stored(numbers)), torch.tensor(shifted)) > 1e-2
        for at, log_p in zip(places, numbers.targets.log_probs, strict=True):
            row = torch.tensor(one.ids)
            expected = plain_scores(tiny("gpt2"), row[: at + 1], LAYER, token_ids=row[at + 1 : at + 2]).log_probs
            assert abs(float(log_p) - float(expected)) < 1e-5


def test_a_completion_and_its_prompt_differ_by_the_shifted_rows():
    """F of the completion minus that of the prompt's last token is the sum over the targets inside the completion."""
    one = GIVEN[2]
    (completion,) = opened(targets="completion").numbers([one], WIDTH)
    (prompt,) = opened().numbers([one.ids[: one.start]], WIDTH)
    inside = whole(one.ids, range(one.start, len(one.ids) - 1))
    difference = torch.tensor(stored(completion) - stored(prompt))
    assert relative(difference, torch.tensor(inside)) < 1e-5


@pytest.mark.parametrize("positions", ["prompt", "completion", "last", "all"])
def test_where_the_bias_is_added(positions):
    for one, numbers in zip(
        GIVEN, opened(targets="completion", positions=positions).numbers(GIVEN, WIDTH), strict=True
    ):
        n = len(one.ids)
        where = torch.zeros(n, dtype=torch.bool)
        where[{"prompt": slice(one.start), "completion": slice(one.start, n), "last": slice(n - 1, n)}.get(
            positions, slice(n)
        )] = True  # fmt: skip
        F = torch.tensor(whole(one.ids, range(one.start - 1, n - 1), where))
        if not F.any():
            assert not stored(numbers).any()
        else:
            assert relative(torch.tensor(stored(numbers)), F) < 1e-5


def test_every_position():
    one = Tokens([5, 6, 7, 8, 9])
    (numbers,) = opened(targets="all").numbers([one], WIDTH)
    assert relative(torch.tensor(stored(numbers)), torch.tensor(whole(one.ids, range(5)))) < 1e-5
    assert np.isnan(numbers.targets.log_probs[-1]) and np.isfinite(numbers.targets.log_probs[:-1]).all()


@pytest.mark.parametrize("estimator", ["topk", "full", "sampled"])
def test_the_pairs_that_are_kept_are_scores_of_tokens_at_targets(estimator):
    model = FisherModel(
        tiny("gpt2"),
        layers=1,
        estimator=estimator,
        oversampling=0,
        score_samples=WIDTH + 10,
        top_k=5,
        targets="completion",
    )
    for one, numbers in zip(GIVEN, model.numbers(GIVEN, WIDTH), strict=True):
        result, places = numbers.layers[LAYER], numbers.targets.positions
        real = numbers.targets.of_outcome >= 0
        assert len(real) == 20 and real.sum() == min(20, 5 * len(places))
        A = (result.Q * np.sqrt(result.S)) @ result.V
        for k in np.flatnonzero(real):
            at = int(places[numbers.targets.of_outcome[k]])
            token = torch.tensor([int(numbers.token_ids[k])])
            plain = plain_scores(tiny("gpt2"), torch.tensor(one.ids[: at + 1]), LAYER, token_ids=token)
            assert abs(float(plain.log_probs) - numbers.log_probs[k]) < 1e-5
            row = (plain.log_probs.exp().sqrt() * plain.gradients[0]).numpy()
            np.testing.assert_allclose(A[k], row, atol=2e-4 * np.sqrt(result.trace))


def test_the_trace_of_each_target():
    for estimator in ("topk", "full"):
        model = FisherModel(
            tiny("gpt2"), layers=1, estimator=estimator, oversampling=0, top_k=VOCABULARY, targets="completion"
        )
        for one, numbers in zip(GIVEN, model.numbers(GIVEN, WIDTH), strict=True):
            expected = [np.trace(whole(one.ids, [at])) for at in numbers.targets.positions]
            np.testing.assert_allclose(numbers.targets.traces[LAYER], expected, rtol=1e-4)


def test_greedy_completions_are_the_likeliest_tokens():
    model, rows = tiny("gpt2"), prompts((5, 3, 7))
    written = complete(model, [row.tolist() for row in rows], 6)
    for row, tokens in zip(rows, written, strict=True):
        ids = row.tolist()
        for token in tokens:
            with torch.no_grad():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(tokens) == 6 or tokens[-1] == model.config.eos_token_id


def test_drawn_completions_follow_the_models_own_distribution():
    model, row = fresh("gpt2", torch.float32), prompts((4,))[0]
    model.generation_config.repetition_penalty = 5.0  # must not matter
    model.generation_config.top_k = 2
    count = 3000
    drawn = Completions(1, count, 1.0, 0).write(model, [row.tolist()])[0]
    found = torch.bincount(torch.tensor([tokens[0] for tokens in drawn]), minlength=VOCABULARY) / count
    with torch.no_grad():
        p = model(row[None]).logits[0, -1].softmax(0)
    error = (p * (1 - p) / count).sqrt()
    assert ((found - p).abs() < 4.5 * error + 1e-9).all()
    assert model.generation_config.repetition_penalty == 5.0


def test_a_completion_depends_on_its_prompt_seed_and_number_alone():
    model, rows = tiny("gpt2"), [row.tolist() for row in prompts((5, 3, 7))]
    together = Completions(4, 3, 1.0, 7).write(model, rows)
    assert Completions(4, 3, 1.0, 7).write(model, rows[1:2]) == together[1:2]
    assert Completions(4, 2, 1.0, 7).write(model, rows[::-1])[0] == together[2][:2]
    assert Completions(4, 3, 1.0, 8).write(model, rows) != together
    assert len({tuple(one) for one in together[0]}) > 1


def test_a_completion_ends_where_the_model_ends_it():
    model, row = fresh("gpt2"), prompts((5,))[0].tolist()
    (long,) = complete(model, [row], 8)
    model.generation_config.eos_token_id = long[3]
    (short,) = complete(model, [row], 8)
    assert short == long[: long.index(long[3]) + 1]


@pytest.mark.parametrize("estimator", ["topk", "full"])
def test_the_matrix_of_several_completions_is_their_mean(estimator):
    rows = [row.tolist() for row in prompts((5, 3))]
    model = FisherModel(
        tiny("gpt2"),
        layers=1,
        estimator=estimator,
        oversampling=0,
        top_k=VOCABULARY,
        targets=4,
        samples=3,
        positions="prompt",
    )
    made = model.sequences([Tokens(row) for row in rows])
    for sequences, numbers in zip(made, model.numbers(made, WIDTH), strict=True):
        each = []
        for one in sequences:
            where = torch.arange(len(one.ids)) < one.start
            each.append(whole(one.ids, range(one.start - 1, len(one.ids) - 1), where))
        F = torch.tensor(np.mean(each, 0))
        assert relative(torch.tensor(stored(numbers)), F) < 1e-4
        traces = [np.trace(one) for one in each]
        np.testing.assert_allclose(numbers.targets.trace_errors[LAYER], np.std(traces, ddof=1) / 3**0.5, rtol=1e-3)
        counts = [len(one.ids) - one.start for one in sequences]
        assert numbers.targets.samples.tolist() == [s for s, n in enumerate(counts) for _ in range(n)]


def test_records_of_a_model_that_writes(tokenizer):
    model = FisherModel(tiny("gpt2", torch.float32), tokenizer, layers=1, targets=3, estimator="full")
    for record in model.fisher(["w1 w2 w3", "w5 w4"], rank=4):
        assert len(record.completions) == 1 and len(record.completion_ids[0]) <= 3
        n = len(record.targets.positions)
        assert n == len(record.completion_ids[0]) == len(record.target_trace)
        assert len(record.attribution()) == len(record.prompt_tokens) + n
        assert record.token_targets.max() < n and len(record.token_ids) == 40
        assert np.isfinite(record.targets.entropy).all() and record.row["targets"] == n
        np.testing.assert_allclose(record.target_trace.sum(), record.trace, rtol=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "answer"}, "targets is 'answer'; expected 'last', 'completion', 'all' or a number"),
        ({"targets": 0}, "targets is 0"),
        ({"targets": True}, "targets is True"),
        ({"samples": 3}, "samples and temperature are of completions that the model writes"),
        ({"targets": 5, "samples": 3, "temperature": 0.0}, "at temperature 0 all are equal"),
        ({"targets": 5, "temperature": -1.0}, "temperature is -1.0"),
        ({"targets": "all", "include_rest": True}, "include_rest is for one target"),
        ({"positions": "completion"}, "with targets 'last' there is none"),
        ({"positions": "first"}, "positions is 'first'"),
        ({"estimator": "sampled", "trace_samples": 3}, "trace_samples"),
        ({"estimator": "sampled", "kernel": "loop"}, "estimator sampled needs forward derivatives"),
    ],
)
def test_what_is_wrong_with_an_option_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        FisherModel(tiny("gpt2"), layers=1, **options)
