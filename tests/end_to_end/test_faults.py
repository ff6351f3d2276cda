"""What goes wrong on the way: memory, the disk, numbers that are none. What is lost is said, the rest is as it was."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from command_cases import (
    LAYER,
    VOCABULARY,
    arguments,
    environment,
    real_command,
    run_here,
    save_model,
    texts,
    write_prompts,
)
from models import fresh

from fisher_vmap import open_results
from fisher_vmap.data.batching import PromptNumbers
from fisher_vmap.data.sequences import tokens_of
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.results.files import at_work
from fisher_vmap.verify.__main__ import main as verify

resource = pytest.importorskip("resource", reason="needs a limit of the operating system's")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl", texts(14))


@pytest.fixture(scope="module")
def undisturbed(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_here(model, data, out) == 0
    return out


def numbers_of(out):
    kinds = (".safetensors", ".parquet", ".npz")
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.suffix in kinds}


def small_memory(monkeypatch, tokens, error=torch.OutOfMemoryError, broken_at=None):
    """Batches of more than `tokens` tokens, padding included, do not fit; returns the sizes of those tried."""
    tried, numbers = [], FisherModel.numbers

    def limited(self, prompts_ids, rank):
        tried.append(len(prompts_ids))
        if len(tried) == broken_at:
            raise KeyboardInterrupt
        if len(prompts_ids) * max(map(tokens_of, prompts_ids)) > tokens:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return numbers(self, prompts_ids, rank)

    monkeypatch.setattr(FisherModel, "numbers", limited)
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_batch_that_does_not_fit_is_split(undisturbed, model, data, tmp_path, monkeypatch, caplog, error):
    tried = small_memory(monkeypatch, 60, error)
    out = tmp_path / "out"
    assert run_here(model, data, out) == 0
    assert "out of memory on 4 prompts of up to" in caplog.text
    for a, b in zip(open_results(out), open_results(undisturbed), strict=True):
        assert a.status == "ok"
        np.testing.assert_allclose(a.matrix(), b.matrix(), atol=2e-5 * a.S[0])
    splits = open_results(out).index.resolved["splits"]
    assert splits and all(len(batch) > 1 for batch in splits) and len(tried) > len(splits)
    assert yaml.safe_load((out / "metadata.yaml").read_text())["resolved"]["splits"] == splits


def test_a_resumed_run_splits_where_the_first_one_did(model, data, tmp_path, monkeypatch):
    small_memory(monkeypatch, 60)
    assert run_here(model, data, tmp_path / "a") == 0
    monkeypatch.undo()
    small_memory(monkeypatch, 60, broken_at=8)
    assert run_here(model, data, tmp_path / "b") == 130
    splits = open_results(tmp_path / "b", allow_incomplete=True).index.resolved["splits"]
    (tmp_path / "b" / "shards" / "shard-00000.safetensors").unlink()
    monkeypatch.undo()
    tried = small_memory(monkeypatch, 60)
    assert run_here(model, data, tmp_path / "b") == 0
    assert tried[0] < 4 and splits[0] == open_results(tmp_path / "a").index.resolved["splits"][0]
    assert numbers_of(tmp_path / "b") == numbers_of(tmp_path / "a")


def test_more_memory_later_does_not_change_what_was_split(model, data, tmp_path, monkeypatch):
    """The folder's word decides, not what would fit: prompts in other company differ in their last bits."""
    small_memory(monkeypatch, 60)
    out = tmp_path / "out"
    assert run_here(model, data, out) == 0
    before = numbers_of(out)
    for path in (out / "shards").glob("*.safetensors"):
        path.unlink()
    monkeypatch.undo()
    assert run_here(model, data, out) == 0
    assert numbers_of(out) == before


def test_a_prompt_that_does_not_fit_alone_fails_and_the_run_goes_on(model, data, tmp_path, monkeypatch, caplog):
    small_memory(monkeypatch, 38)
    assert run_here(model, data, tmp_path / "out", strict="true") == 3
    table = open_results(tmp_path / "out").to_pandas()
    lost = table["tokens"] > 38
    assert lost.any() and not lost.all()
    assert (table["status"] == np.where(lost, "failed", "ok")).all()
    assert all(reason == f"out of memory on {n} tokens" for reason, n in table[["reason", "tokens"]][lost].values)
    assert f"{lost.sum()} prompts failed" in caplog.text and "out of memory on" in caplog.text
    monkeypatch.undo()
    assert run_here(model, data, tmp_path / "out", strict="true") == 3  # a run that is complete still has them


def test_no_memory_at_all_is_one_line(model, data, tmp_path, monkeypatch, capsys):
    def full(self, *args, **choices):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FisherModel, "scores", full)
    assert run_here(model, data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error and "dtype" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("room", [600, 3_000, 9_000])
def test_a_full_disk_is_one_line_and_the_run_carries_on_later(undisturbed, model, data, tmp_path, capsys, room):
    """No file may grow beyond `room` bytes: the index, the first shard and the npz are cut off."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        code = run_here(model, data, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and error[-1].startswith("fisher_vmap: no space left to write") and "same command" in error[-1]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run_here(model, data, tmp_path / "out") == 0
    assert numbers_of(tmp_path / "out") == numbers_of(undisturbed)


def test_a_full_disk_and_the_real_command(undisturbed, model, data, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))

    done = real_command(arguments(model, data, tmp_path / "out"), preexec_fn=limited)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("fisher_vmap: no space left to write")
    assert run_here(model, data, tmp_path / "out") == 0
    for a, b in zip(open_results(tmp_path / "out"), open_results(undisturbed), strict=True):
        np.testing.assert_allclose(a.matrix(), b.matrix(), atol=2e-5 * a.S[0])


@pytest.mark.parametrize("first", [0, 5])
def test_a_weight_that_is_no_number_fails_the_prompts_that_meet_it(model, tmp_path, caplog, first):
    broken = fresh("llama", torch.float32, vocab_size=VOCABULARY)
    with torch.no_grad():
        broken.get_input_embeddings().weight[ord("Z") - ord("!") + 5] = math.nan  # the token of the letter Z
    folder = save_model(tmp_path / "broken", broken)
    prompts = texts(12)
    for index in (first, 7):
        prompts[index] += "Z"
    data = write_prompts(tmp_path / "prompts.jsonl", prompts)
    assert run_here(folder, data, tmp_path / "broken-out", strict="true") == 3
    assert run_here(model, data, tmp_path / "out") == 0
    for found, right in zip(open_results(tmp_path / "broken-out"), open_results(tmp_path / "out"), strict=True):
        if "Z" in found.text:
            assert found.status == "failed" and found.reason == "the logits are not finite"
            assert np.isnan(found.S).all() and found.row["tokens"] == right.row["tokens"]
        else:
            assert found.status == "ok"
            np.testing.assert_allclose(found.matrix(), right.matrix(), atol=2e-5 * right.S[0])
    metadata = yaml.safe_load((tmp_path / "broken-out" / "metadata.yaml").read_text())
    reason = "the logits are not finite"
    assert metadata["failed_prompts"] == [{"index": i, "reason": reason} for i in (first, 7)]
    assert f"prompt 7 failed: {reason}" in caplog.text and "2 prompts failed" in caplog.text
    assert verify([str(tmp_path / "broken-out")]) == 0


@pytest.mark.parametrize("part", ["S", "V", "Q", "position_energy", "residual_norm", "trace"])
def test_numbers_that_are_not_finite_fail_their_prompt(model, data, tmp_path, monkeypatch, part):
    numbers = FisherModel.numbers

    def spoilt(self, prompts_ids, rank):
        found = numbers(self, prompts_ids, rank)
        for i, ids in enumerate(prompts_ids):
            if tokens_of(ids) == 4:
                result = found[i].layers[LAYER]
                wrong = np.asarray(getattr(result, part)) * np.inf
                reason = "the scores are not finite" if part in "SV" else None
                found[i] = PromptNumbers(*found[i][:2], {LAYER: result._replace(**{part: wrong})}, reason)
        return found

    monkeypatch.setattr(FisherModel, "numbers", spoilt)
    with np.errstate(invalid="ignore"):
        assert run_here(model, data, tmp_path / "out") == 0
    table = open_results(tmp_path / "out").to_pandas()
    assert ((table["status"] == "failed") == (table["tokens"] == 4)).all() and (table["tokens"] == 4).any()
    assert table["reason"][table["tokens"] == 4].str.contains("not finite").all()


def test_a_second_run_in_a_folder_is_told_of_the_first(model, data, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    told = "another process is computing in "
    with at_work(tmp_path / "out"):
        assert run_here(model, data, tmp_path / "out", shards="1/2") == 0 and told not in caplog.text
        assert run_here(model, data, tmp_path / "out") == 0
    assert caplog.text.count(told) == 1 and "--shards i/n" in caplog.text
    caplog.clear()
    assert run_here(model, data, tmp_path / "out") == 0 and told not in caplog.text


def test_two_runs_in_one_folder(undisturbed, model, data, tmp_path):
    """The second is started while the first is at work; both end well, and nothing is there twice."""
    argv = [sys.executable, "-m", "fisher_vmap.run", *arguments(model, data, tmp_path / "out")]
    both = [subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
    assert verify([str(tmp_path / "out")]) == 0
    assert len(open_results(tmp_path / "out", check="full")) == 14
