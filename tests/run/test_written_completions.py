"""Runs whose model writes: stopped, killed, extended and shared, a completion is drawn once and the same each time."""

import signal
import sys
import time

import pytest
from command_cases import arguments, numbers_of, real_command, run_here, save_model, start_command, texts, write_prompts

from fisher_vmap import completions, open_results
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.results.index import ShardLayout, read_index
from fisher_vmap.run.__main__ import main
from fisher_vmap.run.fingerprint import LATER
from fisher_vmap.verify.__main__ import main as verify

DRAWN = {"targets": 3, "samples": 2, "completion_seed": 4, "estimator": "full"}
GREEDY = {"targets": 3, "estimator": "full"}
NEW = {"targets", "samples", "temperature", "completion_seed", "score_samples"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), write_prompts(folder / "prompts.jsonl", [*texts(11, longest=20), "", "x"])


@pytest.fixture
def asked(monkeypatch):
    """The prompts that completions are written to, in order."""
    seen, complete = [], completions.complete

    def counted(model, prompts_ids, *args, **options):
        seen.extend(map(tuple, prompts_ids))
        return complete(model, prompts_ids, *args, **options)

    monkeypatch.setattr(completions, "complete", counted)
    return seen


def written(out):
    return [record.completion_ids for record in open_results(out)]


def stopped_at(monkeypatch, batch):
    """Within the context the run is stopped before this batch."""
    calls, numbers = [], FisherModel.numbers

    def interrupted(self, prompts, rank):
        calls.append(len(prompts))
        if len(calls) == batch:
            raise KeyboardInterrupt
        return numbers(self, prompts, rank)

    monkeypatch.setattr(FisherModel, "numbers", interrupted)


@pytest.mark.parametrize("settings", [DRAWN, GREEDY])
def test_stopped_and_resumed_to_the_bit(inputs, tmp_path, settings, asked):
    assert run_here(*inputs, tmp_path / "whole", **settings) == 0
    assert len(asked) == 12 * settings.get("samples", 1)  # one prompt is empty
    for batch in (3, 4):  # the proof is one
        out = tmp_path / str(batch)
        with pytest.MonkeyPatch.context() as patch:
            stopped_at(patch, batch)
            assert run_here(*inputs, out, **settings) == 130
        stored = len(open_results(out, allow_incomplete=True))
        asked.clear()
        assert stored in (0, 4, 8) and run_here(*inputs, out, **settings) == 0
        expected = sum(1 for i in range(13) if i >= stored and i != 11)
        assert len(asked) == expected * settings.get("samples", 1)  # those that are stored are not drawn again
        assert numbers_of(out) == numbers_of(tmp_path / "whole")
    assert verify([str(out)]) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_killed_and_resumed_to_the_bit(inputs, tmp_path):
    argv = arguments(*inputs, tmp_path / "killed", **DRAWN)
    assert real_command(arguments(*inputs, tmp_path / "whole", **DRAWN)).returncode == 0
    process = start_command(argv)
    while process.poll() is None and not list((tmp_path / "killed").glob("shards/shard-*.parquet")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert real_command(argv).returncode == 0
    assert numbers_of(tmp_path / "killed") == numbers_of(tmp_path / "whole")


@pytest.mark.parametrize("settings", [DRAWN, GREEDY])
def test_more_prompts_draw_nothing_again(inputs, tmp_path, settings, asked):
    """Shard 1 was stored with two of its four prompts."""
    samples = settings.get("samples", 1)
    assert run_here(*inputs, tmp_path / "grown", **settings, num_prompts=6) == 0
    before = written(tmp_path / "grown")
    asked.clear()
    assert run_here(*inputs, tmp_path / "grown", **settings, num_prompts=13) == 0
    assert len(asked) == 6 * samples  # prompts 6 to 12 but for the empty one
    assert written(tmp_path / "grown")[:6] == before
    assert run_here(*inputs, tmp_path / "whole", **settings) == 0
    assert written(tmp_path / "grown") == written(tmp_path / "whole")
    assert numbers_of(tmp_path / "grown") == numbers_of(tmp_path / "whole")


@pytest.mark.parametrize("settings", [DRAWN, {"targets": "all"}])
def test_two_processes_fill_one_folder(inputs, tmp_path, settings):
    assert run_here(*inputs, tmp_path / "one", **settings) == 0
    for share in ("2/2", "1/2"):
        assert main([*arguments(*inputs, tmp_path / "two", **settings), "--shards", share]) == 0
    assert numbers_of(tmp_path / "two") == numbers_of(tmp_path / "one")


def test_another_seed_or_temperature_is_another_run(inputs, tmp_path, capsys):
    out, few = tmp_path / "out", {"num_prompts": 2}
    assert run_here(*inputs, out, **DRAWN, **few) == 0
    for change in ({"completion_seed": 5}, {"targets": 4}, {"samples": 3}, {"temperature": 0.5}):
        capsys.readouterr()
        assert run_here(*inputs, out, **few, **{**DRAWN, **change}) == 2
        assert f"{next(iter(change))} is " in capsys.readouterr().err
    assert run_here(*inputs, tmp_path / "other", **few, **{**DRAWN, "completion_seed": 5}) == 0
    assert written(tmp_path / "other") != written(out)


def test_a_prompt_for_whose_completion_there_is_no_memory_fails_alone(inputs, tmp_path, monkeypatch):
    complete = completions.complete
    longest = max(texts(11, longest=20), key=len)

    def short_of_memory(model, prompts_ids, *args, **options):
        if any(len(ids) > len(longest) + 3 - 1 for ids in prompts_ids):
            raise MemoryError
        return complete(model, prompts_ids, *args, **options)

    monkeypatch.setattr(completions, "complete", short_of_memory)
    assert run_here(*inputs, tmp_path / "out", **GREEDY) == 0
    table = open_results(tmp_path / "out").to_pandas()
    failed = table[table["status"] == "failed"]
    assert 0 < len(failed) < 5 and set(failed["text"].map(len)) == {len(longest)}
    assert failed["reason"].tolist() == len(failed) * ["out of memory where the model writes its completions"]


def test_folders_from_before_have_none_of_it(inputs, tmp_path):
    assert run_here(*inputs, tmp_path / "out", num_prompts=4) == 0
    index = read_index(tmp_path / "out")
    assert not {*NEW, "completions", "completion_column"} & set(index.fingerprint) and NEW < LATER
    older = {name: value for name, value in index.layout.model_dump().items() if name != "pairs"}
    assert ShardLayout.model_validate({**older, "keep_columns": ()}) == index.layout
    assert run_here(*inputs, tmp_path / "out", num_prompts=8) == 0
    record = open_results(tmp_path / "out")[5]
    assert record.targets is None and record.completions is None and record.mass > 0


def test_a_column_by_name_or_found_is_the_same_run(tmp_path, inputs, capsys):
    data = write_prompts(tmp_path / "p.jsonl", texts(3), answer=["a", "b", "c"], other=["d", "e", "f"])
    choice = {"targets": "completion", "estimator": "full"}
    assert run_here(inputs[0], data, tmp_path / "out", **choice) == 0
    assert run_here(inputs[0], data, tmp_path / "out", **choice, completion_column="answer") == 0
    assert run_here(inputs[0], data, tmp_path / "out", **choice, completion_column="other") == 2
    assert "completions is column 'other' here but column 'answer'" in capsys.readouterr().err
