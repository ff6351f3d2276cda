"""Estimators, precision and quality through the command and the results folder."""

import logging

import numpy as np
import pytest
import torch
from command_cases import LAYER, VOCABULARY, run_here, save_model, texts, write_prompts
from models import tiny
from oracles import plain_scores, relative

from fisher_vmap import open_results
from fisher_vmap.verify.__main__ import main as verify

ESTIMATES = ("share_kept", "trace_full", "trace_full_error", "share_full", "relative_error")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), write_prompts(folder / "prompts.jsonl", texts(7))


def truth(text):
    """All of one rendered prompt's scores, in float64."""
    model = tiny("llama", torch.float64, vocab_size=VOCABULARY)
    return plain_scores(model, torch.tensor(ids_of(text)), LAYER)


def ids_of(text):
    from command_cases import TEMPLATE, tiny_tokenizer

    messages = [{"role": "user", "content": text}]
    return tiny_tokenizer(TEMPLATE).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_estimator_full(inputs, tmp_path, capsys):
    assert run_here(*inputs, tmp_path / "out", estimator="full", keep_columns="prompt") == 0
    results = open_results(tmp_path / "out")
    table = results.to_pandas()
    for record, text in zip(results, texts(7), strict=True):
        every = truth(text)
        F = every.fisher.numpy()
        S = np.linalg.eigvalsh(F)[::-1]
        best = np.sqrt((S[4:] ** 2).sum() / (S**2).sum())
        error = np.linalg.norm(record.matrix() - F) / np.linalg.norm(F)
        assert error < 1.1 * best
        assert record.token_ids.tolist() == every.token_ids[:6].tolist()
        assert abs(record.trace_full - np.trace(F)) < 6 * record.trace_full_error
        assert 0.3 * error < record.relative_error < 3 * error
        assert record.trace <= np.trace(F) * 1.0001
        np.testing.assert_allclose(record.share_full, record.S.sum() / record.trace_full, rtol=1e-5)
        np.testing.assert_allclose(record.share_kept, record.S.sum() / record.trace, rtol=1e-5)
        # The tokens' scores, seen along the stored directions.
        along = every.gradients[:6].numpy() @ record.V.T
        assert relative(torch.from_numpy(record.scores() @ record.V.T), torch.from_numpy(along)) < 0.2
    for name in ESTIMATES:
        assert table[f"{LAYER}/{name}"].between(0, np.inf, inclusive="neither").all()
    assert (table[f"{LAYER}/share_full"] < 1.01).all()
    capsys.readouterr()
    assert verify([str(tmp_path / "out")]) == 0


def test_any_other_token(inputs, tmp_path, capsys):
    assert run_here(*inputs, tmp_path / "out", include_rest="true", num_singular_values=7) == 0
    results = open_results(tmp_path / "out")
    for record, text in zip(results, texts(7), strict=True):
        every = truth(text)
        p = every.log_probs[6:].exp()
        g_rest = (p[:, None] * every.gradients[6:]).sum(0) / p.sum()
        assert record.token_ids.tolist() == [*every.token_ids[:6].tolist(), -1]
        np.testing.assert_allclose(record.log_probs[-1], float(p.sum().log()), atol=1e-5)
        np.testing.assert_allclose(record.mass, float(every.log_probs[:6].exp().sum()), rtol=1e-5)
        expected = torch.cat([every.gradients[:6], g_rest[None]])
        assert relative(torch.from_numpy(record.scores()), expected) < 1e-3
        assert np.isnan(record.trace_full) and np.isnan(record.relative_error)
    table = results.to_pandas()
    assert table[f"{LAYER}/trace_full"].isna().all() and (table[f"{LAYER}/share_kept"] > 0.999).all()
    assert results.stack().Q.shape == (7, 7, 7)
    assert results.stack(where=lambda row: False).Q.shape == (0, 7, 7)
    capsys.readouterr()
    assert verify([str(tmp_path / "out")]) == 0


def test_trace_samples_for_topk(inputs, tmp_path):
    assert run_here(*inputs, tmp_path / "out", trace_samples=64, num_singular_values=6) == 0
    for record, text in zip(open_results(tmp_path / "out"), texts(7), strict=True):
        F = truth(text).fisher.numpy()
        assert abs(record.trace_full - np.trace(F)) < 5 * record.trace_full_error < 0.5 * np.trace(F)
        error = np.linalg.norm(record.matrix() - F) / np.linalg.norm(F)
        assert abs(record.relative_error - error) < 0.1


@pytest.mark.parametrize("estimator", ["topk", "full"])
def test_mixed_precision(inputs, tmp_path, estimator):
    """From bfloat16 weights: log p as in float32, the matrix nearer to float32's than with all of it in bfloat16."""
    from copy import deepcopy

    exact = deepcopy(tiny("llama", torch.float64, vocab_size=VOCABULARY))
    for parameter in exact.parameters():  # the weights, not the frequencies of the rotary embedding
        parameter.data = parameter.data.bfloat16().double()
    errors = {}
    for precision in ("model", "mixed"):
        out = tmp_path / precision
        settings = {"dtype": "bfloat16", "precision": precision, "estimator": estimator}
        assert run_here(*inputs, out, **settings, num_singular_values=6) == 0
        found = []
        for record, text in zip(open_results(out), texts(7), strict=True):
            every = plain_scores(exact, torch.tensor(ids_of(text)), LAYER)
            if precision == "mixed":
                assert record.token_ids.tolist() == every.token_ids[:6].tolist()
                np.testing.assert_allclose(record.log_probs, every.log_probs[:6], atol=1e-4)
            if estimator == "topk":
                G, p = every.gradients[:6].numpy(), every.log_probs[:6].exp().numpy()
                F = (G.T * p) @ G
            else:
                F = every.fisher.numpy()
            found.append(np.linalg.norm(record.matrix() - F) / np.linalg.norm(F))
        errors[precision] = np.mean(found)
    assert errors["mixed"] < errors["model"]


def test_a_resumed_run_gives_the_same_bits(inputs, tmp_path):
    for name in ("whole", "parts"):
        if name == "parts":
            assert run_here(*inputs, tmp_path / name, estimator="full", num_prompts=4) == 0
        assert run_here(*inputs, tmp_path / name, estimator="full") == 0
    for one, other in zip(open_results(tmp_path / "whole"), open_results(tmp_path / "parts"), strict=True):
        assert np.array_equal(one.V, other.V) and np.array_equal(one.S, other.S) and one.row == other.row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"estimator": "full", "kernel": "loop"},
            "estimator full needs forward derivatives, which kernel loop does not have",
        ),
        ({"estimator": "full", "include_rest": "true"}, "include_rest is for estimator topk"),
        ({"estimator": "best"}, "estimator: 'best' was given"),
        ({"oversampling": "-1"}, "oversampling: '-1' was given"),
        ({"trace_samples": "some"}, "trace_samples: 'some' was given"),
        ({"precision": "mixed", "dtype": "bfloat16", "kernel": "whole"}, "precision mixed needs the layerwise kernel"),
        ({"include_rest": "true", "top_k_tokens": VOCABULARY}, "leaves no other one; lower top_k"),
    ],
)
def test_what_does_not_go_together_is_one_line(inputs, tmp_path, capsys, caplog, settings, message):
    caplog.set_level(logging.ERROR)
    assert run_here(*inputs, tmp_path / "out", **settings) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("fisher_vmap:")]) == 1 and message in lines[-1]
