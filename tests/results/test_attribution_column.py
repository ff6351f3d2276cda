"""The column "<layer>/attribution" of the prompts table: what is in it, and folders that were made without it."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from results_cases import (
    FINGERPRINT,
    digests,
    make_layout,
    make_prompt,
    make_prompts,
    open_writer,
    without_fields,
    write_folder,
)

from fisher_vmap.errors import UserError
from fisher_vmap.results.index import INDEX_NAME, ShardLayout, entry_name
from fisher_vmap.results.reader import open_results
from fisher_vmap.verify.__main__ import main as verify

WIDTHS = {"model.embed_tokens": 7, "model.layers.1": 5}
BEFORE, NOW = make_layout(WIDTHS, median_norm=False), make_layout(WIDTHS, attribution=True)
COLUMNS = [f"{layer}/attribution" for layer in WIDTHS]


@pytest.mark.parametrize("text", [True, False], ids=["with text", "without"])
def test_the_column_has_a_number_a_position(tmp_path, text):
    layout = NOW.model_copy(update={"store_text": text})
    write_folder(tmp_path, 10, layout)
    table = pq.read_table(tmp_path / "prompts.parquet")
    for layer, column in zip(WIDTHS, COLUMNS, strict=True):
        assert table.schema.field(column).type == pa.list_(pa.float32())
        for record, stored in zip(open_results(tmp_path).at(layer), table.column(column).to_pylist(), strict=True):
            if record.status != "ok":
                assert stored is None
                continue
            expected = make_prompt(record.index, layout).layers[layer].position_energy.astype(np.float32)
            assert np.array_equal(np.float32(stored), expected) and len(stored) == table["tokens"][record.index].as_py()
            assert np.array_equal(record.attribution(), expected)
            assert record.row[column] == stored
    assert verify([str(tmp_path)]) == 0
    assert list(open_results(tmp_path).to_pandas()[COLUMNS[0]][4]) == list(open_results(tmp_path)[4].attribution())


def test_prompts_are_chosen_by_it(tmp_path):
    write_folder(tmp_path, 10, NOW)
    results = open_results(tmp_path)
    column = COLUMNS[0]
    largest = [float(record.attribution().max()) for record in results if record.status == "ok"]
    bound = float(np.median(largest))
    chosen = results.stack(where=lambda row: row[column] is not None and max(row[column]) > bound).S
    assert 0 < len(chosen) == sum(number > bound for number in largest) < len(largest)
    with pytest.raises(UserError, match="holds lists"):
        results.stack(where={column: 1.0})


@pytest.mark.parametrize("first", [0, 4, 7, 10], ids=["nothing", "a shard", "a short shard", "all"])
@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
def test_a_folder_of_before_is_carried_on_as_it_began(tmp_path, first, finished):
    """What it leaves is what the package of before would have left, to the bit."""
    write_folder(tmp_path / "before", 14, BEFORE)
    if first:
        write_folder(tmp_path / "out", first, BEFORE, finish=finished)
    else:
        open_writer(tmp_path / "out", BEFORE)
    write_folder(tmp_path / "out", 14, NOW)
    assert digests(tmp_path / "out") == digests(tmp_path / "before")
    results = open_results(tmp_path / "out", check="full")
    assert not set(COLUMNS) & set(results.table().column_names)
    assert np.array_equal(results[5].attribution(), results[5].position_energy) and len(results[5].attribution())
    assert verify([str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("stopped_at", [0, 1, 2])
def test_entries_of_an_index_that_does_not_know_the_field_count(tmp_path, stopped_at):
    """A run that was killed: its index.json and its entries are as they were written before the fields existed."""
    writer = open_writer(tmp_path, BEFORE)
    writer.missing_shards(12)
    path = tmp_path / INDEX_NAME
    unlisted = path.read_bytes()
    for number in range(stopped_at):
        writer.add(number, make_prompts(4 * number, 4 * number + 4, BEFORE))
    path.write_bytes(unlisted)
    values = without_fields(tmp_path, "pairs", "attribution", "median_norm")
    mark = hashlib.sha256(json.dumps([4, values["layout"], FINGERPRINT], sort_keys=True).encode()).hexdigest()[:16]
    for number in range(stopped_at):
        entry = tmp_path / "shards" / entry_name(number)
        entry.write_text(json.dumps({**json.loads(entry.read_text()), "run": mark}))

    again = open_writer(tmp_path, NOW)
    assert again.index.layout == BEFORE and again.index.mark == mark
    assert [shard.number for shard in again.missing_shards(12)] == list(range(stopped_at, 3))


@pytest.mark.parametrize(
    "change", [{"pairs": 16}, {"attribution": True}, {"median_norm": True}, {"include_rest": True}]
)
def test_runs_of_other_columns_have_other_marks(tmp_path, change):
    """Entries of one kind of run are not taken for those of another."""
    plain = open_writer(tmp_path / "plain", BEFORE).index.mark
    other = BEFORE.model_copy(update=change)
    assert open_writer(tmp_path / "other", other).index.mark != plain


def test_a_layout_says_nothing_of_it_by_default():
    assert not ShardLayout(widths=WIDTHS, top_k=4, rank=3).attribution
