"""A run's own output is never its input, a path is never a pattern, and how much of the data a run takes is told."""

import json
import logging
import shutil

import pytest
from command_cases import real_command, run_here, save_model, texts, write_prompts

from fisher_vmap import open_results
from fisher_vmap.export import main as export
from fisher_vmap.info import main as info
from fisher_vmap.report.__main__ import main as report
from fisher_vmap.results.index import read_index, write_index
from fisher_vmap.run.__main__ import main
from fisher_vmap.verify.__main__ import main as verify

STRANGE = "run [3] {a,b} *?%s=1"


def texts_of(out):
    return [record.text for record in open_results(out)]


def said(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("below", ["", "results/deep/", "[1]/"])
def test_a_second_run_in_a_folder_reads_the_same_prompts(below, model, tmp_path, monkeypatch, caplog):
    write_prompts(tmp_path / "prompts.jsonl", texts(5))
    monkeypatch.chdir(tmp_path)
    outs = [f"{below}layer{number}" for number in range(3)]
    for number, out in enumerate(outs):
        assert run_here(model, ".", out, hook_layer_name=number) == 0
        assert texts_of(out) == texts(5)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run_here(model, ".", outs[0], hook_layer_name=0) == 0  # the same command carries on
    assert "5 prompts were stored already" in said(caplog)
    (line,) = [line for line in said(caplog) if "not read as data" in line]
    assert all(out in line for out in outs)


def test_reports_and_exports_are_no_data(model, tmp_path, monkeypatch):
    write_prompts(tmp_path / "prompts.jsonl", texts(4))
    monkeypatch.chdir(tmp_path)
    assert run_here(model, ".", "out") == 0
    assert report(["out", "--output", "look.html", "--details", "2", "--similarity", "2"]) == 0
    assert export(["out", "v.safetensors"]) == 0 and export(["out", "all.npz"]) == 0
    assert run_here(model, ".", "again") == 0
    assert texts_of("again") == texts(4)


@pytest.mark.parametrize("given", ["out", "out/", "./out/shards", "out/prompts.parquet"])
def test_a_results_folder_as_data_is_one_line(given, model, tmp_path, monkeypatch, capsys):
    write_prompts(tmp_path / "prompts.jsonl", texts(2))
    monkeypatch.chdir(tmp_path)
    assert run_here(model, "prompts.jsonl", "out") == 0
    capsys.readouterr()
    assert run_here(model, given, "other") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "results folder of fisher_vmap" in error
    assert not (tmp_path / "other").exists()


def test_names_like_patterns_everywhere(tmp_path, monkeypatch, capsys):
    """The model, the data, the results and what is made of them, with siblings that the patterns would match."""
    monkeypatch.chdir(tmp_path)
    strange = tmp_path / STRANGE
    for place in (strange, tmp_path / "run 3 a xx%s=1"):
        save_model(place / "model [a]")
        (place / "data").mkdir()
    write_prompts(strange / "data" / "x[1].jsonl", texts(5))
    write_prompts(tmp_path / "run 3 a xx%s=1" / "data" / "x1.jsonl", ["theirs"])
    out = strange / "out [1]" / "status=x"
    assert run_here(strange / "model [a]", strange / "data", out) == 0
    assert texts_of(out) == texts(5)
    assert run_here(strange / "model [a]", strange / "data", out) == 0
    assert info([str(out)]) == 0 and verify([str(out)]) == 0
    assert verify([str(out), "--kl", "--prompts", "2"]) in (0, 1)  # whether they agree is another matter
    assert report([str(out), "--output", str(strange / "look [1].html"), "--details", "2", "--similarity", "2"]) == 0
    assert (strange / "look [1].html").is_file() and (strange / "look [1]").is_dir()
    assert export([str(out), str(strange / "v[1].safetensors")]) == 0
    assert (strange / "v[1].safetensors").is_file()
    capsys.readouterr()


def test_how_much_of_the_data_is_told_at_every_place(model, tmp_path, caplog, capsys):
    data, out = write_prompts(tmp_path / "p.jsonl", texts(30)), tmp_path / "out"
    words = "8 of 30 prompts (num_prompts)"
    with caplog.at_level(logging.INFO):
        assert run_here(model, data, out, num_prompts=8) == 0
    first, last = [line for line in said(caplog) if words in line]
    assert first == f"the run takes {words}" and last == f"these are {words}; a higher num_prompts adds to them"
    assert said(caplog)[-1] == f"results in {out}"
    capsys.readouterr()
    assert info([str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: complete: {words}"
    assert main([*_command(model, data, out, 8), "--plan"]) == 0
    assert capsys.readouterr().out.startswith(f"prompts     {words} in 2 shards of 4\n")

    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run_here(model, data, out, num_prompts="all") == 0
    assert not any("num_prompts" in line for line in said(caplog))
    capsys.readouterr()
    assert info([str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: complete"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_prompts": 8, "offset": 5}, "8 of 30 prompts (num_prompts, offset)"),
        ({"num_prompts": 8, "shuffle_seed": 1}, "8 of 30 prompts (num_prompts, shuffle_seed)"),
        ({"num_prompts": 8, "offset": 25}, "5 of 30 prompts (offset)"),
    ],
)
def test_the_words_stay_true_with_other_settings(settings, words, model, tmp_path, caplog, capsys):
    data, out = write_prompts(tmp_path / "p.jsonl", texts(30)), tmp_path / "out"
    with caplog.at_level(logging.INFO):
        assert run_here(model, data, out, **settings) == 0
    assert sum(words in line for line in said(caplog)) == 2
    assert any("a higher num_prompts" in line for line in said(caplog)) == ("num_prompts" in words)
    capsys.readouterr()
    assert info([str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: complete: {words}"


def test_a_folder_of_before_tells_what_it_can(model, tmp_path, capsys):
    data, out = write_prompts(tmp_path / "p.jsonl", texts(6)), tmp_path / "out"
    assert run_here(model, data, out, num_prompts=4) == 0
    index = read_index(out)
    resolved = {name: value for name, value in index.resolved.items() if name != "data_rows"}
    write_index(out, index.model_copy(update={"resolved": resolved}))
    capsys.readouterr()
    assert info([str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: complete: the first 4 prompts (num_prompts)"
    assert run_here(model, data, out, num_prompts=5) == 0
    assert len(texts_of(out)) == 5


@pytest.mark.parametrize("change", ["grown", "shrunk", "rewritten"])
def test_a_changed_file_is_another_run(change, model, tmp_path, capsys):
    data, out = write_prompts(tmp_path / "p.jsonl", texts(6)), tmp_path / "out"
    assert run_here(model, data, out, num_prompts=4) == 0
    shutil.copytree(out, tmp_path / "before")
    changed = {"grown": texts(9), "shrunk": texts(5), "rewritten": ["other", *texts(6)[1:]]}[change]
    write_prompts(data, changed)
    capsys.readouterr()
    assert run_here(model, data, out, num_prompts=5) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data is .jsonl sha256:" in error and "--overwrite" in error
    assert json.loads((out / "index.json").read_text()) == json.loads((tmp_path / "before/index.json").read_text())


@pytest.mark.slow
def test_the_real_command_says_it_too(model, tmp_path):
    write_prompts(tmp_path / "p.jsonl", texts(3))
    done = real_command(_command(model, tmp_path / "p.jsonl", tmp_path / "out", 2))
    assert done.returncode == 0
    assert done.stderr.count("2 of 3 prompts (num_prompts)") == 2


def _command(model, data, out, num_prompts):
    return [
        "--model_path", str(model), "--dataset_name", str(data), "--output_dir", str(out), "--hook_layer_name", "1",
        "--dtype", "float32", "--device", "cpu", "--shard_size", "4", "--num_prompts", str(num_prompts),
    ]  # fmt: skip
