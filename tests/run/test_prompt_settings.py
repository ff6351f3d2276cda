"""Settings of prompts on the command line: what reaches the model, what is refused, and what is the same run."""

import json

import pytest
from command_cases import arguments, save_model, tiny_tokenizer

from fisher_vmap import FisherModel, open_results
from fisher_vmap.results.index import read_index, write_index
from fisher_vmap.run.__main__ import main
from fisher_vmap.run.cli_args import load_settings
from fisher_vmap.run.fingerprint import LATER
from fisher_vmap.run.settings import Settings

ROWS = [{"instruction": "Add.", "input": "1 and 2", "n": 1}, {"instruction": "Sing.", "input": "", "n": 2}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def texts_of(out):
    return open_results(out).table().column("text").to_pylist()


def tokens_of(out):
    return open_results(out).table().column("tokens").to_pylist()


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({}, ["Add.\n1 and 2", "Sing."]),
        ({"prompt_template": r"{instruction}\n\n{input}"}, ["Add.\n\n1 and 2", "Sing."]),
        ({"prompt_template": "No {n}: {instruction}"}, ["No 1: Add.", "No 2: Sing."]),
        ({"prompt_column": "instruction"}, ["Add.", "Sing."]),
    ],
)
def test_what_is_taken_for_the_prompt(settings, texts, model, data, tmp_path):
    assert main(arguments(model, data, tmp_path / "out", **settings)) == 0
    assert texts_of(tmp_path / "out") == texts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt_template": "{instruction} {imput}"}, ["no column 'imput'", "did you mean 'input'?"]),
        ({"prompt_template": "{instruction"}, ["single {"]),
        ({"chat_template_file": "nowhere.jinja"}, ["nowhere.jinja", "chat_template_file"]),
        ({"chat_template_kwargs": "{tokenize: true}"}, ["chat_template_kwargs sets tokenize"]),
        ({"chat_template_kwargs": "enable_thinking"}, ["a mapping such as"]),
        ({"system_turns": "merged"}, ["did you mean 'merge'?"]),
        ({"special_tokens_in_text": "litteral"}, ["did you mean 'literal'?"]),
    ],
)
def test_mistakes_are_one_line(settings, words, model, data, tmp_path, capsys):
    assert main(arguments(model, data, tmp_path / "out", **settings)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "passage"),
    [
        (" ", " "), ("\n", "\n"), (" none", " none"), ('"none"', "none"), ("'null'", "null"), ('"None"', "None"),
        ('"hi"', '"hi"'), ("none", None), ("NULL", None), ("", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["prefill", "system_prompt"])
def test_a_passage_of_white_space_or_a_word_for_nothing(name, value, passage, tmp_path):
    settings = load_settings([f"--{name}={value}"], working_directory=tmp_path)
    assert getattr(settings, name) == passage
    assert Settings(**settings.model_dump()) == settings  # as the folder has it
    (tmp_path / "config.yaml").write_text(json.dumps({name: value}), encoding="utf-8")
    assert getattr(load_settings([], working_directory=tmp_path), name) == passage


def test_a_prefill_of_white_space_is_a_token(model, data, tmp_path):
    for number, prefill in enumerate(["none", " ", "\n\n", '"none"']):
        assert main([*arguments(model, data, tmp_path / str(number)), f"--prefill={prefill}"]) == 0
    counts = [tokens_of(tmp_path / str(number))[0] for number in range(4)]  # one token a byte
    assert [count - counts[0] for count in counts] == [0, 1, 2, 4]
    assert main([*arguments(model, data, tmp_path / "3"), '--prefill="none"']) == 0
    assert main(arguments(model, data, tmp_path / "3")) == 2


def test_folders_from_before_these_settings_are_resumed(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(model, data, out)) == 0
    index = read_index(out)
    assert not set(index.fingerprint) & (LATER | {"chat_template_file"})
    older = {name: value for name, value in index.settings.items() if name not in LATER}
    write_index(out, index.model_copy(update={"settings": older}))
    assert main(arguments(model, data, out)) == 0
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", encoding="utf-8")
    others = {
        "prompt_template": "{instruction}", "system_turns": "drop", "special_tokens_in_text": "literal",
        "chat_template_kwargs": "{loud: true}", "chat_template_file": template,
    }  # fmt: skip
    for name, value in others.items():
        capsys.readouterr()
        assert main(arguments(model, data, out, **{name: value})) == 2
        assert name in capsys.readouterr().err
        assert main(arguments(model, data, tmp_path / name, **{name: value})) == 0
        assert main(arguments(model, data, tmp_path / name, **{name: value})) == 0
    moved = template.rename(tmp_path / "moved.jinja")  # the content counts, not the name
    assert main(arguments(model, data, tmp_path / "chat_template_file", chat_template_file=moved)) == 0
    moved.write_text("{% for m in messages %}<|end|>{{ m.content }}{% endfor %}", encoding="utf-8")
    assert main(arguments(model, data, tmp_path / "chat_template_file", chat_template_file=moved)) == 2


def test_python_renders_as_the_command_does(model, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{{ tools }}{{ mood }}<|assistant|>"
    )
    turns = [{"role": "developer", "content": "Be."}, {"role": "user", "content": "hi"}]
    prompts = [turns, json.dumps(turns), str(turns), {"messages": turns, "tools": [{"name": "f"}]}, "hi"]
    rows = {}
    for mood in ("calm", "upset"):
        opened = FisherModel(loaded, tokenizer, layers=1, top_k=4, chat_template_kwargs={"mood": mood})
        rows[mood] = [record.row["tokens"] for record in opened.fisher(prompts, rank=2)]
    expected = [
        len(tokenizer.apply_chat_template(
            [{**turns[0], "role": "system"}, turns[1]][-count:], mood="calm", tools=tools, add_generation_prompt=True
        )["input_ids"])
        for count, tools in [(2, None), (2, None), (2, None), (2, [{"name": "f"}]), (1, None)]
    ]  # fmt: skip
    assert rows["calm"] == expected
    assert rows["upset"] == [count + 1 for count in expected]
