"""Attribution in what a run leaves: the column of new runs, runs of means, and runs begun before there was one."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_cases import VOCABULARY, run_here, texts, tiny_tokenizer, write_prompts
from models import tiny
from oracles import log_probabilities, position_scores, relative

from fisher_vmap import open_results
from fisher_vmap.run import open as opening
from fisher_vmap.verify.__main__ import main as verify

LAYER = "model.embed_tokens"
COLUMN = f"{LAYER}/attribution"
PROMPTS = [*texts(7), "", "x" * 90]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "p.jsonl", PROMPTS)


def truth(text, top_k):
    """Plain autograd in float64, one token after the other."""
    ids = tiny_tokenizer().apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    row, model = torch.tensor(ids["input_ids"]), tiny("llama", vocab_size=VOCABULARY)
    log_p = log_probabilities(model, row).detach()
    tokens = log_p.sort(descending=True, stable=True).indices[:top_k]
    return torch.einsum("k,ktd->t", log_p[tokens].exp(), position_scores(model, row, LAYER, tokens) ** 2)


def test_the_table_has_what_plain_autograd_gives(model, data, tmp_path):
    assert run_here(model, data, tmp_path / "out", hook_layer_name=LAYER, top_k_tokens=6) == 0
    rows = pq.read_table(tmp_path / "out" / "prompts.parquet").to_pylist()
    for row, record in zip(rows, open_results(tmp_path / "out"), strict=True):
        if row["status"] != "ok":
            assert row[COLUMN] is None
            continue
        assert len(row[COLUMN]) == row["tokens"] == len(row["prompt_tokens"])
        assert np.array_equal(np.float32(row[COLUMN]), record.attribution())
        assert relative(torch.tensor(row[COLUMN]), truth(row["text"], 6)) < 1e-4
    assert verify([str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("choice", "there"),
    [
        ({}, True),
        ({"save": "prompts"}, True),
        ({"store_text": "false"}, True),
        ({"targets": "3", "num_prompts": "3"}, True),
        ({"save": "mean"}, False),
    ],
)
def test_which_runs_have_the_column(model, data, tmp_path, choice, there):
    settings = {"hook_layer_name": f"{LAYER},1", "shard_size": 4, **choice}
    assert run_here(model, data, tmp_path / "out", **settings) == 0
    names = pq.read_schema(tmp_path / "out" / "prompts.parquet").names
    assert [name for name in names if name.endswith("/attribution")] == (
        [COLUMN, "model.layers.1/attribution"] if there else []
    )


@pytest.mark.parametrize("stored", [4, 9])
@pytest.mark.parametrize("choice", [{}, {"hook_layer_name": f"{LAYER},1"}, {"save": "mean"}])
def test_a_run_begun_before_there_was_a_column_goes_on(model, data, tmp_path, monkeypatch, stored, choice):
    settings = {"hook_layer_name": LAYER, "shard_size": 4, **choice}
    now, older = opening.layout_of, {"attribution": False, "median_norm": False}
    with monkeypatch.context() as before:
        before.setattr(opening, "layout_of", lambda *given: now(*given).model_copy(update=older))
        assert run_here(model, data, tmp_path / "out", num_prompts=stored, **settings) == 0
    assert run_here(model, data, tmp_path / "out", num_prompts=9, **settings) == 0
    results = open_results(tmp_path / "out", check="full")
    assert len(results) == 9 and not [name for name in results.table().column_names if name.endswith("/attribution")]
    if choice.get("save") != "mean":
        assert [len(record.attribution()) for record in results if record.status == "ok"] == [
            tokens for tokens, status in zip(*results.to_pandas()[["tokens", "status"]].T.values, strict=True)
            if status == "ok"
        ]  # fmt: skip
    assert verify([str(tmp_path / "out")]) == 0
    assert run_here(model, data, tmp_path / "out", overwrite="true", num_prompts=9, **settings) == 0
    names = pq.read_schema(tmp_path / "out" / "prompts.parquet").names
    assert (COLUMN in names) == (choice.get("save") != "mean")
