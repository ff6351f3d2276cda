"""Killed, resumed, extended, shared: the folder always ends as an undisturbed run's does, to the bit."""

import os
import signal
import stat
import sys
import threading
import time

import numpy as np
import pytest
from results_cases import RESOLVED, SETTINGS, digests, make_layout, make_prompts, open_writer, write_folder

from fisher_vmap.errors import UserError
from fisher_vmap.results import files
from fisher_vmap.results.files import folder_lock
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.shard import write_shard

LAYOUT = make_layout({"blocks.0": 7, "blocks.1": 7})
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


class Killed(BaseException):
    """Like Ctrl-C at a chosen moment: no handler of ordinary errors sees it."""


def count_operations(monkeypatch, die_at=None, die=None):
    """Count flushes, renames and removals; at number `die_at`, die just before it happens."""
    count = [0]

    def counted(function):
        def operation(*args, **kwargs):
            count[0] += 1
            if count[0] == die_at:
                die()
            return function(*args, **kwargs)

        return operation

    for name in ("fsync", "replace", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return count


def raise_killed():
    raise Killed


def run(folder, num_prompts=10):
    return write_folder(folder, num_prompts, LAYOUT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "results"
    assert run(folder) == [0, 1, 2]
    return digests(folder)


@pytest.fixture(scope="module")
def undisturbed_short(tmp_path_factory):
    """A run of two shards, and how many file operations it takes."""
    folder = tmp_path_factory.mktemp("short") / "results"
    with pytest.MonkeyPatch.context() as monkeypatch:
        operations = count_operations(monkeypatch)
        assert run(folder, 5) == [0, 1]
    return digests(folder), operations[0]


def assert_readable(folder):
    """Whatever is there now is refused in one line, or read rightly."""
    try:
        results = open_results(folder, check="full", allow_incomplete=True)
    except UserError as error:
        assert "no index.json" in str(error)
        return
    for record in results:
        expected = make_prompts(record.index, record.index + 1, LAYOUT)[0]
        assert record.status == expected.status
        if record.status == "ok":
            assert np.array_equal(record.S, expected.layers["blocks.0"].S.astype(np.float32))


def test_an_interrupt_between_every_pair_of_file_operations(tmp_path, undisturbed_short):
    expected, operations = undisturbed_short
    assert operations > 40
    for number in range(1, operations + 1):
        folder = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as monkeypatch:
            count_operations(monkeypatch, number, raise_killed)
            with pytest.raises(Killed):
                run(folder, 5)
        assert_readable(folder)
        run(folder, 5)
        assert digests(folder) == expected, f"killed before file operation {number}"


@needs_fork
def test_sigkill_at_file_operations(tmp_path, undisturbed_short):
    expected, operations = undisturbed_short
    for number in range(1, operations + 1, 4):
        folder = tmp_path / str(number)
        child = os.fork()
        if child == 0:
            count_operations(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                run(folder, 5)
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        if folder.exists():
            assert_readable(folder)
        run(folder, 5)
        assert digests(folder) == expected, f"killed before file operation {number}"


def test_what_is_stored_is_not_computed_again(tmp_path):
    writer = open_writer(tmp_path, LAYOUT)
    writer.missing_shards(10)
    writer.add(1, make_prompts(4, 8, LAYOUT))
    assert run(tmp_path) == [0, 2]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(tmp_path) == []
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    del before[tmp_path / ".lock"], after[tmp_path / ".lock"]
    assert after == before


def test_what_was_resolved_is_stored_and_reused(tmp_path):
    assert open_writer(tmp_path, resolved=None).resolved is None
    assert open_writer(tmp_path, resolved=None).settle({"max_batch_tokens": 64}) == {"max_batch_tokens": 64}
    resumed = open_writer(tmp_path, resolved={"max_batch_tokens": 128})
    assert resumed.resolved == {"max_batch_tokens": 64}
    resumed.note("split", [3])
    assert open_writer(tmp_path, resolved=RESOLVED).resolved == {"max_batch_tokens": 64, "split": [3]}


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_a_damaged_shard_is_computed_again_alone(tmp_path, undisturbed, damage, suffix):
    run(tmp_path)
    path = tmp_path / "shards" / f"shard-00001.{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-5])
    assert run(tmp_path) == [1]
    assert digests(tmp_path) == undisturbed


@pytest.mark.parametrize("name", ["prompts.parquet", "mean.safetensors", "metadata.yaml"])
def test_a_damaged_file_made_from_the_shards_is_made_again(tmp_path, undisturbed, name):
    run(tmp_path)
    (tmp_path / name).write_bytes(b"damaged")
    assert run(tmp_path) == []
    assert digests(tmp_path) == undisturbed


def test_more_prompts_extend_a_finished_folder(tmp_path):
    assert write_folder(tmp_path / "grown", 10, LAYOUT) == [0, 1, 2]
    old = digests(tmp_path / "grown")
    assert write_folder(tmp_path / "grown", 14, LAYOUT, finish=False) == [2, 3]  # shard 2 was not full
    with pytest.raises(UserError, match="unfinished: 14 of 14"):
        open_results(tmp_path / "grown")
    assert write_folder(tmp_path / "grown", 14, LAYOUT) == []
    write_folder(tmp_path / "whole", 14, LAYOUT)
    new = digests(tmp_path / "grown")
    assert new == digests(tmp_path / "whole")
    assert new["shards/shard-00001.safetensors"] == old["shards/shard-00001.safetensors"]


def test_fewer_prompts_keep_what_is_there(tmp_path):
    run(tmp_path)
    before = digests(tmp_path)
    assert write_folder(tmp_path, 5, LAYOUT) == []
    assert digests(tmp_path) == before
    # Unfinished and with a gap: the gap is filled up to what is stored, and nothing more.
    writer = open_writer(tmp_path / "gap", LAYOUT)
    writer.missing_shards(100)
    writer.add(2, make_prompts(8, 12, LAYOUT))
    assert write_folder(tmp_path / "gap", 5, LAYOUT) == [0, 1]
    assert len(open_results(tmp_path / "gap", check="full")) == 12


def test_a_run_that_learns_its_number_of_prompts_at_the_end(tmp_path, undisturbed):
    writer = open_writer(tmp_path, LAYOUT)
    for number, start, stop in ((0, 0, 4), (1, 4, 8), (2, 8, 10)):
        assert not writer.is_stored(number, start, stop)
        writer.add(number, make_prompts(start, stop, LAYOUT))
        assert writer.is_stored(number, start, stop) and not writer.is_stored(number, start, stop + 1)
    writer.finish(10, settings=SETTINGS)
    assert digests(tmp_path) == undisturbed


def test_finishing_too_early_names_what_is_missing(tmp_path):
    writer = open_writer(tmp_path, LAYOUT)
    writer.missing_shards(10)
    writer.add(1, make_prompts(4, 8, LAYOUT))
    with pytest.raises(UserError, match=r"lacks 2 shards \(0, 2\) of its 10 prompts; give the command of its run"):
        writer.finish(settings=SETTINGS)
    assert not open_results(tmp_path, allow_incomplete=True).index.complete


def test_the_npz_can_be_added_and_left_out_later(tmp_path, undisturbed):
    write_folder(tmp_path, 10, LAYOUT, export_npz=False, save="prompts")
    assert not list(tmp_path.glob("*.npz")) and not (tmp_path / "mean.safetensors").exists()
    write_folder(tmp_path, 10, LAYOUT)
    assert digests(tmp_path) == undisturbed
    write_folder(tmp_path, 10, LAYOUT, export_npz=False)
    assert not list(tmp_path.glob("*.npz"))
    open_results(tmp_path, check="full")


def test_several_processes_fill_one_folder(tmp_path, undisturbed):
    errors = []

    def fill():
        try:
            run(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert digests(tmp_path) == undisturbed


def test_a_shard_is_compared_with_its_checksum_once(tmp_path, monkeypatch):
    run(tmp_path)
    checked = []
    original = files.sha256_of
    monkeypatch.setattr("fisher_vmap.results.files.sha256_of", lambda path: checked.append(path) or original(path))
    writer = open_writer(tmp_path, LAYOUT)
    assert writer.missing_shards(10) == [] and writer.is_stored(1, 4, 8)
    assert len(checked) == 6
    (tmp_path / "shards" / "shard-00001.parquet").unlink()
    assert not writer.is_stored(1, 4, 8)


def test_the_first_result_of_two_stays(tmp_path):
    first, second = open_writer(tmp_path, LAYOUT), open_writer(tmp_path, LAYOUT)
    entry = first.add(0, make_prompts(0, 4, LAYOUT))
    assert second.add(0, make_prompts(0, 4, LAYOUT, seed=1)) == entry  # as from another machine: other bits
    assert second.is_stored(0, 0, 4)


def test_workers_store_shards_and_another_process_lists_them(tmp_path, undisturbed):
    writer = open_writer(tmp_path, LAYOUT)
    mark = writer.index.mark
    entries = [
        write_shard(tmp_path, n, make_prompts(a, b, LAYOUT), LAYOUT, mark) for n, a, b in writer.missing_shards(10)
    ]
    open_writer(tmp_path, LAYOUT)  # a restarted driver leaves them where they are
    writer.record(entries)
    assert writer.missing_shards(10) == []
    writer.finish(settings=SETTINGS)
    assert digests(tmp_path) == undisturbed
    (tmp_path / "shards" / entries[0].file).unlink()
    with pytest.raises(UserError, match="shard-00000"):
        writer.record(entries[:1])


@needs_fork
@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_a_killed_process_leaves_no_lock(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with folder_lock(tmp_path):
            os.write(writer, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with folder_lock(tmp_path):
        pass


def test_a_file_is_flushed_before_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events = []
    replace, fstat = os.replace, os.fstat
    monkeypatch.setattr(os, "fsync", lambda d: events.append("folder" if stat.S_ISDIR(fstat(d).st_mode) else "file"))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or replace(*paths))
    with files.replacing(tmp_path / "x") as file:
        file.write(b"new")
        assert not (tmp_path / "x").exists()
    assert events == ["file", "rename", "folder"] and (tmp_path / "x").read_bytes() == b"new"


def test_temporary_files_of_the_dead_are_removed(tmp_path):
    host = files._HOST
    dead = tmp_path / f".x.npz~{host}~{2**22 + 5}~0123456789ab.tmp"
    ours_before = tmp_path / f".x.npz~{host}~{os.getpid()}~0123456789ab.tmp"
    alive = tmp_path / f".x.npz~{host}~{os.getppid()}~0123456789ab.tmp"
    elsewhere = tmp_path / ".x.npz~another-host~1~0123456789ab.tmp"
    elsewhere_old = tmp_path / ".x.npz~another-host~2~0123456789ab.tmp"
    for path in (dead, ours_before, alive, elsewhere, elsewhere_old, tmp_path / "notes.tmp"):
        path.touch()
    os.utime(elsewhere_old, (0, 0))
    with files.staged(tmp_path / "y") as stage:
        assert files.remove_stale_temporaries(tmp_path) == 3
        assert {path.name for path in tmp_path.iterdir()} == {
            alive.name, elsewhere.name, "notes.tmp", stage.temporary.name
        }  # fmt: skip


def test_a_folder_that_stored_a_setting_that_is_gone_is_carried_on_with_one_line(tmp_path, caplog):
    """`compile` was one: its folders hold it in the fingerprint, and in what was resolved."""
    out, old = tmp_path / "out", {"model": "m", "compile": "auto"}
    writer = open_writer(out, fingerprint=old, resolved={"compile": True})
    writer.add(0, make_prompts(0, 4, make_layout()))
    caplog.clear()
    writer = open_writer(out, fingerprint={"model": "m"})
    assert [shard.number for shard in writer.missing_shards(8)] == [1]
    assert [r.getMessage() for r in caplog.records if "compile" in r.getMessage()] == [
        f"{out} was begun with the setting compile, which is gone: numbers may differ in their last digits"
    ]
    writer.add(1, make_prompts(4, 8, make_layout()))
    writer.finish(8, settings={})
    assert len(open_results(out)) == 8
    with pytest.raises(UserError, match="model is n here but m"):
        open_writer(out, fingerprint={"model": "n"})
