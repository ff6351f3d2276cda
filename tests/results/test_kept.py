"""Kept columns of every type: what the table has, and that `where` and --where find it, from parquet and JSON lines."""

import datetime as dt
import json
import uuid
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_cases import run_here, save_model, texts
from results_cases import digests, make_layout, make_prompt, open_writer

from fisher_vmap.export import condition
from fisher_vmap.results.kept import common_type, kept_column
from fisher_vmap.results.reader import open_results
from fisher_vmap.verify.__main__ import main as verify

UTC = dt.UTC
TIMES = [dt.datetime(2024, 5, 1), dt.datetime(2024, 5, 1, 10, 30), dt.datetime(2024, 5, 2, 23, 59, 59, 123456)]

# name -> values of three prompts, their Arrow type, what --where is given, and the prompts that it finds
TYPES = {
    "date": ([dt.date(2024, 5, 1), dt.date(2024, 5, 2), None], pa.date32(), "2024-05-01", [0]),
    "timestamp": (TIMES, pa.timestamp("us"), "2024-05-01", [0, 1]),
    "exact": (TIMES, pa.timestamp("us"), "2024-05-01 10:30", [1]),
    "iso": (TIMES, pa.timestamp("us"), "2024-05-01T00:00:00", [0]),
    "aware": ([t.replace(tzinfo=UTC) for t in TIMES], pa.timestamp("us", "UTC"), "2024-05-02T23:59:59.123456Z", [2]),
    "numpy": ([np.datetime64("2024-05-01T10:00", "ns"), np.datetime64("NaT"), np.datetime64("2024-05-02", "ns")],
              pa.timestamp("us"), "2024-05-02", [2]),
    "pandas": ([pd.Timestamp(t) for t in TIMES[:2]] + [pd.NaT], pa.timestamp("us"), "2024-05-01", [0, 1]),
    "nanosecond": ([pd.Timestamp(1_000_000_001), pd.Timestamp(2), None], pa.timestamp("ns"), "1970-01-01", [0, 1]),
    "time": ([dt.time(10, 30), dt.time(0), None], pa.time64("us"), "10:30", [0]),
    "duration": ([dt.timedelta(hours=1), pd.Timedelta("1 days"), None], pa.duration("us"), "1 days", [1]),
    "decimal": ([Decimal("1.50"), Decimal("19.99"), None], pa.float64(), "1.5", [0]),
    "price": ([Decimal("1.50"), Decimal("19.99"), Decimal("0.10")], pa.float64(), "0.10", [2]),
    "long": ([Decimal("12345678901234567890.5"), Decimal("1.50"), None], pa.string(), "1.50", [1]),
    "bytes": ([b"abc", "é".encode(), b"\xff\x00"], pa.string(), "abc", [0]),
    "hex": ([b"abc", b"\xff\x00", None], pa.string(), "ff00", [1]),
    "numbers": ([np.float32(0.5), np.int16(3), np.float64(2.5)], pa.float64(), "3", [1]),
    "truth": ([np.bool_(True), np.bool_(False), None], pa.bool_(), "true", [0]),
    "words": ([np.str_("x"), "y", None], pa.string(), "x", [0]),
    "list": ([["a", 1], [], None], pa.string(), '["a", 1]', [0]),
    "array": ([np.arange(2), np.arange(3), None], pa.string(), "[0, 1]", [0]),
    "dict": ([{"day": dt.date(2024, 5, 1), "x": Decimal("0.5"), "n": np.int64(3)}, {}, None], pa.string(),
             '{"day": "2024-05-01", "x": "0.5", "n": 3}', [0]),
    "uuid": ([uuid.UUID(int=7), uuid.UUID(int=8), None], pa.string(), str(uuid.UUID(int=8)), [1]),
    "mixed": ([dt.date(2024, 5, 1), "spring", 3], pa.string(), "2024-05-01", [0]),
    "zones": ([TIMES[0], TIMES[1].replace(tzinfo=UTC), None], pa.string(), "2024-05-01 00:00:00", [0]),
    "nan": ([float("nan"), dt.date(2024, 5, 2), None], pa.date32(), "2024-05-02", [1]),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_the_type_of_a_column_and_what_finds_its_values(tmp_path, name):
    values, kind, words, expected = TYPES[name]
    assert kept_column(values).type == kind
    layout = make_layout(keep_columns=("it",))
    writer = open_writer(tmp_path, layout, shard_size=2)  # the second shard may hold nothing but None
    for number, start, stop in writer.missing_shards(3):
        writer.add(number, [make_prompt(i, layout, kept={"it": values[i]}) for i in range(start, stop)])
    writer.finish(settings={})
    results = open_results(tmp_path, check="full")
    table = results.table()
    assert table.schema.field("it").type == kind
    assert not any('"' in str(value) for value in table["it"].to_pylist()) or name in ("list", "dict")
    where = condition(results, f"it={words}")
    mean = np.mean([results[i].matrix() for i in expected], 0)
    np.testing.assert_allclose(results.mean(where=where), mean, rtol=1e-5, atol=1e-6)
    # The value itself finds its row, unless it is none, or means several values.
    first = expected[0]
    if name not in ("list", "array", "nan"):
        chosen = results.stack(where={"it": values[first]})
        assert any(np.array_equal(S, results[first].S) for S in chosen.S)
    assert verify([str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("first", "second", "kind", "found"),
    [
        ([TIMES[0], None], ["spring", None], pa.string(), ["2024-05-01 00:00:00", None, "spring", None]),
        ([dt.date(2024, 5, 1), None], [TIMES[1], None], pa.string(), ["2024-05-01", None, "2024-05-01 10:30:00", None]),
        ([None, None], [dt.date(2024, 5, 1), None], pa.date32(), [None, None, dt.date(2024, 5, 1), None]),
        ([dt.timedelta(1), None], [3, None], pa.string(), ["1 day, 0:00:00", None, "3", None]),
        ([Decimal("1.5"), None], [2, None], pa.float64(), [1.5, None, 2.0, None]),
        (['"2024-05-01"', None], [dt.date(2024, 5, 1), None], pa.string(), ['"2024-05-01"', None, "2024-05-01", None]),
    ],
)
def test_shards_of_different_types(tmp_path, first, second, kind, found):
    """The last case is a run that an older version began."""
    assert common_type({kept_column(first).type, kept_column(second).type}) == kind
    layout = make_layout(keep_columns=("it",))
    for values, numbers in ((first, [0]), (second, [0, 1])):
        writer = open_writer(tmp_path, layout, shard_size=2)
        for number, start, stop in writer.missing_shards(4):
            if number in numbers:
                writer.add(number, [make_prompt(i, layout, kept={"it": values[i % 2]}) for i in range(start, stop)])
    writer.finish(settings={})
    assert open_results(tmp_path, check="full").table()["it"].to_pylist() == found
    assert verify([str(tmp_path)]) == 0


def columns(count):
    return {
        "day": [dt.date(2024, 5, 1 + i % 3) for i in range(count)],
        "at": [dt.datetime(2024, 5, 1 + i % 3, i % 24) for i in range(count)],
        "price": [Decimal(f"{i}.50") for i in range(count)],
        "wait": [dt.timedelta(minutes=i) for i in range(count)],
        "clock": [dt.time(i % 24, 30) for i in range(count)],
        "blob": [f"b{i % 2}".encode() for i in range(count)],
        "tags": [["x"] * (i % 2) for i in range(count)],
        "n": pa.array([i % 4 for i in range(count)], pa.int8()),
    }


WORDS = {
    "day=2024-05-02": [1, 4, 7, 10], "at=2024-05-02": [1, 4, 7, 10], "price=3.5": [3], "blob=b1": [1, 3, 5, 7, 9],
    'tags=["x"]': [1, 3, 5, 7, 9], "n=2": [2, 6, 10], "clock=04:30": [4],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_run_keeps_them_and_resumes(tmp_path, model, form):
    count, kept = 11, columns(11)
    data = tmp_path / f"data.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"prompt": texts(count), **kept}), data)
        words = {**WORDS, "wait=0:05:00": [5]}
    else:  # text, as JSON has no such types
        rows = [
            {"prompt": text}
            | {name: str(values[i]) for name, values in kept.items() if name not in ("blob", "tags", "n")}
            | {"blob": kept["blob"][i].decode(), "tags": kept["tags"][i], "n": i % 4}
            for i, text in enumerate(texts(count))
        ]  # fmt: skip
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = WORDS | {"price=3.50": [3], "clock=04:30:00": [4], "wait=0:05:00": [5], "at=2024-05-02 01:00:00": [1]}
        words = {
            word: found for word, found in words.items() if word not in ("at=2024-05-02", "price=3.5", "clock=04:30")
        }
    options = {"keep_columns": ",".join(kept), "shard_size": 4}
    out = tmp_path / "out"
    assert run_here(model, data, out, **options) == 0
    whole = digests(out)
    results = open_results(out, check="full")
    for word, expected in words.items():
        stack = results.stack(where=condition(results, word))
        np.testing.assert_array_equal(stack.S, results.stack(where=expected).S, err_msg=word)
    frame = results.to_pandas()
    if form == "parquet":
        assert frame["day"].iloc[0] == dt.date(2024, 5, 1) and frame["at"].dt.hour.tolist() == list(range(11))
        assert frame["price"].sum() == sum(range(11)) + 5.5 and frame["wait"].max() == pd.Timedelta(minutes=10)
        assert frame["n"].tolist() == [i % 4 for i in range(11)]
    assert not frame[[*kept]].map(lambda value: str(value).startswith('"')).any(axis=None)
    (out / "shards" / "shard-00001.parquet").unlink()
    assert run_here(model, data, out, **options) == 0
    assert digests(out) == whole
