"""The screen of `fisher-vmap info`, and the list of the console script's words."""

import os
import subprocess
import sys

import pytest
from command_cases import environment
from results_cases import make_layout, open_writer, without_numbers, write_folder

import fisher_vmap
from fisher_vmap.cli import COMMANDS
from fisher_vmap.cli import command as ends_quietly
from fisher_vmap.cli import main as command
from fisher_vmap.info import main

pytestmark = pytest.mark.usefixtures("no_power_cuts")


def test_a_finished_folder(tmp_path, capsys):
    write_folder(tmp_path / "out", 10, make_layout({"blocks.0": 7, "blocks.1": 9}))
    assert main([str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: complete"
    text = "\n".join(lines)
    for words in (
        "10: 8 with results, 1 failed, 1 skipped", "blocks.0: width 7", "blocks.1: width 9", "4 tokens, rank 3",
        "3 shards of up to 4 prompts", "prompts.parquet", "top_k_tokens 4", "torch ",
        "prompt 2: not finite", "prompt 3: empty",
    ):  # fmt: skip
        assert words in text
    assert len(lines) < 25


def test_many_layers_are_told_in_a_few_lines(tmp_path, capsys):
    write_folder(tmp_path, 3, make_layout({f"h.{i}": 7 for i in range(12)}))
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layer     h.0 ... h.11, 12 in all: width 7, kernel form not known" in lines
    assert sum("fisher_matrices_compressed.h.0.npz ... fisher_matrices_compressed.h.11.npz, 12 in all" in line
               for line in lines) == 1  # fmt: skip
    assert len(lines) < 20


def test_an_unfinished_folder(tmp_path, capsys):
    write_folder(tmp_path / "out", 6, finish=False)
    assert main([str(tmp_path / "out")]) == 0
    assert "unfinished, of 6 prompts" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["fisher_vmap.cli", "info"], ["fisher_vmap.info"], ["fisher_vmap.verify"]])
def test_a_reader_who_has_enough_ends_it_quietly(tmp_path, words):
    write_folder(tmp_path)
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", *words, str(tmp_path)], stdout=writes, stderr=subprocess.PIPE,
                          text=True, env=environment(), timeout=100, check=False)  # fmt: skip
    os.close(writes)
    assert done.stderr == "" and done.returncode == 141


def test_another_pipe_that_breaks_is_no_reader_who_has_enough():
    @ends_quietly
    def main(argv):
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        main([])


def test_what_is_no_results_folder(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not a results folder" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command([name, "--help"])
    assert stop.value.code == 0
    assert f"fisher-vmap {name}" in capsys.readouterr().out.split("example")[-1]


def test_the_words_of_the_console_script(capsys):
    assert command([]) == 2 and command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert command(["--version"]) == 0
    assert capsys.readouterr().out == f"fisher-vmap {fisher_vmap.__version__}\n"
    assert command(["frobnicate"]) == 2
    assert "run, finish, report" in capsys.readouterr().err


def test_values_and_reasons_stay_on_their_lines(tmp_path, capsys):
    writer = open_writer(tmp_path)
    writer.missing_shards(1)
    writer.add(0, [without_numbers(0, "failed", "the text\nbegins with \x1b[31m\u202e")])
    writer.finish(settings={"system_prompt": "one\ntwo\x1b[0m  three", "prefill": "x" * 5000})
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (settings,) = (line for line in lines if line.startswith("settings"))
    assert "system_prompt one↵two<U+001B>[0m  three" in settings and "…" in settings and len(settings) < 500
    assert lines[-1] == "failed    prompt 0: the text↵begins with <U+001B>[31m<U+202E>"


@pytest.mark.parametrize(
    ("fingerprint", "words"),
    [
        ({}, "targets   the next token"),
        ({"targets": "completion", "estimator": "full"}, "targets   the tokens of a given completion"),
        ({"targets": "all", "estimator": "topk"}, "targets   the token after each position"),
        ({"targets": 20}, "targets   20 tokens that the model writes, the likeliest"),
        ({"targets": 20, "temperature": 0.5, "completion_seed": 3},
         "targets   20 tokens that the model writes, drawn at temperature 0.5 with seed 3"),
        ({"targets": 4, "samples": 8, "estimator": "sampled"},
         "targets   4 tokens that the model writes, in each of 8 samples, drawn at temperature 1 with seed 0"),
    ],
    ids=str,
)  # fmt: skip
def test_targets_samples_and_estimator(tmp_path, capsys, fingerprint, words):
    open_writer(tmp_path, make_layout(pairs=16 if fingerprint else 0), fingerprint=fingerprint)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert words in lines
    (matrix,) = (line for line in lines if line.startswith("matrix"))
    how = f"estimator {fingerprint['estimator']}, " if "estimator" in fingerprint else ""
    many = " a target, 16 (target, token) pairs kept" if fingerprint else ""
    assert matrix == f"matrix    {how}4 tokens{many}, rank 3, vectors in float32"
