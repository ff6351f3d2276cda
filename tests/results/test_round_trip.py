"""What is written is what is read: records, stacks, the table, the metadata, in float32 and float16."""

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from results_cases import RESOLVED, factor, make_layout, make_prompt, make_prompts, open_writer, write_folder
from safetensors import safe_open

from fisher_vmap.errors import UserError
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.record import effective_rank

TWO = {"model.layers.0": 7, "model.layers.1": 5}


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "results"
    layout = make_layout(TWO, keep_columns=("source",))
    write_folder(folder, 10, layout)
    return folder, layout


def test_a_record_is_the_prompt_that_was_written(two_layers):
    folder, layout = two_layers
    results = open_results(folder, check="full")
    assert len(results) == 10 and results.layers == tuple(TWO)
    for layer in TWO:
        view = results.at(layer)
        for index in (0, 1, 4, 9, -1):
            expected = make_prompt(index % 10, layout)
            record = view[index]
            for name in ("S", "V", "Q", "position_energy"):
                written = np.asarray(getattr(expected.layers[layer], name), np.float32)
                assert np.array_equal(getattr(record, name), written)
                assert getattr(record, name).dtype == np.float32
            assert record.layer == layer and record.residual_norm == 3.0 + index % 10
            assert record.trace == expected.layers[layer].trace
            assert np.array_equal(record.token_ids, expected.token_ids)
            assert np.array_equal(record.log_probs, expected.log_probs)
            assert record.mass == pytest.approx(np.exp(expected.log_probs.astype(float)).sum(), abs=1e-12)
            assert (record.text, record.status, record.reason) == (expected.text, "ok", None)
            assert record.row["source"] == f"source {index % 2}" and "crc32" not in record.row


def test_algebra_of_a_record_against_dense_matrices(tmp_path):
    layout = make_layout(rank=4)  # R = K: nothing is lost
    write_folder(tmp_path, 5, layout)
    record = open_results(tmp_path)[1]
    A, log_probs = factor(1, 0, 4, 7)
    F = A.T @ A
    x = np.random.default_rng(0).normal(size=(7, 3))
    assert np.allclose(record.matrix(), F, rtol=0, atol=1e-5 * np.abs(F).max())
    assert np.allclose(record.U @ np.diag(record.S) @ record.V, F, rtol=0, atol=1e-5 * np.abs(F).max())
    assert np.allclose(record.matvec(x), F @ x, atol=1e-5 * np.abs(F @ x).max())
    assert np.allclose(record.matvec(x[:, 0]), F @ x[:, 0], atol=1e-5 * np.abs(F @ x).max())
    scores = A / np.exp(0.5 * log_probs.astype(float))[:, None]
    assert np.allclose(record.scores(), scores, atol=1e-5 * np.abs(scores).max())


def test_prompts_without_numbers_keep_their_index(two_layers):
    results = open_results(two_layers[0])
    for index, status, reason in ((2, "failed", "not finite"), (3, "skipped", "empty prompt")):
        record = results[index]
        assert (record.status, record.reason) == (status, reason)
        assert np.isnan(record.S).all() and np.isnan(record.V).all() and np.isnan(record.log_probs).all()
        assert (record.token_ids == -1).all() and record.position_energy.shape == (0,)
        assert np.isnan(record.mass) and np.isnan(record.trace) and reason in repr(record)
    assert results.metadata["failed_prompts"] == [{"index": 2, "reason": "not finite"}]
    assert results.metadata["skipped_prompts"] == [{"index": 3, "reason": "empty prompt"}]


def test_sequence_protocol(two_layers):
    results = open_results(two_layers[0])
    assert [record.index for record in results] == list(range(10))
    assert [record.index for record in results[2:8:3]] == [2, 5]
    assert results[np.int64(4)].index == 4
    for index in (10, -11):
        with pytest.raises(IndexError, match="of 10"):
            results[index]
    with pytest.raises(TypeError):
        results[1.5]
    with pytest.raises(UserError, match=r"'nowhere' was not hooked in .*; there is model\.layers\.0, model\.layers\.1"):
        results.at("nowhere")
    assert "10 prompts at model.layers.1 (one of 2 layers), 4 tokens, rank 3, width 7/5, float32, complete" in repr(
        results.at("model.layers.1")
    )
    results[0]
    assert np.array_equal(pickle.loads(pickle.dumps(results))[0].S, results[0].S)


def test_stack(two_layers):
    results = open_results(two_layers[0])
    stack = results.stack("model.layers.1")
    assert (stack.S.shape, stack.V.shape, stack.Q.shape) == ((10, 3), (10, 3, 5), (10, 4, 3))
    for index, record in enumerate(results.at("model.layers.1")):
        assert np.array_equal(stack.V[index], record.V, equal_nan=True)
        assert np.array_equal(stack.Q[index], record.Q, equal_nan=True)


def test_table(two_layers):
    table = open_results(two_layers[0]).to_pandas()
    assert isinstance(table, pd.DataFrame) and not any("crc32" in column for column in table.columns)
    assert list(table["prompt_index"]) == list(range(10)) and list(table["source_row"]) == list(range(10, 20))
    row, expected = table.iloc[4], make_prompt(4, two_layers[1]).layers["model.layers.1"]
    assert row["tokens"] == len(expected.position_energy) and not row["truncated"]
    assert row["model.layers.1/trace"] == expected.trace
    assert row["model.layers.1/trace_norm2"] == pytest.approx(expected.trace * 7.0**2)
    assert row["model.layers.1/effective_rank"] == pytest.approx(effective_rank(expected.S))
    assert table["mass"].isna().sum() == 2


def test_effective_rank_counts_equal_directions():
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.array([5.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(np.zeros(3)) == 0.0


def test_names_and_dtypes_of_a_shard(tmp_path):
    write_folder(tmp_path, 5, make_layout(vectors_dtype="float16"))
    with safe_open(tmp_path / "shards" / "shard-00000.safetensors", framework="np") as shard:
        found = {name: (shard.get_slice(name).get_dtype(), shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        offsets = shard.get_tensor("position_offsets")
        assert list(shard.get_tensor("prompt_index")) == [0, 1, 2, 3]
    assert found == {
        "prompt_index": ("I64", [4]), "position_offsets": ("I64", [5]),
        "token_ids": ("I64", [4, 4]), "log_probs": ("F32", [4, 4]),
        "blocks.0/S": ("F32", [4, 3]), "blocks.0/V": ("F16", [4, 3, 7]), "blocks.0/Q": ("F32", [4, 4, 3]),
        "blocks.0/residual_norm_median": ("F32", [4]), "blocks.0/position_energy": ("F32", [int(offsets[-1])]),
    }  # fmt: skip
    assert offsets[2] == offsets[3] == offsets[4]  # prompts 2 and 3 have no numbers


def test_float16_vectors_read_as_float32_of_the_stored_value(tmp_path):
    layout = make_layout(vectors_dtype="float16")
    write_folder(tmp_path, 5, layout)
    record = open_results(tmp_path)[1]
    written = make_prompt(1, layout).layers["blocks.0"].V.astype(np.float16)
    assert record.V.dtype == np.float32 and np.array_equal(record.V, written.astype(np.float32))


def test_rank_above_the_number_of_tokens_is_padded_as_given(tmp_path):
    write_folder(tmp_path, 5, make_layout(rank=6))
    record = open_results(tmp_path)[0]
    assert record.S.shape == (6,) and (record.S[4:] == 0).all() and (record.V[4:] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": np.zeros(3)}, r"prompt 0: log_probs has shape \(3,\), not \(4,\)"),
        ({"log_probs": np.array([0, 0, np.nan, 0])}, "prompt 0: log_probs is not finite; record the prompt as failed"),
        ({"token_ids": None}, "prompt 0: token_ids has shape"),
        ({"layers": {}}, "prompt 0 has no result for layer blocks.0"),
    ],
)
def test_wrong_arrays_are_not_stored(tmp_path, changes, message):
    layout = make_layout()
    writer = open_writer(tmp_path, layout)
    with pytest.raises(ValueError, match=message):
        writer.add(0, [make_prompt(0, layout, **changes)])
    assert not list((tmp_path / "shards").iterdir())


def test_prompts_of_another_shard_are_not_stored(tmp_path):
    layout = make_layout()
    writer = open_writer(tmp_path, layout)
    for prompts in ([make_prompt(1, layout)], make_prompts(0, 5, layout), []):
        with pytest.raises(ValueError, match="shard 0 begins with prompt 0 and holds at most 4"):
            writer.add(0, prompts)
    with pytest.raises(ValueError, match="not consecutive"):
        writer.add(0, [make_prompt(0, layout), make_prompt(2, layout)])


def test_kept_columns_of_any_type(tmp_path):
    layout = make_layout(keep_columns=("number", "mixed", "nested", "half", "later"))
    writer = open_writer(tmp_path, layout, shard_size=2)
    writer.missing_shards(4)
    kept = [
        {"number": 1, "mixed": 1, "nested": {"a": [1]}, "half": "\ud800", "later": None},
        {"number": np.int64(2), "mixed": "two", "nested": None, "half": None, "later": None},
        {"number": 2.5, "mixed": 3, "nested": [], "half": "b", "later": 7},
        {"number": None, "mixed": 2**70, "nested": None, "half": "c", "later": True},
    ]
    prompts = [make_prompt(i, layout, kept=values) for i, values in enumerate(kept)]
    writer.add(0, prompts[:2])
    writer.add(1, prompts[2:])
    writer.finish(settings={})
    table = open_results(tmp_path, check="full").table()
    assert table.column("number").to_pylist() == [1.0, 2.0, 2.5, None]
    assert table.column("mixed").to_pylist() == ["1", "two", "3", str(2**70)]
    assert table.column("nested").to_pylist() == ['{"a": [1]}', None, "[]", None]
    assert table.column("half").to_pylist() == ["?", None, "b", "c"]
    assert table.column("later").to_pylist() == [None, None, "7", "true"]


def test_text_is_left_out_when_asked(tmp_path):
    write_folder(tmp_path, 5, make_layout(store_text=False))
    assert open_results(tmp_path)[0].text is None
    assert open_results(tmp_path).table().column("text").null_count == 5


def test_metadata_and_index(two_layers):
    results = open_results(two_layers[0])
    metadata = results.metadata
    assert metadata["num_prompts"] == 10 and metadata["num_singular_values"] == 3
    assert metadata["bias_dim"] == TWO and metadata["settings"]["output_dir"] == "somewhere"
    assert metadata["resolved"] == RESOLVED == results.index.resolved
    assert metadata["versions"]["numpy"] == np.__version__


def test_one_width_is_one_number(tmp_path):
    write_folder(tmp_path, 4)
    assert open_results(tmp_path).metadata["bias_dim"] == 7


def test_an_unfinished_folder_opens_when_asked(tmp_path):
    layout = make_layout()
    writer = open_writer(tmp_path, layout)
    writer.missing_shards(12)
    writer.add(1, make_prompts(4, 8, layout))
    with pytest.raises(
        UserError, match=r"is unfinished: 4 of 12 prompts are stored; give the command of its run again"
    ):
        open_results(tmp_path)
    results = open_results(tmp_path, allow_incomplete=True)
    assert len(results) == 4 and [record.index for record in results] == [4, 5, 6, 7] and "unfinished" in repr(results)
    with pytest.raises(IndexError, match="prompt 1 is not stored yet"):
        results[1]
    assert results.metadata["settings"] == {} and results.to_pandas()["prompt_index"].tolist() == [4, 5, 6, 7]
    assert np.isfinite(results.mean()).all()


def test_an_empty_unfinished_folder(tmp_path):
    open_writer(tmp_path)
    results = open_results(tmp_path, allow_incomplete=True)
    assert len(results) == 0 and list(results) == [] and len(results.to_pandas()) == 0
    assert np.isnan(results.mean()).all() and results.stack().S.shape == (0, 3)


def test_reading_needs_no_torch():
    code = "import sys, fisher_vmap.verify; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
