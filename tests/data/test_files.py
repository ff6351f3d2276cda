"""Local files: which rows a file of each form holds, what is said about it, what is refused, how rows are counted."""

import bz2
import gzip
import io
import json
import logging
import lzma
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from fisher_vmap.data.files import Count, Extent, count_rows, read_rows, table_of_files
from fisher_vmap.data.local_files import SUFFIXES, find_data_files, kind_of
from fisher_vmap.errors import UserError

ROWS = [{"prompt": f"prompt {number}, “quoted”", "id": f"n{number}"} for number in range(5)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def arrow_bytes(rows, new_writer):
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with new_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def parquet_bytes(rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def delimited(rows, delimiter):
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in cells)


def zst(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


def pretty(value):
    return json.dumps(value, indent=2)


# file, content, its rows, and what is said about it.
FORMS = [
    ("a.jsonl", JSON_LINES, ROWS, None),
    ("A.JSONL", "\ufeff" + JSON_LINES, ROWS, None),
    ("a.ndjson", JSON_LINES.replace("\n", "\r\n"), ROWS, None),
    ("a.jsonlines", JSON_LINES.replace("\n", "\n\n"), ROWS, None),
    ("a.jsonl", pretty(ROWS), ROWS, None),
    ("a.jsonl", json.dumps(ROWS), ROWS, None),
    ("a.jsonl", json.dumps({"prompt": "one", "data": [{"a": 1}]}), [{"prompt": "one", "data": [{"a": 1}]}], None),
    ("a.json", JSON_LINES, ROWS, None),
    ("a.json", "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]", ROWS, None),
    ("a.json", "[" + ",\n ".join(json.dumps(row) for row in ROWS) + "]", ROWS, None),
    ("a.jsonl", "[" + ",\n ".join(json.dumps(row) for row in ROWS) + "]", ROWS, None),
    ("a.json", json.dumps(ROWS), ROWS, None),
    ("a.json", "\n\n" + pretty(ROWS), ROWS, None),
    ("a.json", pretty({"data": ROWS}), ROWS, "its rows are the list 'data'"),
    ("a.json", json.dumps({"data": ROWS}), ROWS, "its rows are the list 'data'"),
    ("a.json", pretty({"version": 1, "data": ROWS}), ROWS, "the list 'data'; version beside it is left out"),
    ("a.json", pretty({"data": ROWS, "tags": [{"a": 1}]}), ROWS, "the list 'data'; tags beside it is left out"),
    ("a.json", pretty({"info": {"by": "me"}, "examples": ROWS}), ROWS, "the list 'examples'; info beside it"),
    ("a.json", pretty({"data": TURNS, "id": 1}), [{"data": TURNS, "id": 1}], "taken for one row"),
    ("a.json", pretty(COLUMNS), ROWS, "an object of columns"),
    ("a.json", json.dumps(COLUMNS), ROWS, "an object of columns"),
    ("a.json", pretty({"prompt": ["a", "b"], "meta": [{"x": 1}, {"x": 2}]}),
     [{"prompt": "a", "meta": {"x": 1}}, {"prompt": "b", "meta": {"x": 2}}], "an object of columns"),
    ("a.json", pretty({name: {str(i): x for i, x in enumerate(column)} for name, column in COLUMNS.items()}),
     ROWS, "an object of columns"),
    ("a.json", pretty({"columns": list(COLUMNS), "index": [0], "data": [list(row.values()) for row in ROWS]}),
     ROWS, "the list 'data', with the names in 'columns'"),
    ("a.json", pretty({f"q{i}": row for i, row in enumerate(ROWS)}), ROWS, "the 5 objects in its object"),
    ("a.json", pretty(ROWS[0]), ROWS[:1], "taken for one row"),
    ("a.json", json.dumps(ROWS[0]), ROWS[:1], "taken for one row"),
    ("a.json", pretty({"messages": TURNS}), [{"messages": TURNS}], "taken for one row"),
    ("a.json", pretty({"prompt": "x", "tools": [{"name": "f"}]}), [{"prompt": "x", "tools": [{"name": "f"}]}],
     "taken for one row"),
    ("a.csv", delimited(ROWS, ","), ROWS, None),
    ("a.csv", '\ufeffprompt,id\n"two\nlines, ""quoted""",1\n\n" ",2\n',
     [{"prompt": 'two\nlines, "quoted"', "id": "1"}, {"prompt": " ", "id": "2"}], None),
    ("a.tsv", delimited(ROWS, "\t"), ROWS, None),
    ("a.tsv", 'prompt\tid\nsay "hi", now\t1\n', [{"prompt": 'say "hi", now', "id": "1"}], None),
    ("a.txt", " " * 90 + "\n  one\n" + "\u3000" * 40 + "\n\x7f\nü\n",
     [{"text": "  one"}, {"text": "\x7f"}, {"text": "ü"}], None),
    ("a.txt", "\ufeffone\r\n\n \u3000\ntwo, 2", [{"text": "one"}, {"text": "two, 2"}], None),
    ("a.parquet", parquet_bytes(ROWS), ROWS, None),
    ("a.arrow", arrow_bytes(ROWS, pyarrow.ipc.new_stream), ROWS, None),
    ("a.arrow", arrow_bytes(ROWS, pyarrow.ipc.new_file), ROWS, None),
]  # fmt: skip
PACKERS = {"": lambda content: content, ".gz": gzip.compress, ".zst": zst, ".bz2": bz2.compress, ".xz": lzma.compress}


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(("name", "content", "rows", "said"), FORMS)
def test_the_rows_of_every_form(name, content, rows, said, packer, tmp_path, caplog):
    content = content if isinstance(content, bytes) else content.encode()
    path = written(tmp_path / f"{name}{packer.upper() if name.isupper() else packer}", PACKERS[packer](content))
    with caplog.at_level(logging.INFO):
        table = table_of_files(str(path), [path])
    assert list(table.read(None)) == rows
    assert table.columns == list(dict.fromkeys(key for row in rows for key in row))
    assert table.counted() == Count(len(rows), exact=True)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)  # once, however often it is read
    assert said is None or (said in lines[0] and lines[0].startswith(f"{path}: "))


def test_every_kind_has_a_form():
    assert {kind_of(Path(name)).suffix for name, *_ in FORMS} == set(SUFFIXES)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_only_the_columns_that_are_asked_for_are_read(name, tmp_path):
    content = parquet_bytes(ROWS) if name == "a.parquet" else arrow_bytes(ROWS, pyarrow.ipc.new_file)
    path = written(tmp_path / name, content)
    assert list(read_rows([path], ["id"])) == [{"id": row["id"]} for row in ROWS]


def test_a_file_in_several_compressed_parts(tmp_path):
    half = len(JSON_LINES) // 2
    for packer in (".gz", ".zst", ".bz2", ".xz"):
        parts = [PACKERS[packer](part.encode()) for part in (JSON_LINES[:half], JSON_LINES[half:])]
        assert list(read_rows([written(tmp_path / f"a.jsonl{packer}", b"".join(parts))])) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), ["line 1", "UTF-16", "UTF-8", "iconv"]),
        ("a.csv", "prompt\nhow are you\n".encode("utf-16-le"), ["line 1", "UTF-16"]),
        ("a.txt", "how are you\nfine\n".encode("utf-16-be"), ["line 1", "UTF-16"]),
        ("a.json", pretty(ROWS).encode("utf-16"), ["UTF-16"]),
        ("a.txt", b"one\rtwo\rthree\r", ["carriage returns alone"]),
        ("a.csv", b"prompt,id\ra,1\rb,2", ["carriage returns alone"]),
        ("a.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}\r', ["carriage returns alone"]),
        ("a.jsonl", b"", ["no rows", "empty"]),
        ("a.csv", b"", ["no rows", "empty"]),
        ("a.txt.gz", gzip.compress(b"", mtime=0), ["no rows"]),
        ("a.json", b"{\n\n", ["line 1", "not JSON"]),
        ("a.json", b'{\n "prompt": "a",\n "id" 1\n}', ["line 3", "not JSON"]),
        ("a.json", b'{"prompt": "a"}\n{"prompt" "b"}\n', ["line 2", "one JSON object a line"]),
        ("a.json", b'{"prompt": "a}\n{"prompt": "b"}\n', ["line 1", "one JSON object a line"]),
        ("a.json", pretty({"prompt": ["a", "b"], "id": [1]}).encode(), ["differ in length"]),
        ("a.json", pretty({"train": ROWS, "test": ROWS}).encode(), ["several lists of objects", "train, test"]),
        ("a.json", pretty({"columns": ["a"], "data": [[1, 2]]}).encode(), ["'columns'"]),
        ("a.json", b'"text"', ["no named columns"]),
        ("a.jsonl", (json.dumps(TURNS) + "\n").encode() * 3, ["no named columns"]),
        ("a.json", (json.dumps(TURNS) + "\n").encode() * 3, ["no named columns"]),
        ("a.tsv", b"prompt\tid\na\t1\t2\n", ["line 2", "3 fields", "tabs"]),
        ("a.tsv", b'prompt\n"never closed\n', ["not TSV", "quotation"]),
        ("a.jsonl.gz", b"not gzip", [".gz", "write or fetch it again"]),
        ("a.jsonl.zst", b"not zstd at all", [".zst", "write or fetch it again"]),
        ("a.jsonl.bz2", b"not bzip2", [".bz2", "write or fetch it again"]),
        ("a.jsonl.xz", b"not xz", [".xz", "write or fetch it again"]),
        ("a.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0)[:-12], [".gz", "to its end"]),
        ("a.jsonl.zst", zst(JSON_LINES.encode())[:-12], [".zst", "to its end"]),
        ("a.csv.xz", lzma.compress(b"prompt\n" + b"\n".join(b"%d" % i for i in range(999)))[:-20], [".xz"]),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), ["parquet file"]),
        ("a.arrow", b"", ["arrow file"]),
        ("a.arrow", b"ARROW1 nothing", ["arrow file"]),
        ("a.arrow", arrow_bytes(ROWS, pyarrow.ipc.new_file)[:-30], ["arrow file"]),
        ("a.arrow", arrow_bytes(ROWS, pyarrow.ipc.new_stream)[:90], ["arrow file"]),
        ("a.zip", b"PK", ["unknown kind", ".jsonl", ".gz"]),
        ("a.gz", gzip.compress(b"x", mtime=0), ["unknown kind"]),
    ],
)
def test_files_that_are_refused(name, content, words, tmp_path):
    path = written(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        list(table_of_files(str(path), [path]).read(None))
    line = str(error.value)
    assert "\n" not in line and len(line) < 500 and name in line
    for word in words:
        assert word in line


def test_counting_does_not_parse_and_stops_in_time(tmp_path):
    bad = written(tmp_path / "a.jsonl", JSON_LINES + "{broken\n")
    assert count_rows([bad]) == Count(6, exact=True)
    many = written(tmp_path / "many.txt", "line\n" * 300_000)
    begun = count_rows([many], seconds=-1)
    assert 0 < begun.rows < 300_000 and not begun.exact
    assert count_rows([many, bad], seconds=100) == Count(300_006, exact=True)
    cut = written(tmp_path / "cut.txt.gz", gzip.compress(b"line\n" * 5000, mtime=0)[:-9])
    assert not count_rows([many, cut]).exact


def test_quoted_line_ends_are_counted_once(tmp_path):
    rows = "".join(f'"{number}\nand more",x\n\n' for number in range(100_000))
    path = written(tmp_path / "many.csv", "a,b\n" + rows)  # more than is counted at once
    assert count_rows([path], seconds=100) == Count(100_000, exact=True)
    path = written(tmp_path / "a.csv", '"a\nheader",id\n"one\n\ntwo ""2""\n",1\nplain,2\n\n"three\n",3\n')
    assert count_rows([path]) == Count(3, exact=True) == Count(len(list(read_rows([path]))), exact=True)


@pytest.mark.parametrize(
    ("extent", "words"),
    [
        (Extent(100, Count(1500, True), 0, False, True), "100 of 1,500 prompts (num_prompts)"),
        (Extent(100, Count(1500, True), 10, False, True), "100 of 1,500 prompts (num_prompts, offset)"),
        (Extent(100, Count(1500, True), 0, True, True), "100 of 1,500 prompts (num_prompts, shuffle_seed)"),
        (Extent(100, Count(110, True), 10, False, True), "100 of 110 prompts (offset)"),
        (Extent(50, Count(1500, True), 1450, False, False), "50 of 1,500 prompts (offset)"),
        (Extent(1500, Count(1500, True), 0, True, True), "1,500 prompts"),
        (Extent(100, Count(4000, False), 0, False, True), "100 of at least 4,000 prompts (num_prompts)"),
        (Extent(100, None, 0, False, True), "the first 100 prompts (num_prompts)"),
        (Extent(100, None, 10, False, True), "100 prompts (num_prompts, offset)"),
        (Extent(100, None, 0, True, True), "100 prompts (num_prompts, shuffle_seed)"),
        (Extent(100, Count(50, True), 0, False, True), "the first 100 prompts (num_prompts)"),
        (Extent(70, None, 0, False, False), "70 prompts"),
        (Extent(None, None, 0, False, False), "all prompts"),
    ],
)
def test_the_words_for_a_part_of_a_data_set(extent, words):
    assert str(extent) == words
    assert extent.is_whole == ("(" not in words)


def test_what_a_folder_has_beside_data(tmp_path):
    for name in ("b.jsonl", "a/x.csv", ".hidden.jsonl", ".git/c.json", "__pycache__/d.json", "e.yaml", "plot.png",
                 "model/config.json", "model/tokenizer.json", "model/vocab.txt", "model/train.jsonl", "vocab.txt",
                 "m.npz", "m.safetensors", "page.html"):  # fmt: skip
        written(tmp_path / name, "x")
    (tmp_path / "away.jsonl").symlink_to(tmp_path / "nowhere")
    found = find_data_files(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found.files] == [
        "a/x.csv", "b.jsonl", "model/train.jsonl", "vocab.txt",
    ]  # fmt: skip
    assert found.left_out == {"a model's files": ["model/config.json", "model/tokenizer.json", "model/vocab.txt"]}


def test_a_saved_data_set_below_a_folder_is_read_without_its_descriptions(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (only,) = find_data_files(tmp_path).files
    assert list(read_rows([only])) == ROWS
