"""Several processes that fill one folder, each with its share of the shards, without a word between them."""

import random
import time

import numpy as np
import pytest
import torch
from command_cases import (
    SETTINGS,
    SHARDS,
    arguments,
    numbers_of,
    real_command,
    run_here,
    start_command,
    write_shards,
)

from fisher_vmap import open_results
from fisher_vmap.finish import main as finish
from fisher_vmap.run.__main__ import main
from fisher_vmap.run.compute import Share


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def alone(model, data, tmp_path_factory):
    """What one process leaves, in this process and as a command of its own."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert run_here(model, data, out, **SETTINGS) == 0
    return out


def share(model, data, out, shards, **settings):
    return main([*arguments(model, data, out, **{**SETTINGS, **settings}), "--shards", shards])


def test_three_processes_at_once_one_killed_and_run_again(model, data, tmp_path):
    chance = random.Random(3)
    one, out = tmp_path / "one", tmp_path / "out"
    argv = arguments(model, data, out, **SETTINGS)
    members = [start_command([*argv, f"--shards={i}/3"]) for i in (1, 2, 3)]
    while len(list(out.glob("shards/shard-*.json"))) < 2 and any(member.poll() is None for member in members):
        time.sleep(0.005)
    time.sleep(0.1 * chance.random())
    members[1].kill()
    members[1].wait()
    assert real_command([*argv, "--shards", "2/3"]).returncode == 0
    assert [member.wait() for member in members[::2]] == [0, 0]
    assert open_results(out, check="full").index.complete
    assert real_command(arguments(model, data, one, **SETTINGS)).returncode == 0
    assert numbers_of(out) == numbers_of(one)
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("shard-*.json"))


def test_each_computes_its_own_shards_and_the_last_one_finishes(model, data, alone, tmp_path, caplog):
    out = tmp_path / "out"
    caplog.set_level("INFO")
    for shards, those in (("2/3", range(1, SHARDS, 3)), ("3/3", range(2, SHARDS, 3))):
        before = set(out.glob("shards/*.json"))
        assert share(model, data, out, shards) == 0
        names = {f"shard-{number:05d}.json" for number in those}
        assert {path.name for path in set(out.glob("shards/*.json")) - before} == names
        assert not open_results(out, allow_incomplete=True).index.complete
    assert "5 of 13 shards are not there yet; the process that computes the last one finishes" in caplog.text
    assert share(model, data, out, "1/3") == 0
    assert numbers_of(out) == numbers_of(alone)
    assert share(model, data, out, "2/3") == 0  # nothing is left to do
    assert numbers_of(out) == numbers_of(alone)


def test_a_run_on_one_machine_carries_on_what_an_array_began(model, data, alone, tmp_path):
    assert share(model, data, tmp_path / "out", "2/2") == 0
    assert run_here(model, data, tmp_path / "out", **SETTINGS) == 0
    assert numbers_of(tmp_path / "out") == numbers_of(alone)


def test_finish_where_nobody_saw_the_last_shard(model, data, alone, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("fisher_vmap.run.compute._is_last", lambda writer, total: False)
    assert share(model, data, out, "1/2") == 0
    assert finish([str(out)]) == 2
    assert "lacks 6 shards (1, 3, 5, 7, 9, ...) of its 38 prompts" in capsys.readouterr().err
    assert share(model, data, out, "2/2") == 0
    assert not open_results(out, allow_incomplete=True).index.complete
    assert finish([str(out)]) == 0
    assert capsys.readouterr().out == f"{out} is complete: 38 prompts in 13 shards\n"
    assert numbers_of(out) == numbers_of(alone)
    assert (out / "metadata.yaml").read_text().replace(str(out), "OUT") == (
        (alone / "metadata.yaml").read_text().replace(str(alone), "OUT")
    )
    assert finish([str(tmp_path)]) == 2
    assert "not a results folder" in capsys.readouterr().err


def test_the_mean_alone_from_several_processes(model, data, alone, tmp_path, monkeypatch):
    monkeypatch.setattr("fisher_vmap.results.means.fold.__defaults__", (2,))
    out = tmp_path / "out"
    for shards in ("3/3", "1/3", "2/3"):
        assert share(model, data, out, shards, save="mean") == 0
    for layer in open_results(out, check="full").layers:
        np.testing.assert_array_equal(open_results(out).mean(layer), open_results(alone).mean(layer))
    assert (out / "mean.safetensors").read_bytes() == (alone / "mean.safetensors").read_bytes()


def test_prompts_whose_number_is_known_at_the_end_alone(model, data, alone, tmp_path, monkeypatch):
    from fisher_vmap.data.prompts import PromptSource

    monkeypatch.setattr(PromptSource, "total", property(lambda self: None, lambda self, value: None), raising=False)
    for shards in ("2/2", "1/2"):
        assert share(model, data, tmp_path / "out", shards) == 0
    assert numbers_of(tmp_path / "out") == numbers_of(alone)


def test_the_choices_of_the_process_that_came_first_hold(model, data, tmp_path, monkeypatch):
    out, threads = tmp_path / "out", torch.get_num_threads()
    assert share(model, data, out, "1/2") == 0
    first = open_results(out, allow_incomplete=True).index.resolved
    # As if the folder had been begun since it was looked at, on a machine with other choices.
    monkeypatch.setattr("fisher_vmap.run.open.inspect_folder", lambda *args: None)
    monkeypatch.setattr("fisher_vmap.fisher_model.batch_tokens_for", lambda *args: 17)
    try:
        torch.set_num_threads(threads + 1)
        assert share(model, data, out, "2/2") == 0
        assert torch.get_num_threads() == first["threads"]
    finally:
        torch.set_num_threads(threads)
    assert open_results(out).index.resolved == first and first["max_batch_tokens"] != 17


@pytest.mark.parametrize(
    ("shards", "settings", "words"),
    [
        ("0/3", {}, ["shards: '0/3' was given, i/n with i from 1 to n"]),
        ("4/3", {}, ["shards: '4/3' was given"]),
        ("2", {}, ["shards: '2' was given"]),
        ("1/3", {"overwrite": "true"}, ["--shards with overwrite", "remove the folder first"]),
        ("1/3", {"engine": "ray"}, ["--shards is for engine local"]),
    ],
)
def test_shares_that_cannot_be(model, data, tmp_path, shards, settings, words, capsys):
    assert share(model, data, tmp_path / "out", shards, **settings) == 2
    error = capsys.readouterr().err
    assert error.strip().count("\n") == 0 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_shares_cover_everything_once():
    for n in (1, 2, 5):
        parts = [list(Share(i, n).of(range(11))) for i in range(1, n + 1)]
        assert sorted(item for part in parts for item in part) == list(range(11))
        assert all(Share(i + 1, n).has(item) for i, part in enumerate(parts) for item in part)
