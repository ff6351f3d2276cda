"""`python -m fisher_vmap.verify`: what it finds, what it says, and its exit codes."""

import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from results_cases import make_layout, make_prompt, make_prompts, open_writer, without_numbers, write_folder

from fisher_vmap.results.files import sha256_of
from fisher_vmap.results.index import FileEntry, read_index, write_index
from fisher_vmap.results.outputs import write_npz, write_product, write_table
from fisher_vmap.results.shard_reader import ShardReader, readers
from fisher_vmap.verify.__main__ import main

pytestmark = pytest.mark.usefixtures("no_power_cuts")

NPZ = "fisher_matrices_compressed.npz"


def bad_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sound_folder(tmp_path, capsys, dtype):
    write_folder(tmp_path, 10, make_layout({"a": 7, "b": 5}, rank=6, vectors_dtype=dtype))
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok   ") for line in lines[:-1]) and lines[-1] == f"{tmp_path} is sound"
    assert lines[1].endswith("prompts 0..3, 2 without numbers") and "60 arrays" not in lines[1]
    assert sum("the shards' arrays: 30 arrays" in line for line in lines) == 2


def test_many_layers_are_told_a_line_a_kind(tmp_path, capsys):
    write_folder(tmp_path, 10, make_layout({f"h.{i}": 5 for i in range(12)}))
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 15
    for kind in (
        "the npz of each layer",
        "the npz of each layer = the shards' arrays",
        "mean.safetensors, the mean of each layer",
    ):
        assert sum(line.startswith(f"ok   {kind}: 12 of 12, ") for line in lines) == 1, lines
    for layer in (3, 7):
        path = tmp_path / f"fisher_matrices_compressed.h.{layer}.npz"
        path.write_bytes(path.read_bytes()[:-1])
    assert main([str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "ok   the npz of each layer: 10 of 12, " in text
    assert sum(line.startswith("BAD") for line in text.splitlines()) == 4  # each layer's bytes and arrays, in full
    assert all(f"BAD  fisher_matrices_compressed.h.{layer}.npz: " in text for layer in (3, 7))


@pytest.mark.parametrize("flag", ["--layer", "--prompts", "--model_path", "--dataset_name", "--plot"])
def test_flags_of_the_check_against_the_model_need_it(tmp_path, capsys, flag):
    write_folder(tmp_path)
    assert main([str(tmp_path), flag, "15"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and f"{flag} is for" in said.err and "--kl" in said.err


def test_a_folder_without_any_result(tmp_path, capsys):
    writer = open_writer(tmp_path)
    writer.missing_shards(2)
    writer.add(0, [without_numbers(i, "skipped", "empty") for i in range(2)])
    writer.finish(settings={})
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path} is sound, but none of its 2 prompts has results"


def test_the_command(tmp_path):
    write_folder(tmp_path)
    command = [sys.executable, "-m", "fisher_vmap.verify"]
    assert subprocess.run([*command, str(tmp_path)], capture_output=True, check=False).returncode == 0
    run = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert (
        run.returncode == 2
        and run.stderr == f"fisher_vmap: {tmp_path / 'none'} is not a results folder: it has no index.json\n"
    )


@pytest.mark.parametrize(
    "name",
    ["index.json", "shards/shard-00001.safetensors", "shards/shard-00001.parquet", "prompts.parquet", NPZ,
     "mean.safetensors", "metadata.yaml"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_in_every_file(tmp_path, capsys, name, damage):
    write_folder(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-3])
    assert main([str(tmp_path)]) == (2 if (name, damage) == ("index.json", "delete") else 1)
    lines = bad_lines(capsys)
    assert all(name in line for line in lines[:1])


def test_an_unfinished_run(tmp_path, capsys):
    write_folder(tmp_path, finish=False)
    assert main([str(tmp_path)]) == 1
    assert bad_lines(capsys) == [
        "BAD  index.json: the run is unfinished: 10 of 10 prompts; give the command of its run again"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("S", [1.0, 2.0, 0.5], "S is negative or not in order"),
        ("S", [1.0, 0.5, -0.5], "S is negative or not in order"),
        ("S", [1e6, 1.0, 0.5], "the trace is below the sum of S"),
        ("V", np.full((3, 7), 0.3), "V is off orthonormal by"),
    ],
)
def test_numbers_that_are_not_what_they_claim(tmp_path, capsys, field, values, message):
    layout = make_layout()
    prompts = make_prompts(0, 4, layout)
    layer = prompts[1].layers["blocks.0"]
    prompts[1] = make_prompt(1, layout, layers={"blocks.0": layer._replace(**{field: np.asarray(values)})})
    writer = open_writer(tmp_path, layout)
    writer.missing_shards(4)
    writer.add(0, prompts)
    writer.finish(settings={}, save="prompts")
    assert main([str(tmp_path)]) == 1
    (line,) = bad_lines(capsys)
    assert f"shard-00000.safetensors is damaged: blocks.0, prompt 1: {message}" in line


def record(folder, name):
    """Give a file a new entry in the index, as if it had been written wrongly rather than damaged later."""
    index = read_index(folder)
    path = folder / name
    old = index.files[name]
    entry = FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size, tensors=old.tensors)
    write_index(folder, index.model_copy(update={"files": {**index.files, name: entry}}))


def test_an_npz_that_disagrees_with_the_shards(tmp_path, capsys):
    write_folder(tmp_path / "a", seed=0)
    write_folder(tmp_path / "b", seed=1)
    (tmp_path / "b" / NPZ).replace(tmp_path / "a" / NPZ)
    record(tmp_path / "a", NPZ)
    assert main([str(tmp_path / "a")]) == 1
    assert [line.split(": ", 1)[1] for line in bad_lines(capsys)] == [
        f"{tmp_path / 'a' / NPZ} is damaged: U_0 differs from the shards; give the command of its run again to mend it"
    ]
    index = read_index(tmp_path / "a")
    write_npz(tmp_path / "a" / NPZ, list(readers(tmp_path / "a", index))[:2], "blocks.0")
    record(tmp_path / "a", NPZ)
    assert main([str(tmp_path / "a")]) == 1
    assert "U_8" in bad_lines(capsys)[0]


def test_a_table_that_disagrees_with_the_shards(tmp_path, capsys):
    write_folder(tmp_path)
    index = read_index(tmp_path)
    first = ShardReader(tmp_path, index.shards[0], index.layout)
    write_table(tmp_path / "prompts.parquet", lambda: iter([first, first, first]), index)
    record(tmp_path, "prompts.parquet")
    assert main([str(tmp_path)]) == 1
    assert "its rows differ from shard-00001.parquet" in bad_lines(capsys)[0]
    shards = [ShardReader(tmp_path, entry, index.layout) for entry in index.shards]
    write_table(tmp_path / "prompts.parquet", lambda: iter([*shards, shards[2]]), index)
    record(tmp_path, "prompts.parquet")
    assert main([str(tmp_path)]) == 1
    assert "more rows than the shards" in bad_lines(capsys)[0]
    write_product(tmp_path, "prompts.parquet", index, {})
    record(tmp_path, "prompts.parquet")
    assert main([str(tmp_path)]) == 0


def test_row_groups_of_the_table_are_not_the_shards(tmp_path, monkeypatch, capsys):
    """Many small row groups would cost memory; whatever they are, the rows are compared with the shards'."""
    monkeypatch.setattr("fisher_vmap.results.outputs.GROUP_SHARDS", 2)
    write_folder(tmp_path)
    assert pq.ParquetFile(tmp_path / "prompts.parquet").num_row_groups == 2  # of three shards
    assert main([str(tmp_path)]) == 0
    assert "BAD" not in capsys.readouterr().out
