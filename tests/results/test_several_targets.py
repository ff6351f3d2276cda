"""Folders of several targets in the hands of everything that reads a folder, and the note where one target is none."""

import hashlib
import logging
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_cases import TARGET_RUNS, VOCABULARY, run_here, run_targets, save_model, texts, write_prompts
from models import fresh
from results_cases import make_layout, make_prompt, open_writer

from fisher_vmap.errors import UserError
from fisher_vmap.export import main as export
from fisher_vmap.finish import main as finish
from fisher_vmap.info import main as info
from fisher_vmap.results.card import data_card
from fisher_vmap.results.hub import _copy_without_text
from fisher_vmap.results.index import read_index, write_index
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.same_prompts import other_settings
from fisher_vmap.results.targets import note_of
from fisher_vmap.verify.__main__ import main as verify

NOTE = "the next token is certain (p > 0.999) for {} of {} prompts: F of one target is nearly nothing there; " \
       "use --targets completion, or a number"  # fmt: skip


@pytest.fixture(scope="module", params=TARGET_RUNS)
def made(request, tmp_path_factory):
    return request.param, run_targets(tmp_path_factory.mktemp(request.param), request.param)


def test_verify_finds_it_sound(made, capsys):
    _, folder = made
    assert verify([str(folder)]) == 0
    assert "is sound" in capsys.readouterr().out


def test_the_records_and_the_stack_agree(made):
    _, folder = made
    results = open_results(folder, check="full")
    for layer in results.layers:
        stack = results.stack(layer, where={"status": "ok"})
        records = [record for record in results.at(layer) if record.status == "ok"]
        assert len(stack.S) == len(records) == 5
        for S, V, Q, record in zip(*stack, records, strict=True):
            assert np.array_equal(S, record.S) and np.array_equal(V, record.V) and np.array_equal(Q, record.Q)
            assert len(record.top_tokens) == len(record.token_ids) == len(record.token_targets)
            pads = record.token_ids < 0
            assert all(text == "" for text, pad in zip(record.top_tokens, pads, strict=True) if pad)
            assert np.array_equal(pads, record.token_targets < 0) and np.isfinite(record.trades()).all()


def test_completions_that_the_data_give_are_compared(tmp_path):
    """What the model writes is not of the data, and another file is told."""
    model, answers = save_model(tmp_path / "model"), [f"answer number {i}" for i in range(5)]
    results = {}
    for name, changed, targets in (("a", 0, "completion"), ("b", 1, "completion"), ("written", 1, 2)):
        words = [*answers[:3], "another" if changed else answers[3], answers[4]]
        data = write_prompts(tmp_path / f"{name}.jsonl", texts(5), completion=words)
        assert run_here(model, data, tmp_path / name, targets=targets) == 0
        results[name] = open_results(tmp_path / name)
    line = (
        r"^the completion of prompt 3 is 'answer number 3' in .*a and 'another' in .*b; compare two runs over the same"
    )
    with pytest.raises(UserError, match=line):
        results["a"].compare(results["b"])
    assert len(results["a"].compare(results["written"]).cosine) == 5
    assert {"data", "targets"} <= set(other_settings(results["a"].index, results["written"].index))


def test_it_is_compared_with_itself(made):
    _, folder = made
    results = open_results(folder)
    found = results.compare(results)
    assert np.allclose(found.cosine, 1) and (found.change < 1e-7).all() and (found.directions.ratios < 1).all()
    changes = {}
    for prompt in found.prompt_index.tolist():
        record = results[prompt]
        along = record.scores().astype(float) @ found.directions.directions[0]
        for token, change in zip(record.token_ids.tolist(), np.exp(record.log_probs) * along, strict=True):
            changes[token] = changes.get(token, 0) + change
    (traded, *_) = found.all.tokens
    assert traded.up + traded.down
    for token in traded.up + traded.down:
        assert token.token_id >= 0 and token.change == pytest.approx(changes[token.token_id], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("ending", ["safetensors", "gguf", "json", "npz"])
def test_directions_are_exported(made, ending, tmp_path, capsys):
    _, folder = made
    layer = ["--layer", "2" if len(open_results(folder).layers) > 1 else "1"]
    for more in ([], ["--prompt", "1"]) if ending != "npz" else ([],):
        assert export([str(folder), str(tmp_path / f"out.{ending}"), *layer, *more]) == 0
    assert "out." in capsys.readouterr().out


def test_the_card_says_what_the_matrices_are_of(made):
    kind, folder = made
    results = open_results(folder)
    card = data_card(results.index, results.metadata, results.to_pandas(), "a/b", True)
    assert "nan" not in card.lower().replace("finance", "") and "the next-token distributions at its targets" in card
    words = {"samples": "2 samples, drawn at temperature 1 with seed 0", "written": "the likeliest",
             "completion": "the tokens of a given completion", "all": "the token after each position"}  # fmt: skip
    assert words[kind] in re.sub(r"&#\d+;", "", card)


def test_a_copy_without_text_has_no_completion(made, tmp_path):
    _, folder = made
    _copy_without_text(folder, read_index(folder), tmp_path / "copy")
    assert verify([str(tmp_path / "copy")]) == 0
    for record in open_results(tmp_path / "copy"):
        assert record.text is None and record.completions is None and record.completion_ids is None
        assert record.status != "ok" or record.targets is not None


def test_info_says_which_targets_and_which_estimator(made, capsys):
    kind, folder = made
    assert info([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("targets"))
    table = open_results(folder).to_pandas().query("status == 'ok'")
    assert f"{table['targets'].sum():,.0f} in all, {table['targets'].mean():.3g} a prompt" in lines[at + 1]
    assert f"entropy {table['mean_entropy'].mean():.3g} nats" in lines[at + 1]
    assert f"log p of what follows {table['mean_log_prob'].mean():.3g}" in lines[at + 1]
    estimator = TARGET_RUNS[kind].get("estimator", "topk")
    assert lines[at + 2].startswith(f"matrix    estimator {estimator}, 6 tokens a target, 24 (target, token) pairs")
    assert ("2 samples" in lines[at]) == (kind == "samples")
    assert not any(line.startswith("note") for line in lines)


@pytest.mark.parametrize("column", ["token_targets", "target_entropy", "target_positions"])
def test_verify_sees_lists_that_do_not_fit_the_arrays(tmp_path, column, capsys):
    folder = run_targets(tmp_path, "written")
    index = read_index(folder)
    path = folder / "shards" / index.shards[0].table
    table = pq.read_table(path)
    values = [None if x is None else x[:-1] for x in table.column(column).to_pylist()]
    place = table.schema.get_field_index(column)
    table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    pq.write_table(table, path)
    data = path.read_bytes()
    entry = index.shards[0].model_copy(
        update={"table_sha256": hashlib.sha256(data).hexdigest(), "table_bytes": len(data)}
    )
    write_index(folder, index.model_copy(update={"shards": (entry, *index.shards[1:])}))
    assert verify([str(folder)]) == 1
    assert "the tokens of prompt 0 are not the table's" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    """A model whose next token is nearly always the same."""
    model = fresh("llama", torch.float32, vocab_size=VOCABULARY, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("sure")
    with torch.no_grad():
        model.lm_head.weight.mul_(400)
    return save_model(folder / "model", model), write_prompts(folder / "prompts.jsonl", texts(7))


@pytest.mark.parametrize("more", [{}, {"save": "mean"}, {"estimator": "full"}, {"include_rest": "true"}], ids=str)
def test_a_next_token_that_is_certain_is_noted_everywhere(sure, more, tmp_path, caplog, capsys):
    model, data = sure
    with caplog.at_level(logging.WARNING, "fisher_vmap"):
        assert run_here(model, data, tmp_path / "out", **more) == 0
    table = open_results(tmp_path / "out").to_pandas()
    certain = int((table["top_probability"] > 0.999).sum())
    assert certain > 3
    note = NOTE.format(certain, 7)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING][-1:] == [note]
    assert info([str(tmp_path / "out")]) == 0 and capsys.readouterr().out.splitlines()[-1] == f"note      {note}"
    assert finish([str(tmp_path / "out")]) == 0 and capsys.readouterr().out.splitlines()[-1] == note
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    from fisher_vmap.report.data import Sampling, survey
    from fisher_vmap.report.page import render_page

    page = render_page(survey(open_results(tmp_path / "out"), Sampling()))
    assert note.replace(">", "&gt;") in page.replace("&#62;", "&gt;")


def test_other_targets_have_no_such_note(sure, tmp_path, caplog, capsys):
    model, data = sure
    assert run_here(model, data, tmp_path / "out", targets=2) == 0
    assert info([str(tmp_path / "out")]) == 0
    assert "is certain" not in caplog.text + capsys.readouterr().out


@pytest.mark.parametrize(("certain", "of", "noted"), [(0, 0, False), (1, 2, False), (2, 3, True), (5, 5, True)])
def test_most_is_more_than_half(certain, of, noted):
    p = np.array([0.9995] * certain + [0.9989] * (of - certain))
    assert note_of(p) == (NOTE.format(certain, of) if noted else None)


def surely(index, layout, p):
    prompt = make_prompt(index, layout)
    rest = np.log((1 - p) / 3 / 2)
    log_probs = np.array([np.log(p), *[rest] * 3], np.float32)
    return type(prompt)(**{**vars(prompt), "log_probs": log_probs})


@pytest.mark.parametrize(("p", "noted"), [(0.9999, True), (0.998, False), (0.5, False)])
@pytest.mark.parametrize("finished", [True, False])
def test_folders_of_before_have_no_such_column(tmp_path, monkeypatch, p, noted, finished, capsys):
    """0.998 is not certain, though the tokens together may be more than that."""
    from fisher_vmap.results import shard

    whole = shard.rows_table

    def before(*arguments):
        return whole(*arguments).drop_columns(["top_probability"])

    monkeypatch.setattr(shard, "rows_table", before)
    layout = make_layout()
    writer = open_writer(tmp_path, layout)
    for number, start, stop in writer.missing_shards(6):
        writer.add(number, [surely(i, layout, p) for i in range(start, stop)])
    if finished:
        writer.finish(settings={})
    monkeypatch.setattr(shard, "rows_table", whole)
    results = open_results(tmp_path, allow_incomplete=True)
    assert "top_probability" not in results.table().schema.names
    assert info([str(tmp_path)]) == 0
    assert (NOTE.format(6, 6) in capsys.readouterr().out) == noted


def test_a_folder_of_before_is_continued(tmp_path, monkeypatch):
    """Shards without a column beside shards with it, whichever is the first."""
    from fisher_vmap.results import shard

    whole, layout = shard.rows_table, make_layout()
    for name, old in (("first", {0}), ("second", {1})):
        writer = open_writer(tmp_path / name, layout)
        for number, start, stop in writer.missing_shards(8):
            monkeypatch.setattr(
                shard,
                "rows_table",
                lambda *a, number=number, old=old: whole(*a).drop_columns(["top_probability"] * (number in old)),
            )
            writer.add(number, [make_prompt(i, layout) for i in range(start, stop)])
        monkeypatch.setattr(shard, "rows_table", whole)
        writer.finish(settings={})
        assert open_results(tmp_path / name).table().num_rows == 8 and verify([str(tmp_path / name)]) == 0
        assert info([str(tmp_path / name)]) == 0
