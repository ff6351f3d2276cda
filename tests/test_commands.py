"""What all commands share: streams that fail, Ctrl-C at any moment, flags, paths, and the words of each line."""

import importlib
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from command_cases import arguments, environment, numbers_of, real_command, run_here, save_model, texts, write_prompts
from results_cases import write_folder

import fisher_vmap
from fisher_vmap import open_results
from fisher_vmap.cli import COMMANDS, Parser, main
from fisher_vmap.errors import UserError
from fisher_vmap.export import save_directions

pytestmark = pytest.mark.usefixtures("no_power_cuts")
NEEDED = {"finish": ["DIR"], "report": ["DIR"], "verify": ["DIR"], "export": ["DIR", "OUT"], "info": ["DIR"],
          "compare": ["A", "B"]}  # fmt: skip

FINISHED = {"save": "both", "export_npz": True}  # settings that `finish` needs


def through_the_shell(words, redirected, **variables):
    """A command as the shell starts it, such as with 2>&-."""
    line = f'exec "$@" {redirected}'
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "fisher_vmap", *map(str, words)],
        capture_output=True, text=True, env={**environment(), **variables}, timeout=300, check=False,
    )  # fmt: skip


def one_line(text):
    assert text.count("\n") == 1 and text.startswith("fisher_vmap: "), text
    return text.strip()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), write_prompts(folder / "prompts.jsonl", texts(6))


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "out"
    assert run_here(*inputs, out) == 0
    return out


# Streams


@pytest.mark.slow
@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "2>&- <&- >&-"])
def test_a_run_whose_progress_cannot_be_written_goes_on(inputs, folder, tmp_path, redirected):
    done = through_the_shell(["run", *arguments(*inputs, tmp_path / "out")], redirected)
    assert done.returncode == 0 and done.stdout == ""
    found, expected = numbers_of(tmp_path / "out"), numbers_of(folder)
    assert found.keys() == expected.keys() and open_results(tmp_path / "out", check="full").index.complete
    for name in found:
        if name.endswith(".safetensors"):
            assert found[name] == expected[name]


@pytest.mark.slow
def test_a_run_whose_log_ends_too_early_goes_on(inputs, tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    words = [sys.executable, "-m", "fisher_vmap", "run", *map(str, arguments(*inputs, tmp_path / "out"))]
    assert subprocess.run(words, stderr=writes, env=environment(), timeout=300, check=False).returncode == 0
    os.close(writes)
    assert open_results(tmp_path / "out").index.complete


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("words", "code"),
    [(["verify", "{out}"], 0), (["info", "{out}"], 0), (["info", "{out}/nothing"], 2), (["run", "--nothing"], 2)],
)
def test_exit_codes_without_standard_error(folder, redirected, words, code):
    done = through_the_shell([word.format(out=folder) for word in words], redirected)
    assert done.returncode == code and bool(done.stdout) == (code == 0)


@pytest.mark.parametrize("words", [["info", "{out}"], ["verify", "{out}"], ["--help"], ["run", "--help"],
                                   ["export", "{out}", "{out}.safetensors"], ["--version"]])  # fmt: skip
def test_standard_output_that_cannot_be_written_is_one_line(folder, words):
    done = through_the_shell([word.format(out=folder) for word in words], ">/dev/full")
    assert done.returncode == 2 and "standard output cannot be written: no space left" in one_line(done.stderr)


@pytest.mark.parametrize("words", [["info", "{out}"], ["verify", "{out}"], ["finish", "{out}"], ["report", "{out}"],
                                   ["export", "{out}", "{out}/日.safetensors"],
                                   ["compare", "{out}", "{out}"]])  # fmt: skip
def test_characters_that_cannot_be_printed_are_escaped(tmp_path, words):
    pytest.importorskip("plotly") if words[0] == "report" else None
    write_folder(tmp_path / "grüße 日本", settings=FINISHED)
    words = [word.format(out=tmp_path / "grüße 日本") for word in words]
    done = through_the_shell(words, "", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert "\\u65e5" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_plan_can_be_printed_anywhere(inputs, tmp_path):
    data = write_prompts(tmp_path / "日本.jsonl", texts(3))
    words = ["run", *arguments(inputs[0], data, tmp_path / "日本"), "--plan"]
    done = through_the_shell(words, "", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and "Traceback" not in done.stderr


# Ctrl-C

WAITS = """import time
print("importing", flush=True)
time.sleep(60)
"""

HEARS_CTRL_C = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job starts without it


def assert_stops(stand_ins, *words):
    """Ctrl-C while `python -m WORDS` imports one of the modules in the folder `stand_ins` is one line and code 130."""
    found = environment()
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=HEARS_CTRL_C,
        env={**found, "PYTHONPATH": os.pathsep.join([str(stand_ins), found["PYTHONPATH"]])},
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in one_line(error)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("start", ["fisher_vmap {name}", "fisher_vmap.{name}"])
def test_ctrl_c_while_libraries_are_imported(name, start, tmp_path):
    for library in ("numpy", "pyarrow", "pydantic", "yaml"):
        (tmp_path / f"{library}.py").write_text(WAITS)
    module = start.startswith("fisher_vmap.")
    assert_stops(
        tmp_path, *start.format(name=name.replace("-", "_") if module else name).split(), *NEEDED.get(name, [])
    )


def test_ctrl_c_before_anything_is_imported(tmp_path):
    (tmp_path / "argparse.py").write_text(WAITS)
    assert_stops(tmp_path, "fisher_vmap.info", "DIR")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["report", "{out}"], "fisher_vmap.report.__main__.open_results"),
        (["verify", "{out}"], "fisher_vmap.verify.__main__.read_index"),
        (["verify", "{out}", "--kl"], "fisher_vmap.verify.kl.check_kl"),
        (["export", "{out}", "{out}.npz"], "fisher_vmap.export.write_npz"),
        (["finish", "{out}"], "fisher_vmap.finish.ResultsWriter"),
        (["info", "{out}"], "fisher_vmap.info.open_results"),
        (["compare", "{out}", "{out}"], "fisher_vmap.compare.__main__.open_results"),
        (["steer-to"], "fisher_vmap.steer_to.read"),
        (["demo", "--output_dir", "{out}-of-the-demo"], "fisher_vmap.demo.demo_model"),
        (["run", "--model_path", "{out}"], "fisher_vmap.run.__main__.load_command"),
    ],
)
def test_ctrl_c_at_work(folder, words, place, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    importlib.import_module(COMMANDS[words[0]][0])
    monkeypatch.setattr(place, interrupted)
    assert main([word.format(out=folder) for word in words]) == 130
    assert "stopped" in one_line(capsys.readouterr().err)


# Flags


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_version(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fisher-vmap {fisher_vmap.__version__}\n"


def test_the_package_is_the_command(folder):
    for words in (["--version"], ["info", folder], ["nothing"], []):
        as_package, as_module = (real_command(words, module) for module in ("fisher_vmap", "fisher_vmap.cli"))
        assert (
            as_package.returncode
            == as_module.returncode
            == {"--version": 0, "nothing": 2}.get(words[0] if words else "nothing", 0)
        )
        assert (as_package.stdout, as_package.stderr) == (as_module.stdout, as_module.stderr)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", "DIR", "--seed", "1", "--seed", "2"], ["--seed is given twice: '1' and '2'; keep one"]),
        (["report", "DIR", "--output", "a", "--out=b"], ["--output and --out are the same flag: 'a' and 'b'"]),
        (["report", "DIR", "--no-images", "--no_images"], ["are the same flag; keep one"]),
        (["report", "DIR", "--detials", "3"], ["'--detials'", "did you mean 'details'?"]),
        (["verify", "DIR", "--kl", "--prompts", "1", "--prompts=1"], ["--prompts is given twice"]),
        (["verify", "DIR", "--kl", "--kl"], ["--kl is given twice; keep one"]),
        (["verify", "DIR", "--kl", "--model", "a", "--model-path", "b"], ["--model and --model-path are the same"]),
        (["verify", "DIR", "again"], ["'again'", "fisher-vmap verify --help"]),
        (["export", "DIR", "OUT", "--first", "1", "--first", "2"], ["--first is given twice"]),
        (["export", "DIR", "OUT", "--text", "--no-text"], ["not allowed with"]),
        (["export", "DIR"], ["OUT", "--help lists every flag"]),
        (["export", "DIR", "OUT", "--prompt"], ["--prompt: a value was expected"]),
        (["demo", "--output_dir", "a", "--output", "b"], ["--output_dir and --output are the same flag"]),
        (["info"], ["DIR", "--help lists every flag"]),
        (["compare", "A"], ["B", "--help lists every flag"]),
        (["compare", "A", "B", "--layer_a", "1", "--layer-a", "2"], ["--layer_a and --layer-a are the same flag"]),
        (["info", ""], ["an empty text was given"]),
        (["info", "DIR", "--top_k", "3"], ["'--top_k'", "--help lists every flag"]),
        (["finish", "DIR", "--overwrite"], ["'--overwrite'"]),
        (["reprot", "DIR"], ["did you mean 'report'?"]),
        (["--model_path", "gpt2"], ["a run is fisher-vmap run --model_path ..."]),
        (["my.yaml"], ["a run is fisher-vmap run my.yaml"]),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(words, told, capsys):
    assert main(words) == 2
    line = one_line(capsys.readouterr().err)
    assert all(part in line for part in told), line


def test_flags_that_may_be_repeated_are_kept():
    parser = Parser("anything")
    parser.add_argument("--layer", action="append")
    parser.add_argument("--note")
    found = parser.read(["--layer", "-1", "--layer=--x-y", "--note", "--not-a-flag"])
    assert (found.layer, found.note) == (["-1", "--x-y"], "--not-a-flag")


def test_names_of_other_programs_are_told(folder, capsys, caplog):
    with caplog.at_level("INFO"):
        assert main(["verify", str(folder), "--dataset", "x", "--model", "y"]) == 2
    assert caplog.messages == ["read --dataset as --dataset_name, --model as --model_path"]
    assert "--model_path is for the check against the model" in one_line(capsys.readouterr().err)


def test_help_by_its_name(capsys):
    assert main(["help"]) == 0
    with pytest.raises(SystemExit):
        main(["help", "info"])
    assert capsys.readouterr().out.count("usage: fisher-vmap ") == 2


# Paths


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a results folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_folder(tmp_path / "results", settings=FINISHED)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["info", "~/results"], "results/index.json"),
        (["verify", "~/results"], "results/index.json"),
        (["finish", "~/results"], "results/index.json"),
        (["export", "~/results", "~/a.safetensors"], "a.safetensors"),
        (["compare", "~/results", "~/results"], "results/compare.html"),
        (["report", "~/results", "--output=~/look.html", "--no-images"], "look.html"),
        (["report", "~/results", "--output", "~/look.html", "--no-images"], "look.html"),
    ],
)
def test_the_home_folder_in_every_command(home, words, written):
    pytest.importorskip("plotly") if words[0] == "report" else None
    assert main(words) == 0 and (home / written).is_file()


def test_the_home_folder_in_python(home):
    assert len(open_results("~/results")) == 10
    save_directions("~/a.safetensors", {"a": np.ones(3)})
    assert (home / "a.safetensors").is_file()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing/here", "/dev/null/x", "/sys/nothing"])
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_folder_that_cannot_be_written_is_told_first(inputs, tmp_path, monkeypatch, capsys, place, engine):
    (tmp_path / "file").touch()
    for later in ("source_of", "model_of"):
        monkeypatch.setattr(f"fisher_vmap.run.open.{later}", None)
    assert run_here(*inputs, tmp_path / place, engine=engine) == 2
    line = one_line(capsys.readouterr().err)
    assert str(tmp_path / place) in line and "choose another --output_dir" in line
    assert main(["demo", "--output_dir", str(tmp_path / place)]) == 2
    assert "choose another --output_dir" in one_line(capsys.readouterr().err)


def test_looking_whether_a_folder_can_be_written_leaves_nothing(inputs, tmp_path):
    assert run_here("no/such/model", inputs[1], tmp_path / "a" / "b") == 2
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_demos_settings_is_one_line(capsys):
    for value in ("", "a\nb"):
        assert main(["demo", f"--output_dir={value}"]) == 2
        assert "correct the flag --output_dir" in one_line(capsys.readouterr().err)


def test_lines_about_settings_that_a_command_has_not_as_flags(folder, tmp_path, capsys, monkeypatch):
    def refused(*args, **options):
        raise UserError("the model has code of its own; set trust_remote_code")

    monkeypatch.setattr("fisher_vmap.verify.kl.model_of", refused)
    assert main(["verify", str(folder), "--kl"]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.endswith(f"(trust_remote_code: settings of the run that filled {folder}, kept here)")


@pytest.mark.parametrize("name", ["info", "verify", "finish", "report", "export"])
def test_no_command_is_told_to_use_flags_of_another(name, tmp_path, capsys):
    pytest.importorskip("plotly") if name == "report" else None
    write_folder(tmp_path / "out", settings=FINISHED)
    index = tmp_path / "out" / "index.json"
    index.write_bytes(index.read_bytes().replace(b'"rank": 3', b'"rank": 2'))
    code = main([name, str(tmp_path / "out"), *([str(tmp_path / "a.npz")] if name == "export" else [])])
    found = capsys.readouterr()
    assert code == (1 if name == "verify" else 2)
    assert "fisher-vmap run --overwrite starts anew" in found.out + found.err
    index.write_text("{}")
    main([name, str(tmp_path / "out"), *([str(tmp_path / "a.npz")] if name == "export" else [])])
    found = capsys.readouterr()
    assert "it has no checksum" in found.out + found.err and "--output_dir" not in found.out + found.err
