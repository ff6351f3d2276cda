"""What a caller in Python can get wrong: one ValueError that names it and says what to do, before anything is run."""

import numpy as np
import pytest
import torch
from models import BLOCKS, VOCABULARY, WIDTH, WORDS, block, fresh, prompts, tiny
from toys import ToyLM

from fisher_vmap import FisherModel, algebra, compress, fisher_full, fisher_scores, measured_kl

IDS = torch.arange(8).view(2, 4)
LAYER = block("gpt2", 1)


def said(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 300
    for word in words:
        assert word in line, line


# One prompt in place of several.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("one text", ["prompts is one text", "fisher([text])"]),
        (b"bytes", ["prompts is one text"]),
        ([{"role": "user", "content": "hi"}], ["one conversation", "fisher([messages])"]),
        ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}], ["one conversation"]),
        ({"role": "user", "content": "hi"}, ["prompts is a dict", "list of texts or conversations"]),
        (None, ["prompts is a NoneType"]),
        (3, ["prompts is a int"]),
    ],
)
def test_one_prompt_in_place_of_several_is_refused_at_once(tokenizer, monkeypatch, given, words):
    opened = FisherModel(tiny("gpt2", torch.float32), tokenizer, layers=1)
    monkeypatch.setattr(FisherModel, "numbers", None)
    said(lambda: opened.fisher(given), *words)  # not only when the first record is asked for


def test_a_table_in_place_of_its_column_is_refused(tokenizer):
    import pandas as pd

    opened = FisherModel(tiny("gpt2", torch.float32), tokenizer, layers=1, top_k=2)
    table = pd.DataFrame({"prompt": ["w1 w2", "w3"]})
    said(lambda: opened.fisher(table), "a table (DataFrame)", "column of prompts")
    assert [record.text for record in opened.fisher(table["prompt"], rank=2)] == ["w1 w2", "w3"]
    assert list(opened.fisher([])) == []


# More tokens than positions.


def test_a_prompt_is_cut_at_the_last_position(tokenizer):
    model = tiny("gpt2", torch.float32, n_positions=20)
    opened = FisherModel(model, tokenizer, layers=1, top_k=3)
    words = [WORDS[(5 * i) % 99] for i in range(50)]
    long, short = opened.fisher([" ".join(words), "w1 w2"], rank=2)
    assert long.status == "ok" and long.row["tokens"] == 20 and long.row["truncated"]
    assert long.text.split() == words[:20]
    (alone,) = opened.fisher([" ".join(words[:20])], rank=2)
    np.testing.assert_allclose(long.S, alone.S, rtol=1e-5)
    assert not short.row["truncated"] and not alone.row["truncated"]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_more_tokens_than_the_table_of_positions_are_refused(family):
    changes = {"n_positions": 20} if family == "gpt2" else {"max_position_embeddings": 20}
    model = tiny(family, torch.float32, **changes)
    ids = torch.arange(42).view(2, 21)
    fits = torch.ones_like(ids)
    fits[:, 0] = 0  # 20 tokens each, padded to 21
    opened = FisherModel(model, layers=1, top_k=2)
    for call in (
        lambda mask: fisher_scores(model, ids, mask, layers=1, top_k=2),
        lambda mask: fisher_full(model, ids, mask, layers=1, top_k=2, rank=2),
        lambda mask: opened.scores(ids, mask),
        lambda mask: opened.linearize(ids, mask).__enter__(),
    ):
        said(lambda call=call: call(None), "prompt 0 of the batch has 21 tokens", "20 positions", "cut it to 20")
        call(fits)
    step = torch.zeros(1, WIDTH)
    said(lambda: measured_kl(model, ids[0], 1, step), "21 tokens", "20 positions")
    measured_kl(model, ids[0, :20], 1, step)


def test_the_prompt_that_is_too_long_is_named():
    model = tiny("gpt2", torch.float32, n_positions=20)
    ids, mask = torch.ones(3, 30, dtype=torch.int64), torch.ones(3, 30, dtype=torch.int64)
    mask[:2, 20:], mask[2, 25:] = 0, 0
    said(lambda: fisher_scores(model, ids, mask, layers=1), "prompt 2 of the batch has 25 tokens")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "phi"])
def test_where_positions_are_no_table_more_of_them_are_legal(family):
    model = tiny(family, torch.float32, max_position_embeddings=16)
    (row,) = prompts([40])
    found = fisher_scores(model, row[None], layers=1, top_k=2)
    assert found.gradients[block(family, 1)].isfinite().all()


def test_a_model_without_positions_is_not_refused():
    (row,) = prompts([60])
    assert fisher_scores(ToyLM(), row[None], layers=1, top_k=2).log_probs.isfinite().all()


# What is no tensor, no number, no layer, no model.

BAD_IDS = [
    (IDS.numpy(), ["input_ids is a numpy.ndarray of shape (2, 4)", "[B, T] int64", "torch.as_tensor"]),
    (IDS.tolist(), ["input_ids is a list", "torch.as_tensor"]),
    (tuple(IDS.tolist()), ["input_ids is a tuple"]),
    ({"input_ids": IDS, "attention_mask": IDS}, ["input_ids is a dict", "input_ids, attention_mask"]),
    ("a text", ["input_ids is a text", "tokenise it"]),
    (None, ["input_ids is a NoneType"]),
]


@pytest.mark.parametrize(("ids", "words"), BAD_IDS, ids=lambda x: type(x).__name__)
def test_input_ids_that_are_no_tensor(ids, words):
    model = tiny("gpt2", torch.float32)
    opened = FisherModel(model, layers=1)
    said(lambda: fisher_scores(model, ids, layers=1), *words)
    said(lambda: fisher_full(model, ids, layers=1), *words)
    said(lambda: opened.scores(ids), *words)
    said(lambda: opened.estimate(ids), *words)
    said(lambda: opened.linearize(ids).__enter__(), *words)
    said(lambda: measured_kl(model, ids, 1, torch.zeros(1, WIDTH)), words[0])


@pytest.mark.parametrize("mask", [IDS.numpy(), IDS.tolist(), "1"], ids=lambda x: type(x).__name__)
def test_a_mask_or_tokens_or_positions_that_are_no_tensor(mask):
    model = tiny("gpt2", torch.float32)
    said(lambda: fisher_scores(model, IDS, mask, layers=1), "attention_mask is a ", "expected a tensor [B, T]")
    said(lambda: fisher_scores(model, IDS, layers=1, token_ids=mask), "token_ids is a ", "[2, K] int64")
    if not isinstance(mask, str):
        said(lambda: fisher_scores(model, IDS, layers=1, positions=mask), "positions is a ", "'last'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 1.5}, ["1.5 (float)", "names of modules, numbers of blocks, or 'all'"]),
        ({"layers": None}, ["None (NoneType)"]),
        ({"layers": [1, 2.0]}, ["2.0 (float)"]),
        ({"layers": 1, "top_k": "10"}, ["top_k is '10'", "whole number"]),
        ({"layers": 1, "top_k": 2.0}, ["top_k is 2.0"]),
        ({"layers": 1, "top_k": 0}, ["top_k is 0"]),
        ({"layers": 1, "chunk_size": "2"}, ["chunk_size is '2'"]),
        ({"layers": 1, "trace_samples": 1.5}, ["trace_samples is 1.5"]),
    ],
    ids=str,
)
def test_layers_and_numbers_that_are_none(arguments, words):
    model = tiny("gpt2", torch.float32)
    said(lambda: fisher_scores(model, IDS, **arguments), *words)
    said(lambda: fisher_full(model, IDS, **arguments), *words)
    said(lambda: FisherModel(model, **arguments), *words)


def test_layers_as_numbers_of_any_library():
    model = tiny("gpt2", torch.float32)
    expected = [block("gpt2", 1), block("gpt2", 2)]
    for layers in ((1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2]).to(torch.int32)):
        assert list(fisher_scores(model, IDS, layers=layers, top_k=np.int64(2)).gradients) == expected
    for layer in (np.int64(1), torch.tensor(1), np.array(1)):
        assert FisherModel(model, layers=layer).layers == expected[:1]
    assert len(FisherModel(model, layers="all").layers) == BLOCKS


def test_the_model_and_its_tokenizer_exchanged(tokenizer):
    model = tiny("gpt2", torch.float32)
    said(lambda: FisherModel(tokenizer, model, layers=1), type(tokenizer).__name__, "the model comes first")
    said(lambda: FisherModel(model, model, layers=1), "the tokenizer is a GPT2LMHeadModel")
    said(lambda: fisher_scores(tokenizer, IDS, layers=1), "the model comes first")
    said(lambda: FisherModel("gpt2", layers=1), "the model is a str")


def test_scores_in_place_of_their_factor():
    scores = fisher_scores(tiny("gpt2", torch.float32), IDS, layers=1, top_k=3)
    said(lambda: compress(scores, rank=3), "the factor is a ", "Scores", ".factor()")
    said(lambda: compress(scores.factor().numpy(), 3), "the factor is a numpy.ndarray of shape (2, 3, 36)")
    said(lambda: compress(scores.factor(), rank="3"), "rank is '3'")


def test_vectors_that_are_no_tensor():
    opened = FisherModel(tiny("gpt2", torch.float32), layers=1)
    with opened.linearize(IDS) as net:
        for product in (net.pullback, net.pushforward):
            said(lambda product=product: product(np.zeros((2, 1, WIDTH))), "numpy.ndarray", "[2, K, 36]")
            said(lambda product=product: product([[[0.0] * WIDTH]] * 2), "a list", "[2, K, 36]")
        said(lambda: net.pullback(token_ids=[[1], [2]]), "token_ids is a list", "[2, K] int64")
        said(lambda: net.pullback(token_ids=torch.tensor([[1], [VOCABULARY]])), "outside 0 to 100")


def test_steps_to_measure():
    model, row, step = tiny("gpt2", torch.float32), torch.arange(5), torch.full((1, WIDTH), 0.01)
    said(lambda: measured_kl(model, row[None], 1, step), "input_ids has shape (1, 5)", "expected [T] int64")
    said(lambda: measured_kl(model, row, 1, step[0]), "steps has shape (36,)", "expected [N, D]")
    said(lambda: measured_kl(model, row, 1, step.numpy()), "steps is a numpy.ndarray", "[N, D]")
    said(lambda: measured_kl(model, row, 1, step[:, :9]), "steps has shape (1, 9)", "[N, 36]")
    said(lambda: measured_kl(model, row + VOCABULARY, 1, step), "input_ids run from 101")


def test_vectors_of_another_width_than_the_matrix(tokenizer):
    (record,) = FisherModel(tiny("gpt2", torch.float32), tokenizer, layers=1, top_k=3).fisher(["w1 w2"], rank=2)
    x = np.ones(WIDTH - 1)
    for call in (record.matvec, record.quadratic, lambda x: algebra.project(record, x)):
        said(lambda call=call: call(x), "x has shape (35,)", "[36]")
        call(np.ones(WIDTH))
    assert record.matvec(np.ones((WIDTH, 2))).shape == (WIDTH, 2)
    said(lambda: record.matvec(np.ones((2, WIDTH))), "x has shape (2, 36)", "[36, n]")


def test_a_model_in_train_mode_is_computed_in_eval_mode_and_left_as_it_was():
    model = fresh("gpt2", torch.float32, resid_pdrop=0.5)
    expected = fisher_scores(model, IDS, layers=1, top_k=2)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    found = fisher_scores(model, IDS, layers=1, top_k=2)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == before
