"""Prompts from files, folders and the hub: which rows, in which order, what is skipped, and what is refused how."""

import csv
import json
import logging
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub.errors
import pyarrow
import pyarrow.parquet
import pytest

from fisher_vmap.data.conversations import SkippedPrompt, extract_prompt
from fisher_vmap.data.prompts import SourcePrompt, read_prompts
from fisher_vmap.errors import UserError

ROWS = [{"id": number, "prompt": f"prompt {number}, “quoted”\nwith a second line"} for number in range(20)]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    """Whatever would go to the hub fails at once; the library's cache folder is a temporary one."""

    def refuse(*_, **__):
        raise AssertionError("a test must not reach for the hub")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", refuse)
    datasets.disable_progress_bars()


def write_jsonl(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows=ROWS) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows=ROWS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows=ROWS) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=6)
    return path


def write_saved(path: Path, rows=ROWS) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def write_saved_splits(path: Path, rows=ROWS) -> Path:
    table = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(path))
    return path


def write_folder(path: Path, rows=ROWS) -> Path:
    write_jsonl(path / "part-0.jsonl", rows[:8])
    write_jsonl(path / "part-1.jsonl", rows[8:])
    return path


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "saved": write_saved,
    "saved_splits": write_saved_splits,
    "folder": write_folder,
}


def taken(source) -> list[tuple[int, int, str]]:
    return [(prompt.index, prompt.source_row, prompt.messages_or_text) for prompt in source]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_data_gives_the_same_prompts(name, tmp_path):
    path = str(WRITERS[name](tmp_path / name))
    source = read_prompts(path, offset=3, num_prompts=10)
    expected = [(index, index + 3, ROWS[index + 3]["prompt"]) for index in range(10)]
    assert taken(source) == expected
    assert taken(source) == expected  # a second time too
    assert (source.column, source.total) == ("prompt", 10)
    assert len(taken(read_prompts(path))) == read_prompts(path).total == 20
    assert read_prompts(path, offset=15, num_prompts=10).total == 5


@pytest.mark.parametrize("name", WRITERS)
def test_a_seed_gives_a_full_permutation_that_more_prompts_only_extend(name, tmp_path):
    path = str(WRITERS[name](tmp_path / name))
    source = read_prompts(path, shuffle_seed=7)
    order = [prompt.source_row for prompt in source]
    assert sorted(order) == list(range(20)) != order
    assert order[:5] == [1, 17, 2, 5, 11]  # for ever: a run can be carried on years later
    assert all(prompt.messages_or_text == ROWS[prompt.source_row]["prompt"] for prompt in source)
    part = read_prompts(path, shuffle_seed=7, offset=4, num_prompts=6)
    assert [prompt.source_row for prompt in part] == order[4:10]
    assert part.total == 6


def test_kept_columns(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "x", "tag": ["a", "\ud83d"], "n": 1}, {"prompt": None, "n": 2}, 3]
    )
    prompts = list(read_prompts(str(path), keep_columns=["tag", "n"]))
    assert [prompt.kept for prompt in prompts] == [
        {"tag": ["a", "?"], "n": 1},
        {"tag": None, "n": 2},
        {"tag": None, "n": None},
    ]


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\n  \ntwo \u2028 still two\nthree".encode())
    source = read_prompts(str(path))
    assert taken(source) == [(0, 0, "one"), (1, 1, "two \u2028 still two"), (2, 2, "three")]
    assert source.column == "text"


def test_the_prompt_column_is_found_in_a_fixed_order(tmp_path):
    columns = ["text", "question", "instruction", "prompt", "messages", "conversation"]
    for count in range(1, len(columns) + 1):
        path = write_jsonl(tmp_path / f"{count}.jsonl", [dict.fromkeys(columns[:count], "x")])
        assert read_prompts(str(path)).column == columns[count - 1]
    assert read_prompts(str(path), prompt_column="question").column == "question"


@pytest.mark.parametrize(
    ("value", "first_turn", "full"),
    [
        ("plain", "plain", "plain"),
        ([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "u:a", "u:a a:b u:c"),
        ([("system", "s"), ("user", "a"), ("assistant", "b")], "s:s u:a", "s:s u:a"),
        ([("system", " "), ("user", "a")], "u:a", "u:a"),
        ([("assistant", "hi"), ("user", "a")], "u:a", "a:hi u:a"),
        ([("human", "a"), ("gpt", "b"), ("Human", "c")], "u:a", "u:a a:b u:c"),
        ([("user", "a"), ("assistant", None)], "u:a", "u:a"),
        ([("user", "a"), (None, "b")], "u:a", "u:a"),
        ([("user", "a"), ("tool", "r"), ("user", "c")], "u:a", "u:a t:r u:c"),
    ],
)
@pytest.mark.parametrize("form", ["openai", "sharegpt", "mapping", "parts", "both"])
def test_conversations(value, first_turn, full, form):
    def spelt(turn):
        role, content = turn
        if form == "sharegpt":
            return {"from": role, "value": content}
        if form == "both":  # a table that holds both spellings has nulls in one
            return {"from": role, "value": content, "role": None, "content": None}
        if form == "parts" and content is not None:
            return {"role": role, "content": [{"type": "text", "text": content}]}
        return {"role": role, "content": content}

    cell = value if isinstance(value, str) else [spelt(turn) for turn in value]
    if form == "mapping" and isinstance(cell, list):
        cell = {key: [turn[key] for turn in cell] for key in cell[0]}

    def written(prompt):
        return (
            prompt if isinstance(prompt, str) else " ".join(f"{turn['role'][0]}:{turn['content']}" for turn in prompt)
        )

    assert written(extract_prompt(cell, "first_turn")) == first_turn
    assert written(extract_prompt(cell, "full")) == full
    assert extract_prompt(extract_prompt(cell, "full")) == extract_prompt(cell, "full")


BAD_CELLS = [
    (None, "null"),
    ("", "empty"),
    (" \n\t", "white space"),
    (3, "int"),
    (2.5, "float"),
    (True, "bool"),
    ({"a": 1}, "dict"),
    ({}, "dict"),
    ([], "user turn"),
    (["hello"], "user turn"),
    ([{"role": "assistant", "content": "hi"}], "user turn"),
    ([{"role": "user", "content": "  "}], "white space"),
    ([{"role": "user", "content": None}], "no text"),
    ([{"role": "user", "content": 3}], "no text"),
    ([{"role": "user"}], "no text"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "no text"),
    ({"role": ["user"], "content": []}, "length"),
    ("half a pair \ud83d", "Unicode"),
]


@pytest.mark.parametrize(("cell", "reason"), BAD_CELLS)
def test_a_cell_that_holds_no_prompt(cell, reason):
    with pytest.raises(SkippedPrompt, match=reason):
        extract_prompt(cell, "first_turn")


def test_in_a_full_conversation_every_turn_counts():
    with pytest.raises(SkippedPrompt, match=r"turn 0 .* no role"):
        extract_prompt([{"content": "?"}, {"role": "user", "content": "a"}], "full")
    with pytest.raises(SkippedPrompt, match=r"turn 0 .* no text"):
        extract_prompt([{"role": "assistant"}, {"role": "user", "content": "a"}], "full")


def test_bad_rows_keep_their_index_and_say_why(tmp_path):
    rows = [{"prompt": cell} for cell, _ in BAD_CELLS] + ["no object", {"other": 1}, {"prompt": "good"}]
    prompts = list(read_prompts(str(write_jsonl(tmp_path / "a.jsonl", rows))))
    assert [prompt.index for prompt in prompts] == list(range(len(rows)))
    for prompt, reason in zip(prompts, [reason for _, reason in BAD_CELLS] + ["object", "null"], strict=False):
        assert prompt.messages_or_text is None
        assert re.search(reason, prompt.skipped)
        assert "\n" not in prompt.skipped
    assert prompts[-1] == SourcePrompt(len(rows) - 1, len(rows) - 1, "good", {}, None)


def test_the_fingerprint_follows_the_content_and_not_the_name(tmp_path):
    one = read_prompts(str(write_jsonl(tmp_path / "a.jsonl"))).fingerprint
    moved = read_prompts(str(write_jsonl(tmp_path / "b" / "c.jsonl"))).fingerprint
    assert one == moved
    assert one != read_prompts(str(write_jsonl(tmp_path / "d.jsonl", ROWS[1:]))).fingerprint
    folder = write_folder(tmp_path / "folder")
    before = read_prompts(str(folder)).fingerprint
    write_jsonl(folder / "part-1.jsonl", ROWS[9:])
    assert before != read_prompts(str(folder)).fingerprint


def test_a_prompt_of_ten_megabytes_in_every_format(tmp_path):
    rows = [{"prompt": "long, " * 1_700_000}]
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        (prompt,) = read_prompts(str(WRITERS[name](tmp_path / name, rows)))
        assert prompt.messages_or_text == rows[0]["prompt"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_memory_is_flat_in_the_number_of_rows(name, tmp_path):
    def peak(count):
        path = WRITERS[name](
            tmp_path / f"{count}-{name}", [{"prompt": f"{number} {'x' * 200}"} for number in range(count)]
        )
        tracemalloc.start()
        assert sum(1 for _ in read_prompts(str(path), shuffle_seed=1, num_prompts=10)) == 10
        assert sum(1 for _ in read_prompts(str(path))) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # what the first use imports and caches
    assert peak(6000) < 2 * peak(600) + 500_000


def test_reading_stops_where_the_run_ends(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS * 10)
    with path.open("a") as file:
        file.write("{broken\n")
    assert len(list(read_prompts(str(path), num_prompts=200))) == 200
    with pytest.raises(UserError, match="line 201"):  # at once, not after hours
        read_prompts(str(path))


def refusal(*arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        list(read_prompts(*arguments, **settings))
    line = str(error.value)
    assert line and "\n" not in line and len(line) < 700
    return line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["no rows"]),
        ("a.jsonl", b"\n \n", ["no rows"]),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ["line 2", "UTF-8"]),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), ["line 1", "UTF-8"]),
        ("a.jsonl", b'{\n"promt": "a"\n}', ["promt", "prompt_column"]),
        ("a.jsonl", b'{"prompt": "\x00"}\n', ["line 1", "not JSON"]),
        ("a.jsonl", b"[" * 100_000 + b"\n", ["line 1", "not JSON"]),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", ["line 1", "not JSON"]),
        ("a.jsonl", b'"just text"\n', ["no named columns"]),
        ("a.jsonl", b"{}\n", ["no named columns"]),
        ("a.jsonl", b'{"promt": "a", "id": 1}\n', ["promt, id", "prompt_column"]),
        ("a.json", b"[", ["line 1", "not JSON"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.json", b'["a", "b"]', ["no named columns"]),
        ("a.json", b'{\n"prompt" "a"\n}', ["line 2", "one JSON object a line"]),
        ("a.json", b"\xff", ["UTF-8"]),
        ("a.csv", b"", ["no rows"]),
        ("a.csv", b"prompt\n", ["no rows"]),
        ("a.csv", b"prompt,id\nhello, world,1\n", ["line 2", "3 fields", "quot"]),
        ("a.csv", b"prompt,id\nhello\n", ["line 2", "1 fields"]),
        ("a.csv", b'prompt\n"never closed\n', ["not CSV", "quotation"]),
        ("a.csv", b"prompt,prompt\na,b\n", ["twice"]),
        ("a.csv", b"prompt\na\xff\n", ["line 2", "UTF-8"]),
        ("a.csv", b"prompt;id\na;1\n", ["prompt;id", "prompt_column"]),
        ("a.txt", b"", ["no rows"]),
        ("a.txt", b" \n\n", ["no rows"]),
        ("a.txt", b"fine\n\xc3\x28\n", ["line 2", "UTF-8"]),
        ("a.parquet", b"", ["parquet"]),
        ("a.parquet", b"PAR1 nothing PAR1", ["parquet"]),
        ("a.parquet", None, ["parquet"]),
        ("a.tsv", b"prompt\n", ["no rows"]),
        ("a.xlsx", b"prompt\n", [".xlsx", "unknown kind", ".jsonl"]),
        ("a", b"prompt\n", ["unknown kind"]),
        ("script.py", b"raise SystemExit", ["unknown kind"]),
    ],
)
def test_damaged_files(name, content, words, tmp_path):
    if content is None:  # a real file without its end
        write_parquet(tmp_path / name)
        content = (tmp_path / name).read_bytes()[:-40]
    (tmp_path / name).write_bytes(content)
    line = refusal(str(tmp_path / name))
    for word in [*words, name]:
        assert word in line


def test_a_parquet_file_damaged_in_the_middle(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": f"{number:064}"} for number in range(5000)])
    content = bytearray(path.read_bytes())
    content[40:400] = b"\xff" * 360
    path.write_bytes(content)
    assert "parquet" in refusal(str(path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offset": 20}, ["offset 20", "20 rows"]),
        ({"offset": 10**12, "shuffle_seed": 1}, ["20 rows"]),
        ({"prompt_column": "promt"}, ["'promt'", "id, prompt", "did you mean 'prompt'?"]),
        ({"prompt_column": "zzz"}, ["'zzz'", "id, prompt", "prompt_column"]),
        ({"keep_columns": ["id", "lang"]}, ["'lang'", "keep_columns"]),
        ({"dataset_split": "test"}, ["splits"]),
        ({"dataset_config": "en"}, ["dataset_config"]),
        ({"dataset_revision": "v1"}, ["dataset_revision"]),
    ],
)
def test_a_good_file_asked_for_what_it_has_not(settings, words, tmp_path):
    line = refusal(str(write_jsonl(tmp_path / "a.jsonl")), **settings)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.jsonl", ["no such file"]),
        ("./absent", ["no such file"]),
        ("/absent/folder", ["no such file"]),
        ("../absent.csv", ["no such file"]),
        ("a b/c", ["hub id"]),
        ("a/b/c", ["hub id"]),
        ("https://example.org/a", ["hub id"]),
        ("json", ["hub id"]),
        ("x" * 5000 + "/..", ["hub id"]),
        ("nul\0.jsonl", ["no such file"]),
        ("/dev/null", ["neither a file nor a folder"]),
    ],
)
def test_names_that_are_no_data_set(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_prompts(name)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        ({}, {}, ["no data files", ".jsonl"]),
        ({"folder.py": "raise SystemExit"}, {}, ["script"]),
        ({"other.py": "raise SystemExit"}, {}, ["no data files"]),
        ({"a.jsonl": ""}, {}, ["no rows"]),
        ({"a.jsonl": '{"prompt": "x"}\n', "b.jsonl": "{\n"}, {}, ["b.jsonl", "line 1"]),
        ({"a.jsonl": '{"prompt": "x"}\n'}, {"dataset_split": "test"}, ["'test'", "train"]),
        ({"test.jsonl": '{"prompt": "x"}\n'}, {}, ["'train'", "test"]),
        ({"a.jsonl": '{"prompt": "x"}\n'}, {"dataset_config": "en"}, ["'en'", "dataset_config"]),
        ({"a.jsonl": '{"prompt": "x"}\n'}, {"dataset_revision": "v1"}, ["dataset_revision"]),
        ({"a.jsonl.gz": "x"}, {}, ["a.jsonl.gz", "not .gz data"]),
        ({"page.html": "x", "plot.png": "x", "a.npz": "x", "v.safetensors": "x"}, {}, ["no data files"]),
        ({"state.json": "{}"}, {}, ["folder"]),
        ({"state.json": "{", "dataset_info.json": "{"}, {}, ["folder"]),
        ({"dataset_dict.json": '{"splits": ["train"]}'}, {}, ["folder"]),
        ({"dataset_dict.json": "{}"}, {}, ["folder"]),
    ],
)
def test_folders_that_do_not_work(files, settings, words, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    line = refusal(str(folder), **settings)
    for word in words:
        assert word in line


def test_saved_data_sets_that_do_not_work(tmp_path):
    assert "'dev'" in refusal(str(write_saved_splits(tmp_path / "splits")), dataset_split="dev")
    assert "splits" in refusal(str(write_saved(tmp_path / "one")), dataset_split="dev")
    assert "dataset_config" in refusal(str(tmp_path / "one"), dataset_config="en")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert "cannot be read" in refusal(str(tmp_path / "one"))
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "none"))
    assert "empty" in refusal(str(tmp_path / "none"))


OURS = '{"checksum":"' + "0" * 64 + '","format":"fisher_vmap results",'  # how a results folder's index.json begins


def write_results(folder: Path) -> Path:
    """As much of a results folder as tells that it is one, and files that would be read as prompts."""
    (folder / "shards").mkdir(parents=True)
    (folder / "index.json").write_text(OURS)
    for name in ("prompts.parquet", "shards/shard-00000.parquet"):
        write_parquet(folder / name, [{"text": "ours", "prompt": "ours"}])
    write_jsonl(folder / "shards" / "shard-00000.json", [{"prompt": "ours"}])
    return folder


def test_results_of_ours_below_a_folder_are_no_data(tmp_path, caplog, monkeypatch):
    write_folder(tmp_path / "f")
    monkeypatch.chdir(tmp_path / "f")
    before = read_prompts(".")
    for place in ("layer0", "results [1]/layer1", "a/b/c", "shards", "test", ".hidden"):
        write_results(tmp_path / "f" / place)
    (tmp_path / "f" / "linked").symlink_to(write_results(tmp_path / "elsewhere"))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        after = read_prompts(".")
    assert taken(after) == taken(before) and after.fingerprint == before.fingerprint
    (line,) = [r.getMessage() for r in caplog.records if "not read as data" in r.getMessage()]
    for name in ("layer0", "results [1]/layer1", "a/b/c", "shards", "test"):
        assert name in line


@pytest.mark.parametrize("place", ["", "shards", "prompts.parquet", "shards/shard-00000.parquet", "index.json"])
@pytest.mark.parametrize("by", ["path", "link", "relative"])
def test_results_of_ours_are_refused(place, by, tmp_path, monkeypatch):
    given = write_results(tmp_path / "out") / place
    if by == "link":
        link = tmp_path / f"link{given.suffix}"
        link.symlink_to(given)
        given = link
    elif by == "relative":
        monkeypatch.chdir(given if given.is_dir() else given.parent)
        given = Path("." if given.is_dir() else given.name)
    line = refusal(str(given))
    assert "results folder of fisher_vmap" in line and "dataset_name" in line


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "folder"])
def test_a_copy_of_a_results_table_is_refused(name, tmp_path):
    columns = ("prompt_index", "source_row", "text", "status", "reason", "audit", "tokens", "truncated", "mass")
    rows = [dict.fromkeys((*columns, "top_tokens", "kind"), "x")] * 9
    assert "table of a results folder" in refusal(str(WRITERS[name](tmp_path / name, rows)))


def test_exported_vectors_are_no_data(tmp_path, caplog):
    vectors = [{"modelId": "gemma-2-2b", "layerNumber": 3, "hookType": "hook_resid_post", "vector": [0.5] * 40}]
    (write_folder(tmp_path / "f") / "mean.json").write_text(json.dumps(vectors, indent=1))
    with caplog.at_level(logging.INFO):
        assert read_prompts(str(tmp_path / "f")).total == 20
    assert "mean.json (exported vectors)" in caplog.text


def test_a_file_of_ones_own_in_a_results_folder_is_read(tmp_path):
    assert read_prompts(str(write_jsonl(write_results(tmp_path / "out") / "mine.jsonl"))).total == 20


def test_a_folder_with_nothing_but_results_says_so(tmp_path):
    write_results(tmp_path / "layer0")
    line = refusal(str(tmp_path))
    assert "no data files" in line and "layer0" in line


STRANGE = ["run [3]", "a*b", "x?", "{a,b}", "[!a]", "a::b", "**", "with space", "hf:", "ü (1)", "50%", "a&b=c"]


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("kind", ["folder", "file", "saved", "below"])
def test_a_path_is_never_a_pattern(name, kind, tmp_path):
    if kind == "saved" and "::" in name:
        pytest.skip("the library takes it for an address")
    mine, theirs = [{"prompt": "mine"}], [{"prompt": "theirs"}]
    for sibling in ("run 3", "aXXb", "xy", "a", "b", "z", "deep/er"):
        write_jsonl(tmp_path / sibling / "data.jsonl", theirs)
        write_jsonl(tmp_path / f"{sibling}.jsonl", theirs)
    path = tmp_path / name
    if kind == "folder":
        write_jsonl(path / f"{name}.jsonl", mine)
    elif kind == "file":
        path = write_jsonl(tmp_path / f"{name}.jsonl", mine)
    elif kind == "saved":
        write_saved(path, mine)
    else:
        write_jsonl(path / name / "train" / f"{name}.csv.jsonl", mine)
    assert taken(read_prompts(str(path))) == [(0, 0, "mine")]


def test_files_of_one_folder_with_names_like_patterns(tmp_path):
    names = sorted(f"{name}.jsonl" for name in ("a[1]", "a1", "b*", "bb", "c?", "cc", "{d,e}", "d", "A", "f_g", "f:g"))
    for name in names:
        write_jsonl(tmp_path / "f" / name, [{"prompt": name}])
    assert [prompt for _, _, prompt in taken(read_prompts(str(tmp_path / "f")))] == names


def test_a_folder_is_read_as_one_kind_of_file_and_says_what_it_leaves_out(tmp_path, caplog):
    write_folder(tmp_path / "f")
    write_csv(tmp_path / "f" / "other.csv", [{"prompt": "x"}])
    with caplog.at_level(logging.INFO):
        assert read_prompts(str(tmp_path / "f")).total == 20
    assert "left out: other.csv" in caplog.text


def test_a_file_that_fits_two_of_a_splits_names_is_read_once(tmp_path):
    write_jsonl(tmp_path / "f" / "train" / "train-1.train.jsonl", ROWS)
    assert read_prompts(str(tmp_path / "f")).total == 20


@pytest.mark.parametrize("names", [("a.jsonlines", "b.jsonlines"), ("A.JSONL", "b.jsonl"), ("a.ndjson", "b.json")])
def test_endings_that_the_library_does_not_know(names, tmp_path):
    for name, rows in zip(names, (ROWS[:8], ROWS[8:]), strict=True):
        write_jsonl(tmp_path / "f" / name, rows)
    assert [text for _, _, text in taken(read_prompts(str(tmp_path / "f")))] == [row["prompt"] for row in ROWS]


def test_a_folder_named_like_a_file(tmp_path):
    assert "no data files" in refusal(str(write_jsonl(tmp_path / "a.jsonl" / ".hidden").parent))
    write_jsonl(tmp_path / "a.jsonl" / "part-0.json")
    assert read_prompts(str(tmp_path / "a.jsonl")).total == 20


def test_the_configurations_that_a_readme_names(tmp_path):
    write_jsonl(tmp_path / "f" / "one" / "x.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "f" / "two" / "x.jsonl", ROWS[3:8])
    (tmp_path / "f" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.jsonl\n"
        "- config_name: two\n  data_files: [{split: dev, path: two/*}]\n---\n"
    )
    assert read_prompts(str(tmp_path / "f"), dataset_config="one").total == 3
    assert read_prompts(str(tmp_path / "f"), dataset_config="two", dataset_split="dev").total == 5
    assert "['one', 'two']" in refusal(str(tmp_path / "f"))


@pytest.mark.parametrize("name", WRITERS)
def test_how_much_of_the_data_a_run_takes(name, tmp_path):
    path = str(WRITERS[name](tmp_path / name))

    def words(**settings):
        return str(read_prompts(path, **settings).extent())

    assert words() == words(num_prompts=20) == words(num_prompts=99) == "20 prompts"
    assert words(num_prompts=7) == "7 of 20 prompts (num_prompts)"
    assert words(num_prompts=7, offset=3) == "7 of 20 prompts (num_prompts, offset)"
    assert words(num_prompts=7, offset=18) == words(offset=18) == "2 of 20 prompts (offset)"
    assert words(num_prompts=7, shuffle_seed=3) == "7 of 20 prompts (num_prompts, shuffle_seed)"


def test_the_splits_of_a_folder(tmp_path):
    write_jsonl(tmp_path / "f" / "train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "f" / "test.jsonl", ROWS[3:8])
    assert read_prompts(str(tmp_path / "f")).total == 3
    assert read_prompts(str(tmp_path / "f"), dataset_split="test").total == 5


@pytest.fixture
def hub(monkeypatch):
    """Let a function stand for the library's door to the hub."""

    def install(answer):
        def load(name, config=None, *, revision=None):
            return answer(name)

        monkeypatch.setattr(datasets, "load_dataset_builder", load)

    return install


class Response:
    """What the hub's errors ask of an HTTP response."""

    status_code, headers, request = 403, {}, None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be ..."),
            ["gated", "https://huggingface.co/datasets/a/b", "hf auth login"],
        ),
        (huggingface_hub.errors.GatedRepoError("403 Client Error", response=Response()), ["gated", "hf auth login"]),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), ["a/b", "dataset_name"]),
        (datasets.exceptions.DatasetNotFoundError("Revision 'x' doesn't exist for"), ["'x'", "dataset_revision"]),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub\n(LocalEntryNotFoundError)"),
            ["cannot be reached", "network"],
        ),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), ["cannot be reached", "network"]),
        (huggingface_hub.errors.HfHubHTTPError("500 Server Error", response=Response()), ["500", "network"]),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), ["script", "never run"]),
        (ValueError("Config name is missing.\nPlease pick one among: ['x']"), ["['x']", "dataset_config"]),
        (ValueError("Bad split: train. Available splits: ['test']"), ["['test']", "dataset_split"]),
        (datasets.data_files.EmptyDatasetError("doesn't contain any data files"), ["no data files"]),
    ],
)
def test_what_the_hub_may_answer(error, words, hub):
    def fail(name):
        raise error

    hub(fail)
    line = refusal("a/b")
    for word in words:
        assert word in line


def test_a_misspelt_name_is_taken_for_the_right_one(hub, caplog, tmp_path):
    asked = []
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversation": [{"role": "user", "content": "hi"}]}])
    files = datasets.load_dataset_builder("json", data_files=str(path))
    hub(lambda name: asked.append(name) or files)
    with caplog.at_level(logging.INFO):
        (prompt,) = read_prompts("lmsys/lm-sys-chat-1m")
    assert asked == ["lmsys/lmsys-chat-1m"]
    assert "lmsys/lm-sys-chat-1m is taken for lmsys/lmsys-chat-1m" in caplog.text
    assert prompt.messages_or_text == [{"role": "user", "content": "hi"}]


def test_a_stream_that_breaks_off_is_one_line(hub, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x" * 1000}] * 20_000)
    with path.open("a") as file:
        file.write("{broken\n")
    files = datasets.load_dataset_builder("json", data_files=str(path))
    hub(lambda name: files)
    source = read_prompts("a/b", num_prompts=3)
    assert str(source.extent()) == "the first 3 prompts (num_prompts)"
    assert len(list(source)) == 3
    assert "a/b" in refusal("a/b")


@pytest.mark.parametrize(
    ("rows", "settings", "before", "after"),
    [
        (1500, {"num_prompts": 5}, "5 of 1,500 prompts (num_prompts)", "5 of 1,500 prompts (num_prompts)"),
        (1500, {"num_prompts": 5, "offset": 1}, "5 of 1,500 prompts (num_prompts, offset)",
         "5 of 1,500 prompts (num_prompts, offset)"),
        (1500, {}, "1,500 prompts", "20 prompts"),  # the hub may be wrong
        (3, {"num_prompts": 5}, "3 prompts", "the first 5 prompts (num_prompts)"),
        (None, {"num_prompts": 5}, "the first 5 prompts (num_prompts)", "the first 5 prompts (num_prompts)"),
        (None, {"num_prompts": 50}, "the first 50 prompts (num_prompts)", "20 prompts"),
        (None, {"offset": 4}, "all prompts", "16 of 20 prompts (offset)"),
        (None, {}, "all prompts", "20 prompts"),
    ],
)  # fmt: skip
def test_what_the_hub_says_of_a_splits_length(rows, settings, before, after, hub, tmp_path):
    files = datasets.load_dataset_builder("json", data_files=str(write_jsonl(tmp_path / "a.jsonl")))
    if rows is not None:
        files.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=rows)})
    hub(lambda name: files)
    source = read_prompts("a/b", **settings)
    assert str(source.extent()) == before
    assert str(source.extent(sum(1 for _ in source))) == after


COMMIT = "0123456789" * 4
DATA = "".join(json.dumps({"prompt": f"p{number}", "n": number}) + "\n" for number in range(1000)).encode()


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub as one data set some/data, a gated and a missing one need."""

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        entry = {"type": "file", "path": "data.jsonl", "size": len(DATA), "oid": "1" * 40}
        asked_range = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if "gated" in self.path:
            self.answer(401, b"{}", X_Error_Code="GatedRepo")
        elif "absent" in self.path:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif "/unknown" in self.path:
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif "/paths-info/" in self.path or "/tree/" in self.path:
            self.answer(200, json.dumps([entry]).encode())
        elif self.path.startswith("/api/"):
            self.answer(200, json.dumps({"id": "some/data", "sha": COMMIT, "siblings": []}).encode())
        elif self.path.endswith("data.jsonl") and asked_range:
            start, end = int(asked_range[1]), int(asked_range[2] or len(DATA) - 1)
            span = f"bytes {start}-{end}/{len(DATA)}"
            self.answer(206, DATA[start : end + 1], Content_Range=span, X_Repo_Commit=COMMIT, ETag='"x"')
        elif self.path.endswith("data.jsonl"):
            self.answer(200, DATA, X_Repo_Commit=COMMIT, ETag='"x"')
        else:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    do_HEAD = do_POST = do_GET


HUB_CLIENT = """
import json
from fisher_vmap.errors import UserError
from fisher_vmap.data.prompts import read_prompts
said = []
for name, settings in [
    ("some/gated", {}),
    ("some/absent", {}),
    ("some/data", {"dataset_revision": "unknown"}),
    ("some/data", {"num_prompts": 3, "offset": 2, "keep_columns": ["n"]}),
    ("some/data", {"num_prompts": 3, "shuffle_seed": 1}),
    ("some/data", {"offset": 1000}),
    ("some/data", {"prompt_column": "promt"}),
]:
    try:
        source = read_prompts(name, **settings)
        rows = [[prompt.source_row, prompt.messages_or_text, prompt.kept] for prompt in source]
        said.append([source.column, source.fingerprint, source.total, rows])
    except UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_through_the_real_library_from_a_hub_on_this_machine(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    client = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    server.shutdown()
    server.server_close()
    assert client.returncode == 0, client.stderr
    gated, absent, revision, plain, shuffled, beyond, column = json.loads(client.stdout)
    assert "gated" in gated and "hf auth login" in gated
    assert "some/absent" in absent and "dataset_name" in absent
    assert "unknown" in revision and "dataset_revision" in revision
    assert plain[0] == "prompt"
    assert COMMIT in plain[1] and "some/data" in plain[1] and plain[2] is None
    assert plain[3] == [[number, f"p{number}", {"n": number}] for number in (2, 3, 4)]
    assert [row[0] for row in shuffled[3]] == [0, 1, 2]
    assert {row[1] for row in shuffled[3]} != {"p0", "p1", "p2"}
    assert "offset 1000" in beyond
    assert "did you mean 'prompt'?" in column
