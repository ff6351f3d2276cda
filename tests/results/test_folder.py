"""Which folders are taken, which are refused, and what is removed: only files of ours, only when asked."""

import errno
import os

import pytest
from results_cases import FINGERPRINT, digests, make_layout, make_prompts, open_writer, write_folder

from fisher_vmap.errors import UserError
from fisher_vmap.results.folder import inspect_folder
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.writer import ResultsWriter


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k_tokens": 5}, "top_k_tokens is 5 here but 4 in DIR; use another --output_dir or --overwrite"),
        ({"seed": 1}, "seed is 1 here but not set in DIR; use another"),
        (
            {"top_k_tokens": 5, "hook_layer_name": ["blocks.1"]},
            "top_k_tokens is 5 here but 4, hook_layer_name is ['blocks.1'] here but ['blocks.0'] in DIR; use",
        ),
        ({"model_path": "x" * 200}, f"model_path is {'x' * 59}… here but tiny in DIR; use"),
        ({"data": {"hash": "ab", "rows": 3}}, "data.hash is ab here but not set, data.rows is 3 here but not set in"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, message):
    folder = tmp_path / "results"
    write_folder(folder)
    before = digests(folder)
    fingerprint = {**FINGERPRINT, **change}
    assert refusal(open_writer, folder, fingerprint=fingerprint).startswith(message.replace("DIR", str(folder)))
    assert refusal(inspect_folder, folder, fingerprint).startswith(message.replace("DIR", str(folder)))
    assert digests(folder) == before


def test_equal_settings_of_other_python_types_are_accepted(tmp_path):
    write_folder(tmp_path)
    open_writer(tmp_path, fingerprint={"hook_layer_name": ("blocks.0",), "top_k_tokens": 4, "model_path": "tiny"})
    index = inspect_folder(tmp_path, FINGERPRINT)
    assert index is not None and index.complete


def test_other_shapes_are_refused(tmp_path):
    write_folder(tmp_path)
    assert "shard_size is 5 here but 4 in" in refusal(open_writer, tmp_path, shard_size=5)
    assert "widths.blocks.0 is 8 here but 7 in" in refusal(open_writer, tmp_path, make_layout({"blocks.0": 8}))


def test_a_run_that_was_taken_over_stops(tmp_path):
    writer = open_writer(tmp_path)
    open_writer(tmp_path, fingerprint={**FINGERPRINT, "seed": 2}, overwrite=True)
    assert "seed is not set here but 2 in" in refusal(writer.add, 0, make_prompts(0, 4, make_layout()))
    assert "seed" in refusal(writer.missing_shards, 4) and "seed" in refusal(writer.finish, settings={})


def test_overwrite_removes_our_files_and_no_others(tmp_path):
    write_folder(tmp_path, 20, make_layout({"a": 7, "b": 7}))
    notes = [tmp_path / "notes.txt", tmp_path / "shards" / "mine.safetensors", tmp_path / "plots" / "a.png"]
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    layout = make_layout(rank=2)
    writer = open_writer(tmp_path, layout, fingerprint={"other": 1}, overwrite=True)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".lock", "index.json", *(str(path.relative_to(tmp_path)) for path in notes)}
    assert writer.missing_shards(3) == [(0, 0, 3)]
    writer.add(0, make_prompts(0, 3, layout))
    writer.finish(settings={})
    assert len(open_results(tmp_path, check="full")) == 3
    assert all(path.read_text() == "mine" for path in notes)


def test_overwrite_begins_anew_over_a_damaged_index(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(path.read_text()[:500])
    assert "index.json is damaged or was changed" in refusal(open_writer, tmp_path)
    assert write_folder(tmp_path, overwrite=True) == [0, 1, 2]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    ["thesis.tex", "shards/other.bin", "metadata.yaml/x", "model/config.json", "prompts.parquet",
     "shards/shard-00000.safetensors"],
)  # fmt: skip
def test_a_folder_of_something_else_is_left_alone(tmp_path, name, overwrite):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    message = refusal(open_writer, tmp_path, overwrite=overwrite)
    shown = name if name.startswith("shards") else name.split("/")[0]
    assert message == f"{tmp_path} holds other files (such as {shown}) and no index.json; choose another --output_dir"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_index_of_something_else_is_left_alone(tmp_path, overwrite):
    (tmp_path / "index.json").write_text('{"pages": []}')
    (tmp_path / "metadata.yaml").write_text("mine")
    message = refusal(open_writer, tmp_path, overwrite=overwrite)
    assert "is damaged, or of something else: it has no checksum; name another folder" in message
    assert (tmp_path / "metadata.yaml").read_text() == "mine"


def test_an_empty_folder_and_what_a_killed_start_leaves_are_taken(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".index.json~host~1~0123456789ab.tmp").touch()
    assert inspect_folder(tmp_path) is None
    assert write_folder(tmp_path) == [0, 1, 2]


def test_parents_are_made_and_text_paths_taken(tmp_path):
    write_folder(str(tmp_path / "a" / "b" / "c"))
    assert len(open_results(str(tmp_path / "a" / "b" / "c"))) == 10
    assert inspect_folder(tmp_path / "nothing" / "here") is None


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file, not a folder; choose another" in refusal(open_writer, tmp_path / "file")
    message = refusal(open_writer, tmp_path / "file" / "below")
    todo = "choose a place that can be written"
    assert message == f"cannot write {tmp_path / 'file' / 'below'}: not a directory; {todo}"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "shards").touch()
    assert "holds other files (such as shards) and no index.json" in refusal(open_writer, tmp_path / "results")
    assert "file name too long" in refusal(open_writer, tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only file system"), (errno.EIO, "input/output error")],
)
@pytest.mark.parametrize("operation", ["mkdir", "replace", "fsync"])
def test_an_unwritable_folder(tmp_path, monkeypatch, operation, number, reason):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, refuse)
        message = refusal(open_writer, tmp_path / "results")
    assert message.startswith(f"cannot write {tmp_path / 'results'}") and f": {reason}; choose" in message
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "permission denied" in refusal(open_writer, tmp_path / "results")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": {"a/b": 3}}, "layer name 'a/b' cannot be part of a file name"),
        ({"widths": {"": 3}}, "layer name '' cannot be"),
        ({"keep_columns": ("status",)}, "keep_columns has 'status', a name that prompts.parquet uses"),
        ({"keep_columns": ("blocks.0/trace",)}, "keep_columns has 'blocks.0/trace'"),
        ({"keep_columns": ("a", "a")}, "keep_columns names a column twice: a, a"),
    ],
)
def test_names_that_cannot_be_stored(tmp_path, options, message):
    assert message in refusal(open_writer, tmp_path / "results", make_layout(**options))
    assert not (tmp_path / "results").exists()


def test_a_way_of_saving_that_does_not_exist(tmp_path):
    assert "save is 'all', expected 'both'" in refusal(write_folder, tmp_path, save="all")
    assert "but the run was begun without 'mean'" in refusal(write_folder, tmp_path, save="mean")


def test_other_versions_are_told(tmp_path, monkeypatch, caplog):
    write_folder(tmp_path)
    monkeypatch.setattr("fisher_vmap.results.writer.installed_versions", lambda: {"numpy": "0.1"})
    ResultsWriter.open(tmp_path, layout=make_layout(), shard_size=4, fingerprint=FINGERPRINT)
    assert "was begun with" in caplog.text and "(now 0.1)" in caplog.text
