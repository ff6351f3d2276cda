"""What several processes write into one folder: entries beside the shards, and an index.json that follows."""

import json
import time
from itertools import pairwise

import pytest
from results_cases import digests, make_layout, make_prompts, open_writer, write_folder

from fisher_vmap.results import writer as writer_module
from fisher_vmap.results.files import AT_WORK_NAME, at_work
from fisher_vmap.results.index import entry_name, read_entries, read_entry, read_index, read_index_file
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.shard import write_shard

LAYOUT = make_layout()


def add(writer, *numbers):
    for number in numbers:
        writer.add(number, make_prompts(4 * number, 4 * number + 4, LAYOUT))


def test_index_json_is_written_less_and_less_often(tmp_path, monkeypatch):
    written = []
    original = writer_module.write_index
    monkeypatch.setattr(
        writer_module, "write_index", lambda folder, index: written.append(len(index.shards)) or original(folder, index)
    )
    writer = open_writer(tmp_path)
    writer.missing_shards(400)
    written.clear()
    add(writer, *range(100))
    assert written[:8] == [1, 2, 3, 4, 5, 6, 7, 8] and len(written) < 40
    assert all(after - before <= 1 + before // 8 for before, after in pairwise(written))
    assert len(read_index_file(tmp_path).shards) == written[-1]
    assert len(read_index(tmp_path).shards) == 100  # nothing that is stored is overlooked
    assert len(open_results(tmp_path, allow_incomplete=True)) == 400


def test_who_fills_a_folder_sees_that_others_do(tmp_path):
    for _ in range(2):
        with at_work(tmp_path) as others:
            assert not others
            with at_work(tmp_path) as others_of_the_second:
                assert others_of_the_second
            with at_work(tmp_path) as others_of_the_third:
                assert others_of_the_third
        assert list(tmp_path.iterdir()) == []
    (tmp_path / AT_WORK_NAME).touch()  # what one that was killed leaves
    with at_work(tmp_path) as others:
        assert not others
    with at_work(tmp_path / "none") as others:  # it cannot be known there, and hinders nobody
        assert not others


def test_two_processes_lose_nothing_of_each_other(tmp_path):
    one, other = open_writer(tmp_path), open_writer(tmp_path)
    one.missing_shards(80)
    for number in range(0, 20, 2):
        add(one, number)
        add(other, number + 1)
    assert len(read_index(tmp_path).shards) == 20
    other.finish(settings={}, export_npz=True)
    assert not list(tmp_path.glob("shards/*.json"))
    write_folder(tmp_path.parent / "alone", 80)
    mine, alone = digests(tmp_path), digests(tmp_path.parent / "alone")
    assert {name for name in alone if mine[name] != alone[name]} == {"metadata.yaml", "index.json"}  # its settings


def test_what_a_writer_without_the_lock_overwrites_in_index_json_is_not_lost(tmp_path):
    """As on a file system whose locks do nothing: an older index.json comes over a newer one."""
    writer = open_writer(tmp_path)
    writer.missing_shards(16)
    before = (tmp_path / "index.json").read_bytes()
    add(writer, 0, 1, 2)
    (tmp_path / "index.json").write_bytes(before)
    assert [shard.number for shard in open_writer(tmp_path).missing_shards(16)] == [3]


def test_an_entry_of_other_settings_or_a_damaged_one_does_not_count(tmp_path):
    writer = open_writer(tmp_path)
    writer.missing_shards(16)
    add(writer, 0)
    path = tmp_path / "shards" / entry_name(0)
    values, mark = json.loads(path.read_text()), writer.index.mark
    assert read_entry(tmp_path, 0, mark) == writer.index.shards[0]
    assert read_entry(tmp_path, 0, "0" * 16) is None and read_entry(tmp_path, 1, mark) is None
    spoilt = [b"", b"[]", json.dumps({**values, "start": 4, "stop": 3}).encode(), path.read_bytes()[:-9]]
    for damage in (*spoilt, json.dumps({**values, "number": 1}).encode(), json.dumps({**values, "x": 1}).encode()):
        path.write_bytes(damage)
        assert read_entries(tmp_path, mark) == []


def test_an_entry_whose_shard_was_replaced_is_computed_again(tmp_path):
    """As by a worker of another run that still goes on in the folder."""
    writer = open_writer(tmp_path)
    writer.missing_shards(8)
    add(writer, 0, 1)
    write_shard(tmp_path, 1, make_prompts(4, 8, LAYOUT, seed=1), LAYOUT, "another mark")
    again = open_writer(tmp_path)
    assert [shard.number for shard in again.missing_shards(8)] == [1]
    add(again, 1)
    again.finish(settings={})
    open_results(tmp_path, check="full")


def test_a_worker_leaves_a_shard_that_is_there(tmp_path):
    writer = open_writer(tmp_path)
    mark = writer.index.mark
    first = write_shard(tmp_path, 0, make_prompts(0, 4, LAYOUT), LAYOUT, mark)
    assert write_shard(tmp_path, 0, make_prompts(0, 4, LAYOUT, seed=1), LAYOUT, mark) == first
    assert writer.is_stored(0, 0, 4)  # also for a process that was not told


def test_a_process_checks_its_own_shards_alone(tmp_path):
    writer = open_writer(tmp_path)
    writer.missing_shards(16)
    add(writer, 0, 1, 2)
    for number in (0, 1):
        (tmp_path / "shards" / f"shard-{number:05d}.parquet").write_bytes(b"x")
    again = open_writer(tmp_path)
    assert [shard.number for shard in again.missing_shards(16, lambda number: number % 2 == 1)] == [1, 3]
    assert [shard.number for shard in open_writer(tmp_path).missing_shards(16)] == [0, 1, 3]


@pytest.mark.slow
def test_storing_a_shard_costs_the_same_however_many_there_are(tmp_path):
    """10,000 shards: what was quadratic took minutes. A ratio, with room for a busy machine."""
    writer = open_writer(tmp_path)
    writer.missing_shards(40_000)
    mark, times = writer.index.mark, []
    for start in range(0, 10_000, 1000):
        entries = [
            write_shard(tmp_path, n, make_prompts(4 * n, 4 * n + 4, LAYOUT), LAYOUT, mark)
            for n in range(start, start + 1000)
        ]
        began = time.perf_counter()
        for entry in entries:
            writer.record([entry])
        times.append(time.perf_counter() - began)
    assert len(writer.index.shards) == 10_000
    assert max(times[5:]) < 8 * max(times[:2]), times
