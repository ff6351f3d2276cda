"""Runs of completions and sequences from the command line: against plain autograd, `FisherModel` and `verify`."""

import logging

import numpy as np
import pytest
import torch
from command_cases import LAYER, VOCABULARY, run_here, save_model, texts, tiny_tokenizer, write_prompts
from models import tiny
from oracles import bias_added, log_probabilities, relative

from fisher_vmap import FisherModel, open_results
from fisher_vmap.data.batching import TARGET_NUMBERS
from fisher_vmap.verify.__main__ import main as verify

WIDTH = 36
ANSWERS = ["yes", "no way", "a fox", "tea for two", "jump"]
RANK = {"num_singular_values": WIDTH, "estimator": "full"}
EXACT = {"estimator": "full", "oversampling": 32}  # as many vectors as the residual stream is wide
COMPLETION = {"targets": "completion", "completion_column": "answer"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    data = write_prompts(folder / "prompts.jsonl", texts(5, longest=20), answer=ANSWERS)
    return save_model(folder / "model"), data


def own_ids(text):
    turns = [{"role": "user", "content": text}]
    return tiny_tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def fisher_of(ids, targets, where, top_k=None):
    """The sum over targets of the matrix of one sequence, by plain autograd in float64."""
    model = tiny("llama", vocab_size=VOCABULARY)
    theta = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(where, dtype=torch.float64)[:, None] * theta
    with torch.enable_grad(), bias_added(model.get_submodule(LAYER), bias):
        log_p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for at in targets:
            tokens = log_p[at].detach().sort(descending=True, stable=True).indices[:top_k]
            unit = torch.eye(VOCABULARY, dtype=torch.float64)[tokens]
            (g,) = torch.autograd.grad(log_p[at], theta, unit, retain_graph=True, is_grads_batched=True)
            total += g.T @ (log_p[at].detach()[tokens].exp()[:, None] * g)
    return total


def expected(record, text, settings):
    """The matrix of a record: the mean over its completions, which are taken from the record."""
    own, found = own_ids(text), []
    for ids in record.completion_ids or [()]:
        whole = [*own, *ids]
        n, start = len(whole), len(own)
        targets = range(n) if settings["targets"] == "all" else range(start - 1, n - 1)
        first, stop = {"prompt": (0, start), "completion": (start, n), "last": (n - 1, n)}.get(
            settings.get("bias_positions"), (0, n)
        )
        where = [first <= at < stop for at in range(n)]
        found.append(fisher_of(whole, targets, where, 6 if settings.get("estimator") == "topk" else None))
    return torch.stack(found).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {**COMPLETION, **RANK},
        {"targets": 4, **RANK},
        {"targets": 4, "samples": 3, **RANK},
        {"targets": 3, "temperature": 0.7, **RANK},
        {"targets": "all", **RANK},
        {"targets": 3, "estimator": "topk", "num_singular_values": WIDTH},
        {**COMPLETION, "estimator": "topk", "num_singular_values": WIDTH},
        {**COMPLETION, **RANK, "bias_positions": "prompt"},
        {**COMPLETION, **RANK, "bias_positions": "completion"},
        {"targets": 3, "samples": 2, **RANK, "bias_positions": "prompt"},
        {"targets": 3, **RANK, "bias_positions": "completion"},
        {"targets": 3, **RANK, "bias_positions": "last"},
    ],
    ids=lambda settings: "-".join(str(value) for name, value in settings.items() if name != "num_singular_values"),
)
def test_every_matrix_is_that_of_plain_autograd(inputs, tmp_path, settings):
    out = tmp_path / "out"
    assert run_here(*inputs, out, **settings) == 0
    results = open_results(out, check="full")
    for record, text, answer in zip(results, texts(5, longest=20), ANSWERS, strict=True):
        assert record.status == "ok" and record.row["tokens"] == len(own_ids(text))
        F = expected(record, text, settings)
        if not F.any():  # the bias is at the last token alone, which no target sees
            assert record.S.max() < 1e-6
            continue
        assert relative(torch.tensor(record.matrix()), F) < 1e-4
        if settings["targets"] == "all":
            assert record.completions is None and len(record.targets.positions) == len(own_ids(text))
            continue
        each = record.completion_ids
        assert len(each) == settings.get("samples", 1)
        assert len(record.targets.positions) == sum(map(len, each))
        if settings["targets"] == "completion":
            assert record.completions == (answer,)
            assert list(each[0]) == tiny_tokenizer()(answer + "<|end|>", add_special_tokens=False)["input_ids"]
        elif settings.get("samples", 1) == 1 and "temperature" not in settings:
            for number, token in enumerate(each[0]):
                row = torch.tensor([*own_ids(text), *each[0][:number]])
                assert token == int(log_probabilities(tiny("llama", vocab_size=VOCABULARY), row).argmax())
        assert np.isfinite(record.trace_error) == (settings.get("samples", 1) > 1)
    assert verify([str(out)]) == 0


@pytest.mark.parametrize("estimator", ["topk", "full", "sampled"])
@pytest.mark.parametrize(
    "settings", [COMPLETION, {"targets": 3}, {"targets": 3, "samples": 2, "completion_seed": 5}, {"targets": "all"}]
)
def test_the_records_are_those_of_python(inputs, tmp_path, settings, estimator):
    from transformers import AutoModelForCausalLM

    assert run_here(*inputs, tmp_path / "out", estimator=estimator, **settings) == 0
    known = {"completion_seed": "seed"}
    options = {known.get(name, name): value for name, value in settings.items() if name != "completion_column"}
    opened = FisherModel(
        AutoModelForCausalLM.from_pretrained(inputs[0]),
        tiny_tokenizer(),
        layers=1,
        top_k=6,
        estimator=estimator,
        **options,
    )
    completions = ANSWERS if settings["targets"] == "completion" else None
    stored = open_results(tmp_path / "out")
    for one, other in zip(stored, opened.fisher(texts(5, longest=20), 4, completions=completions), strict=True):
        assert one.completion_ids == other.completion_ids
        assert relative(torch.tensor(one.matrix()), torch.tensor(other.matrix())) < 1e-3
        np.testing.assert_allclose(one.target_trace, other.target_trace, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(one.targets.entropy, other.targets.entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {**COMPLETION, **EXACT},
        {"targets": 4, **EXACT},
        {"targets": 4, "samples": 4, **EXACT},
        {"targets": "all", **EXACT},
        {**COMPLETION, "estimator": "topk"},
        {"targets": 3, "samples": 2, **EXACT, "bias_positions": "prompt"},
        {**COMPLETION, **EXACT, "bias_positions": "completion"},
    ],
)
def test_steps_change_the_targets_as_predicted(inputs, tmp_path, settings, capsys):
    assert run_here(*inputs, tmp_path / "out", **settings) == 0
    capsys.readouterr()
    assert verify([str(tmp_path / "out"), "--kl"]) == 0
    told = capsys.readouterr().out
    assert f"ok   KL at {LAYER}" in told and "KL is the sum over the targets" in told
    assert ("whole sequences, completions drawn anew" in told) == (settings.get("samples", 1) > 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"completion_column": "answer"}, ["completion_column is for targets: completion", "targets is last"]),
        ({"completion_column": "answer", "targets": 3}, ["completion_column is for targets: completion"]),
        ({**COMPLETION, "completion_column": "anser"}, ["no column 'anser'", "did you mean 'answer'?"]),
        ({**COMPLETION, "prefill": "Sure"}, ["prefill is the start of an answer"]),
        ({"targets": 128}, ["128 tokens to write", "128 positions", "lower targets"]),
        ({"targets": 125}, ["max_length 3 leaves no room for a prompt", "lower targets"]),
        ({"targets": "all", "bias_positions": "completion"}, ["with targets 'all' there is none"]),
        ({"bias_positions": "completion"}, ["with targets 'last' there is none"]),
        ({"samples": 3}, ["samples and temperature are of completions that the model writes"]),
        ({"targets": 3, "include_rest": "true"}, ["include_rest is for one target"]),
        ({"targets": "answer"}, ["targets: 'answer' was given", "last, completion, all"]),
        ({"targets": 0}, ["targets: '0' was given"]),
    ],
)
def test_what_cannot_be_is_one_line(inputs, tmp_path, settings, words, capsys):
    assert run_here(*inputs, tmp_path / "out", **settings) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fisher_vmap: ") and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_rows_without_a_completion_are_skipped_and_keep_their_index(inputs, tmp_path):
    prompts = [*texts(3), "", "hello"]
    data = write_prompts(tmp_path / "p.jsonl", prompts, answer=["yes", None, " ", "no", "end"])
    assert run_here(inputs[0], data, tmp_path / "out", **COMPLETION, num_prompts=5) == 0
    table = open_results(tmp_path / "out").to_pandas()
    assert table["status"].tolist() == ["ok", "skipped", "skipped", "skipped", "ok"]
    assert table["reason"].tolist()[1:4] == [
        "column 'answer' is null", "column 'answer' holds no completion", "empty text",
    ]  # fmt: skip
    assert verify([str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("settings", [COMPLETION, {"targets": 3}, {"targets": "all"}])
def test_prompts_none_of_which_can_be_used(inputs, tmp_path, settings, caplog):
    data = write_prompts(tmp_path / "p.jsonl", ["", "  "], answer=["a", "b"])
    choice = {"estimator": "full", "bias_positions": "prompt" if settings["targets"] == "all" else "completion"}
    with caplog.at_level(logging.WARNING):
        assert run_here(inputs[0], data, tmp_path / "out", **settings, **choice) == 0
    assert "none of 2 prompts has results" in caplog.text


@pytest.mark.parametrize("targets", [60, 100])
def test_a_long_prompt_leaves_room_for_what_is_written(inputs, tmp_path, targets, caplog):
    data = write_prompts(tmp_path / "p.jsonl", ["x" * 200, "hi"])
    with caplog.at_level(logging.INFO):
        assert run_here(inputs[0], data, tmp_path / "out", targets=targets, estimator="full") == 0
    line = f"this model has {128 - targets} positions for a prompt, beside the {targets} tokens to write"
    assert line in caplog.text
    first, second = open_results(tmp_path / "out")
    assert first.row["truncated"] and first.row["tokens"] == 128 - targets and not second.row["truncated"]
    assert 0 < first.row["targets"] <= targets


def test_a_model_without_a_limit_of_positions_writes(tmp_path):
    folder = save_model(tmp_path / "model", tiny("mamba", torch.float32, vocab_size=VOCABULARY))
    data = write_prompts(tmp_path / "p.jsonl", ["x" * 150, "hi"])
    choice = {"hook_layer_name": 1, "estimator": "full", "targets": 3, "num_singular_values": 4}
    assert run_here(folder, data, tmp_path / "out", **choice) == 0
    assert [record.row["truncated"] for record in open_results(tmp_path / "out")] == [False, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": 4}, "up to 24 for a prompt of 4 targets"),
        ({"targets": 4, "samples": 3}, "up to 72 for a prompt of 12 targets"),
        (COMPLETION, "up to 72 for one of the first 4 prompts of 12 targets"),
        ({"targets": "last"}, None),
        ({"targets": 4, "estimator": "full"}, None),
    ],
)
def test_what_topk_costs_is_said_before_it_begins(inputs, tmp_path, settings, words, caplog):
    with caplog.at_level(logging.INFO):
        assert run_here(*inputs, tmp_path / "out", **settings) == 0
    lines = [r.getMessage() for r in caplog.records]
    told = [line for line in lines if "vectors for each target" in line]
    assert len(told) == (words is not None)
    if words:
        assert told[0].startswith(
            f"estimator topk pulls 6 vectors for each target: {words}; estimator full takes about"
        )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["topk", "full", "sampled"])
@pytest.mark.parametrize("settings", [{"targets": "all"}, {"targets": 4, "samples": 3}, COMPLETION])
def test_few_distributions_are_computed_at_a_time(inputs, tmp_path, monkeypatch, settings, estimator):
    """The rows of the vocabulary that are there together are bounded, whatever the batch, and change nothing."""
    from fisher_vmap import estimators
    from fisher_vmap.linearize import output, scores

    seen = []

    def counted(head, rows, asked=None):
        seen.append(len(rows))
        return output.distribution(head, rows, asked)

    for module in (estimators, scores):
        monkeypatch.setattr(module, "distribution", counted)
    choice = {**settings, "estimator": estimator}
    assert run_here(*inputs, tmp_path / "free", **choice) == 0
    free = max(seen)
    seen.clear()
    monkeypatch.setitem(TARGET_NUMBERS, "cpu", 20 * VOCABULARY)
    assert run_here(*inputs, tmp_path / "bound", **choice) == 0
    longest = max(
        len(record.targets.positions) // settings.get("samples", 1) for record in open_results(tmp_path / "free")
    )
    assert max(seen) <= max(20, longest + 1) < free
    otherwise = 0
    for one, other in zip(*(open_results(tmp_path / name) for name in ("free", "bound")), strict=True):
        if relative(torch.tensor(other.matrix()), torch.tensor(one.matrix())) > 1e-4:
            otherwise += 1
            continue
        np.testing.assert_allclose(other.target_trace, one.target_trace, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(other.targets.positions, one.targets.positions)
        np.testing.assert_allclose(other.position_energy, one.position_energy, rtol=1e-3, atol=1e-6)
    assert otherwise <= (estimator == "sampled")  # rounding may draw one of thousands of tokens otherwise
