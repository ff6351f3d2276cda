"""Settings: where they come from, which values they take, and the one line that is said about each mistake."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fisher_vmap.cli import ALIASES
from fisher_vmap.errors import UserError
from fisher_vmap.run.cli_args import default_config_yaml, load_settings
from fisher_vmap.run.settings import RunOptions, Settings

ROOT = Path(__file__).parents[2]


def test_config_yaml_in_the_repository_holds_the_defaults(tmp_path):
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    assert text == default_config_yaml()
    assert max(map(len, text.splitlines())) <= 120
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load_settings([], working_directory=tmp_path) == Settings()


def test_the_names_and_defaults_that_are_promised():
    settings = Settings()
    assert settings.model_path == "FabienRoger/backdoor_250913_1B"
    assert settings.dataset_name == "lmsys/lmsys-chat-1m"
    assert (settings.batch_size, settings.num_prompts, settings.hook_layer_name) == (8, 100, "model.layers.15")
    assert (settings.top_k_tokens, settings.num_singular_values) == (10, 10)
    assert settings.output_dir == "fisher_results"


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("top_k_tokens: 7\nbatch_size: 3\n")
    with caplog.at_level(logging.INFO):
        settings = load_settings(["--batch-size", "5"], working_directory=tmp_path)
    assert (settings.top_k_tokens, settings.batch_size, settings.num_prompts) == (7, 5, 100)
    assert "config.yaml" in caplog.text


def test_a_named_file_replaces_the_one_in_the_working_directory(tmp_path):
    (tmp_path / "config.yaml").write_text("top_k_tokens: 7\n")
    (tmp_path / "other.yaml").write_text("batch_size: 3\n")
    settings = load_settings(["--config=other.yaml"], working_directory=tmp_path)
    assert (settings.top_k_tokens, settings.batch_size) == (10, 3)


def test_a_file_is_named_without_a_flag(tmp_path):
    (tmp_path / "config.yaml").write_text("top_k_tokens: 7\n")
    (tmp_path / "mine.yml").write_text("batch_size: 3\n")
    for argv in (
        ["mine.yml"],
        ["--strict", "mine.yml"],
        ["mine.yml", "--strict"],
        [str(tmp_path / "mine.yml"), "--strict"],
    ):
        settings = load_settings(argv, working_directory=tmp_path)
        assert (settings.top_k_tokens, settings.batch_size, settings.strict) == (10, 3, "--strict" in argv)


def test_a_file_of_another_program_can_be_left_unread(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")
    assert load_settings(["--config", "none"], working_directory=tmp_path) == Settings()


ALIASED = {
    "model_path": ["model", "model_name_or_path", "model-name", "pretrained"],
    "dataset_name": ["dataset", "data"],
    "num_prompts": ["limit", "num_samples", "num-samples"],
    "hook_layer_name": ["layer", "layers"],
    "output_dir": ["output", "out", "output_path"],
    "top_k_tokens": ["top_k", "top-k"],
    "num_singular_values": ["rank"],
}


@pytest.mark.parametrize(("name", "alias"), [(name, alias) for name, all_ in ALIASED.items() for alias in all_])
def test_names_of_other_programs_are_taken_with_a_line(name, alias, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        settings = load_settings([f"--{alias}", "7", "--batch-size", "5"], working_directory=tmp_path)
    assert str(getattr(settings, name)) == "7" and settings.batch_size == 5
    assert caplog.messages == [f"read --{alias} as --{name}"]


def test_every_name_of_other_programs_leads_to_a_flag_and_hides_none():
    flags = {*Settings.model_fields, *RunOptions.model_fields, "config"}
    assert set(ALIASES.values()) <= flags and not set(ALIASES) & flags


def test_the_environment_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_SIZE", "5")
    monkeypatch.setenv("batch_size", "5")
    (tmp_path / ".env").write_text("batch_size=5\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings([]).batch_size == 8


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--top-k-tokens", "5"], "top_k_tokens", 5),
        (["--top_k_tokens=5"], "top_k_tokens", 5),
        (["--num_prompts", "all"], "num_prompts", "all"),
        (["--num_prompts", "7"], "num_prompts", 7),
        (["--num_singular_values", "20"], "num_singular_values", 20),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "false"], "overwrite", False),
        (["--strict", "--batch_size", "2"], "strict", True),
        (["--store_text=no"], "store_text", False),
        (["--chat_template", "auto"], "chat_template", "auto"),
        (["--chat_template", "true"], "chat_template", True),
        (["--export_npz"], "export_npz", True),
        (["--hook_layer_name", "3"], "hook_layer_name", 3),
        (["--model_kwargs", "{rope_theta: 5.0, token: hf_x}"], "model_kwargs", {"rope_theta": 5.0, "token": "hf_x"}),
        (["--model_kwargs", "none"], "model_kwargs", None),
        (["--quantization", "4bit"], "quantization", "4bit"),
        (["--attn_implementation", "eager"], "attn_implementation", "eager"),
        (["--hook_layer_name", "all"], "hook_layer_name", "all"),
        (["--hook_layer_name", "3,5"], "hook_layer_name", (3, 5)),
        (
            ["--hook_layer_name", "[model.layers.3, model.layers.5]"],
            "hook_layer_name",
            ("model.layers.3", "model.layers.5"),
        ),
        (["--hook_layer_name", '["a", 5]'], "hook_layer_name", ("a", 5)),
        (["--keep_columns", "id,language"], "keep_columns", ("id", "language")),
        (["--keep_columns", "none"], "keep_columns", None),
        (["--shuffle_seed", "0"], "shuffle_seed", 0),
        (["--shuffle_seed", "none"], "shuffle_seed", None),
        (["--max_batch_tokens", "4096"], "max_batch_tokens", 4096),
        (["--cotangent_chunk", "auto"], "cotangent_chunk", "auto"),
        (["--system_prompt", "Yes: answer 100%\nin verse."], "system_prompt", "Yes: answer 100%\nin verse."),
        (["--prefill=- <think>\n"], "prefill", "- <think>\n"),
        (["--device", "cuda:1"], "device", "cuda:1"),
        # values that begin with dashes, or are names of flags, arrive as they are
        (["--prefill", "-- select from my-table"], "prefill", "-- select from my-table"),
        (["--prefill", "--a-b c"], "prefill", "--a-b c"),
        (["--prefill=--x-y"], "prefill", "--x-y"),
        (["--prefill", "--"], "prefill", "--"),
        (["--prefill", "-"], "prefill", "-"),
        (["--prefill", "--not-a-flag=1-2"], "prefill", "--not-a-flag=1-2"),
        (["--prefill=--batch-size"], "prefill", "--batch-size"),
        (["--prefill", "batch-size"], "prefill", "batch-size"),
        (["--system-prompt", "--- be-brief ---"], "system_prompt", "--- be-brief ---"),
        (["--system_prompt", "-h is help"], "system_prompt", "-h is help"),
        (["--prompt-template", "--{my-column}--"], "prompt_template", "--{my-column}--"),
        (["--output-dir", "--odd-name"], "output_dir", "--odd-name"),
        (["--dataset-name", "-my-data.jsonl"], "dataset_name", "-my-data.jsonl"),
        (["--keep-columns", "-a-b,--c-d"], "keep_columns", ("-a-b", "--c-d")),
        (["--hook_layer_name", "-1"], "hook_layer_name", -1),
        (["--hook_layer_name", "-1,-2"], "hook_layer_name", (-1, -2)),
        (["--hook-layer-name", "-1,3"], "hook_layer_name", (-1, 3)),
        (["--hook_layer_name=[-1, -2]"], "hook_layer_name", (-1, -2)),
        (["--prefill", "my.yaml"], "prefill", "my.yaml"),
        (["--dataset_config", "2024"], "dataset_config", "2024"),
    ],
)
def test_flags(argv, name, value, tmp_path):
    given = getattr(load_settings(argv, working_directory=tmp_path), name)
    assert given == value
    assert type(given) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("hook_layer_name: [model.layers.3, 5]", "hook_layer_name", ("model.layers.3", 5)),
        ("hook_layer_name: 3", "hook_layer_name", 3),
        ("keep_columns: [id]", "keep_columns", ("id",)),
        ("chat_template: false", "chat_template", False),
        ("dataset_revision: null", "dataset_revision", None),
        ("\ufeffbatch_size: 4", "batch_size", 4),
        ("prefill: |\n  one\n  two\n", "prefill", "one\ntwo\n"),
    ],
)
def test_values_in_a_file(text, name, value, tmp_path):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert getattr(load_settings([], working_directory=tmp_path), name) == value


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_settings(["--output_dir=~/out"]).output_dir == "/home/someone/out"
    assert load_settings(["--output_dir=~no-such-user/out"]).output_dir == "~no-such-user/out"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_leaves_the_defaults_and_says_so(text, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(text)
    with caplog.at_level(logging.INFO):
        assert load_settings([], working_directory=tmp_path) == Settings()
    assert "empty" in caplog.text


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    line = str(error.value)
    assert line and "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "5"], ["--batchsize", "batch_size"]),
        (["--top-k-token", "5"], ["top_k_tokens"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["-k", "5"], ["-k"]),
        (["config.yaml"], ["config.yaml", "--config"]),
        (["prompts.jsonl"], ["prompts.jsonl", "--dataset_name prompts.jsonl"]),
        (["--hook_layer_name", "3", "5"], ["'5'", "3,5"]),
        (["--hook_layer_name", "-1", "-2"], ["'-2'", "3,5"]),
        (["some", "words"], ["'some'", ".yaml"]),
        (["a.yaml", "b.yaml"], ["a.yaml and b.yaml", "keep one"]),
        (["a.yaml", "--config", "b.yaml"], ["a.yaml and --config b.yaml", "keep one"]),
        (["a.yaml", "--nothing"], ["--nothing"]),
        (["--batch_size", "3", "--batch_size", "4"], ["--batch_size is given twice", "'3' and '4'", "keep one"]),
        (["--batch_size", "3", "--batch-size=4"], ["--batch_size and --batch-size", "'3' and '4'"]),
        (["--model_path", "a", "--model", "b"], ["--model_path and --model are the same flag", "'a' and 'b'"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["--config is given twice"]),
        (["--overwrite", "--top_k", "3", "--overwrite", "no"], ["--overwrite is given twice", "'true' and 'no'"]),
        (["--layer", "3", "--layer", "4"], ["--layer is given twice", "'3' and '4'"]),
        (["--limit", "many"], ["'many'", "correct the flag --limit"]),
        (["--prefill", "--overwrite"], ["--prefill=--overwrite"]),
        (["--prefill", "--limit=3"], ["--prefill=--limit=3"]),
        (["--seed", "3"], ["--seed", "--shuffle_seed"]),
        (["--load-in-4bit"], ["--quantization 4bit"]),
        (["--prompts", "a.jsonl"], ["dataset_name"]),
        (["--batch_size"], ["--batch_size", "expected"]),
        (["--batch_size", "-3"], ["'-3'", "from 1", "--batch_size"]),
        (["--batch_size", "0"], ["'0'", "from 1"]),
        (["--batch_size", "2.5"], ["'2.5'"]),
        (["--batch_size", "many"], ["'many'"]),
        (["--batch_size", ""], ["''"]),
        (["--num_prompts", "0"], ["all"]),
        (["--num_prompts", "1" + 30 * "0"], ["all"]),
        (["--num_prompts", 5000 * "9"], ["all"]),
        (["--num_prompts", "most"], ["all"]),
        (["--offset", "-1"], ["from 0"]),
        (["--shuffle_seed", "-1"], ["none", "from 0"]),
        (["--shuffle_seed", "4294967296"], ["4,294,967,295"]),
        (["--max_batch_tokens", "0"], ["auto"]),
        (["--cotangent_chunk", "-1"], ["auto"]),
        (["--kernel", "layer-wise"], ["layerwise", "whole", "loop", "did you mean 'layerwise'?"]),
        (["--dtype", "bf16"], ["bfloat16"]),
        (["--conversation", "last"], ["first_turn", "full"]),
        (["--vectors_dtype", "bfloat16"], ["float16"]),
        (["--bias_positions", "first"], ["last"]),
        (["--device", "gpu"], ["cuda"]),
        (["--overwrite", "perhaps"], ["true or false"]),
        (["--chat_template", "sometimes"], ["auto, true or false"]),
        (["--hook_layer_name", ""], ["module's name"]),
        (["--hook_layer_name", "[]"], ["module's name"]),
        (["--hook_layer_name", "[a"], ["module's name"]),
        (["--hook_layer_name", "-9999999"], ["negative from the top"]),
        (["--hook_layer_name", "3,3"], ["different"]),
        (["--hook_layer_name", "all,3"], ["all"]),
        (["--keep_columns", "[1, 2]"], ["list"]),
        (["--model_path", " "], ["text"]),
        (["--output_dir", "a\nb"], ["text"]),
        (["--system_prompt", "\udcff"], ["text"]),
        (["--config", "absent.yaml"], ["absent.yaml", "--config"]),
        (["--config", "."], ["directory"]),
        (["--config", ""], ["cannot be read"]),
    ],
)
def test_wrong_flags(argv, words, tmp_path):
    with pytest.raises(UserError) as error:
        load_settings(argv, working_directory=tmp_path)
    for word in words:
        assert word in one_line(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 5", ["batchsize", "batch_size"]),
        ("top-k-tokens: 5", ["top_k_tokens"]),
        ("qqq: 5", ["qqq", "--help"]),
        ("learning_rate: 1.0e-4", ["'learning_rate'; --help lists every setting", "lies in the working folder"]),
        ("num_epochs: 3", ["'num_epochs'; --help", "--config"]),
        ("topk: 3", ["did you mean 'top_k_tokens'?"]),
        ("model: {_target_: a.B}", ["did you mean 'model_path'?", "lies in the working folder"]),
        ("limit: 3", ["did you mean 'num_prompts'?"]),
        ("seed: 3", ["shuffle_seed"]),
        ("compute_environment: LOCAL_MACHINE", ["'compute_environment'", "--config none reads none"]),
        ("defaults: [_self_]", ["'defaults'", "--config none reads none"]),
        ("device: 3", ["device", "lies in the working folder", "--config"]),
        ("1: 2", ["1"]),
        ("batch_size: true", ["True", "whole number"]),
        ("batch_size: [8]", ["whole number"]),
        ("batch_size: {a: 1}", ["whole number"]),
        ("batch_size:", ["None", "whole number"]),
        ("num_prompts: .inf", ["inf"]),
        ("num_prompts: true", ["all"]),
        ("overwrite: 2", ["true or false"]),
        ("dataset_config: 2024", ["2024", "quotes"]),
        ("dataset_revision: 2024-01-01", ["quotes"]),
        ("dataset_config: no", ["False", "quotes"]),
        ("hook_layer_name: 3.5", ["3.5"]),
        ("hook_layer_name: true", ["module's name"]),
        ("hook_layer_name: [[3]]", ["module's name"]),
        ('model_path: "a\\0b"', ["model_path"]),
        ("batch_size: 3\nbatch_size: 4", ["line 2", "batch_size", "second time"]),
        ("- batch_size", ["list"]),
        ("batch_size", ["str"]),
        ("8", ["int"]),
        ("batch_size: [", ["line", "not YAML"]),
        ("batch_size: 3\n  top_k_tokens: 4", ["line 2", "not YAML"]),
        ("a: 1\n---\nb: 2", ["not YAML"]),
        ("\tbatch_size: 3", ["not YAML"]),
        ("batch_size: !!python/object/apply:os.getcwd []", ["not YAML"]),
        ("batch_size: 2024-99-99", ["not YAML"]),
        ("batch_size: " + 5000 * "9", ["not YAML"]),
        ("batch_size: " + 3000 * "[", ["not YAML"]),
        ("? [a]\n: 1", ["not YAML"]),
        ("\x00", ["not YAML"]),
        (b"\xff\xfe\x00b", ["UTF-8"]),
    ],
)
def test_wrong_files(text, words, tmp_path):
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_settings([], working_directory=tmp_path)
    for word in [*words, "config.yaml"]:
        assert word in one_line(error)


def test_help_names_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        load_settings(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name} " in text
        assert " ".join(field.description.split()) in text.replace("- ", "-")
    assert "examples:" in text


def test_settings_are_frozen_and_strict_about_names():
    with pytest.raises(ValidationError):
        Settings().batch_size = 3
    with pytest.raises(ValidationError):
        Settings(batchsize=3)


def test_settings_survive_a_round_trip_through_yaml():
    settings = Settings(hook_layer_name=[3, "a"], keep_columns=["id"], num_prompts="all")
    written = yaml.safe_dump(settings.model_dump(mode="json"))
    assert Settings(**yaml.safe_load(written)) == settings


def test_the_import_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    code = f"import sys, fisher_vmap.run.cli_args; print(*(set(sys.modules) & {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_a_setting_that_is_gone_is_left_out_with_one_line(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("compile: auto\ntop_k_tokens: 3\n")
    assert load_settings(["--compile", "--offset", "2"], working_directory=tmp_path).offset == 2
    assert load_settings(["--compile=false"], working_directory=tmp_path).top_k_tokens == 3
    told = [record.getMessage() for record in caplog.records if record.levelno > 20]
    line = "the setting compile is left out: torch.compile is no longer used"
    assert told == [f"{tmp_path / 'config.yaml'}: {line}", f"the command line: {line}"][::-1] * 2
