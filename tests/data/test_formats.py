"""Formats recognised by their columns: the file, what was taken for the prompt, what was not used, what was said."""

import csv
import json
import logging

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from fisher_vmap.data.conversations import Conversation, SkippedPrompt, arranged, extract_prompt, text_of, turns_in_text
from fisher_vmap.data.prompts import read_prompts
from fisher_vmap.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts_of(path, **settings):
    return [prompt.messages_or_text for prompt in read_prompts(path, **settings)]


def reasons_of(path, **settings):
    return [prompt.skipped for prompt in read_prompts(path, **settings)]


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
HI = [user("hi"), answer("hello"), user("and now?")]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
ALPACA = {"instruction": "Translate to French.", "input": "Good day.", "output": "Bonjour."}
MMLU = {"question": "2 + 2?", "subject": "maths", "choices": ["3", "4"], "answer": 1}
LETTERED = "2 + 2?\nA. 3\nB. 4"

# File, its first row, the prompt that it gives, and words of the line that says so.
FORMATS = [
    ("alpaca.jsonl", ALPACA, "Translate to French.\nGood day.", ["'instruction' and 'input'", "Alpaca", ": output"]),
    ("alpaca.csv", {**ALPACA, "input": ""}, "Translate to French.", ["Alpaca", "not used: output"]),
    ("alpaca.parquet", {**ALPACA, "input": None, "text": "Below ..."}, "Translate to French.", ["output, text"]),
    ("bare.jsonl", {"instruction": "Sing.", "output": "La."}, "Sing.", ["column 'instruction'", "not used: output"]),
    ("dolly.jsonl", {"instruction": "Who?", "context": "Ann ran.", "response": "Ann", "category": "qa"},
     "Who?\nAnn ran.", ["dolly", "not used: response, category"]),
    ("squad.jsonl", {"id": "1", "title": "T", "context": "Ann ran.", "question": "Who?", "answers": {"text": ["Ann"]}},
     "Ann ran.\n\nWho?", ["'context' and 'question'", "follows its context", "not used: id, title, answers"]),
    ("squad.csv", {"context": " ", "question": "Who?"}, "Who?", ["follows its context"]),
    ("mmlu.parquet", MMLU, LETTERED, ["choices are lettered", "not used: subject, answer"]),
    ("mmlu.csv", {**MMLU, "choices": "['3' '4']"}, LETTERED, ["lettered"]),
    ("mmlu2.csv", {**MMLU, "choices": '["3", "4"]'}, LETTERED, ["lettered"]),
    ("arc.jsonl", {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}}, LETTERED, ["lettered"]),
    ("medqa.jsonl", {"question": "2 + 2?", "options": {"A": "3", "B": "4"}, "answer": "B"}, LETTERED, ["'options'"]),
    ("ceval.csv", {"question": "2 + 2?", "A": "3", "B": "4", "answer": "B"}, LETTERED, ["lettered", "used: answer"]),
    ("race.jsonl", {"context": "Sums.", **MMLU}, "Sums.\n\n" + LETTERED, ["context", "lettered"]),
    ("sharegpt.jsonl", {"conversations": SHAREGPT, "system": "Be kind."}, [system("Be kind."), user("hi")],
     ["'system' is the system turn"]),
    ("sharegpt.parquet", {"conversations": SHAREGPT, "system": None}, [user("hi")], ["'system' is the system turn"]),
    ("own.jsonl", {"messages": [system("Mine."), user("hi")], "system": "Theirs."}, [system("Mine."), user("hi")],
     ["system turn"]),
    ("openorca.jsonl", {"system_prompt": "Be kind.", "question": "Who?", "response": "Ann"},
     [system("Be kind."), user("Who?")], ["'system_prompt' is the system turn", "not used: response"]),
    ("prompt.jsonl", {"system": "Be kind.", "prompt": "Who?"}, [system("Be kind."), user("Who?")], ["system turn"]),
    ("tools.jsonl", {"messages": HI, "tools": [TOOL]}, [user("hi")], ["'tools' is the tools"]),
    ("completion.jsonl", {"prompt": "Who?", "completion": "Ann"}, "Who?", ["'prompt'", "not used: completion"]),
    ("turns.jsonl", {"prompt": [user("Who?")], "completion": [answer("Ann")]}, [user("Who?")], ["used: completion"]),
    ("explicit.jsonl", {"prompt": "Who?", "chosen": "Ann", "rejected": "Bob"}, "Who?", ["not used: chosen, rejected"]),
    ("pairs.jsonl", {"chosen": [user("Who?"), answer("Ann")], "rejected": [user("Who?"), answer("Bob")], "score": 1},
     [user("Who?")], ["preference pair", "not used: score"]),
    ("pairs.parquet", {"chosen": "Human: Who? Assistant: Ann", "rejected": "Human: Who? Assistant: Bob"},
     "Human: Who? Assistant:", ["preference pair"]),
    ("plain.jsonl", {"text": "[1] a note", "context": "x"}, "[1] a note", ["column 'text'", "not used: context"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "prompt", "said"), FORMATS, ids=[name for name, *_ in FORMATS])
def test_a_format_is_recognised_by_its_columns(name, row, prompt, said, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert prompts_of(write(tmp_path / name, [row])) == [prompt]
    (line,) = [record.getMessage() for record in caplog.records if "prompts are read from" in record.getMessage()]
    for words in [*said, "" if "not used" not in line else "prompt_column or prompt_template takes others"]:
        assert words in line


def test_one_column_and_nothing_else_is_asked_for_by_name(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [ALPACA])
    with caplog.at_level(logging.INFO):
        assert prompts_of(path, prompt_column="instruction") == ["Translate to French."]
        assert prompts_of(path, prompt_column="input") == ["Good day."]
    assert "not used: input, output" in caplog.text


def test_a_format_is_another_column_to_the_fingerprint(tmp_path):
    path = write(tmp_path / "a.jsonl", [ALPACA])
    assert read_prompts(path).column == "instruction + input"
    assert read_prompts(path, prompt_column="instruction").column == "instruction"
    assert read_prompts(path, prompt_template="{input}").column == "{input}"


def test_tools_go_with_the_conversation(tmp_path):
    for tools in ([TOOL], json.dumps([TOOL])):
        (found,) = prompts_of(write(tmp_path / "a.jsonl", [{"messages": HI, "tools": tools}]), conversation="full")
        assert found == HI and found.tools == [TOOL]
    rows = [{"messages": HI, "tools": None}, {"messages": HI, "tools": "none of them"}, {"prompt": "x"}]
    assert [getattr(p, "tools", 0) for p in prompts_of(write(tmp_path / "b.jsonl", rows))] == [None, 0, 0]
    assert "tools are not a list" in reasons_of(str(tmp_path / "b.jsonl"))[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Who?", "choices": 3}, "no list of choices; prompt_column: question"),
        ({"question": None, "choices": ["a"]}, "null"),
        ({"question": " ", "context": "Ann ran."}, "white space"),
        ({"question": "Who?", "context": {"sentences": []}}, "'context' holds no text but dict"),
        ({"instruction": "", "input": None}, "empty"),
        ({"chosen": "Yes", "rejected": "No"}, "nothing in common"),
        ({"chosen": None, "rejected": "No"}, "null"),
        ({"chosen": [user("a"), answer("x")], "rejected": [user("b"), answer("y")]}, "without a user turn"),
    ],
)
def test_a_row_that_does_not_hold_what_its_format_has(row, reason, tmp_path):
    (found,) = reasons_of(write(tmp_path / "a.jsonl", [row]))
    assert reason in found and "\n" not in found


ARRAY = np.array([user('it\'s\n "so": }\n {'), answer("b")], dtype=object)
AS_TEXT = {
    "json": json.dumps(HI),
    "indented json": json.dumps(HI, indent=2),
    "pandas": str(HI),
    "python's quotes": str([user('it\'s "so"'), answer("b")]),
    "numpy": repr(np.array(HI, dtype=object)),
    "numpy without commas": str(ARRAY),
    "with values that have no literal": "[{'role': 'user', 'content': 'hi', 'at': datetime.datetime(2024, 1, 2), "
    "'seen': Timestamp('2024-01-02 00:00:00+0000', tz='UTC'), 'score': nan, 'x': np.float64(1.5)}]",
    "sharegpt": json.dumps(SHAREGPT),
    "a mapping of lists": json.dumps({"role": ["user"], "content": ["hi"]}),
    "a request": json.dumps({"messages": HI, "tools": None}),
    "turns as text in a list": json.dumps([json.dumps(turn) for turn in HI]),
}
FIRST = {"numpy without commas": 'it\'s\n "so": }\n {', "python's quotes": 'it\'s "so"'}


@pytest.mark.parametrize("form", AS_TEXT)
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "prompt"])
def test_a_conversation_as_text_is_read(form, column, tmp_path, caplog):
    path = write(tmp_path / "a.csv", [{column: AS_TEXT[form], "id": "1"}])
    with caplog.at_level(logging.INFO):
        ((turn,),) = prompts_of(path)
    assert (turn["role"], turn["content"]) == ("user", FIRST.get(form, "hi"))
    assert caplog.text.count(f"column {column!r} holds conversations as text") == 1


def test_what_pandas_writes_is_read_as_what_it_was(tmp_path):
    rows = [{"messages": HI}, {"messages": [user("a 'b' \"c\"\n[{'role': 1}]"), answer("d")]}]
    write(tmp_path / "a.parquet", rows)
    table = pd.read_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    assert isinstance(table["messages"][0], np.ndarray)
    wanted = prompts_of(str(tmp_path / "a.parquet"), conversation="full")
    assert prompts_of(str(tmp_path / "a.csv"), conversation="full") == wanted
    assert [extract_prompt(cell) for cell in table["messages"]] == wanted


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'hi'",
        '[{"role": "user", "content": "hi"',
        '["hi", "hello"]',
        "[]",
        "[{'a': 1} ...]",
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_column_of_conversations_that_cannot_be_read_is_refused_with_its_first_row(column, text, tmp_path):
    with pytest.raises(UserError) as error:
        read_prompts(write(tmp_path / "a.csv", [{column: text}]))
    assert repr(column) in str(error.value) and text[:20] in str(error.value) and "\n" not in str(error.value)
    path = write(tmp_path / "b.csv", [{column: json.dumps(HI)}, {column: text}])
    assert reasons_of(path)[0] is None and "cannot be read" in reasons_of(path)[1]


@pytest.mark.parametrize(
    "text",
    ["[1] What is this?", "[INST] hi [/INST]", '["a", "b"]', "[{'a': 1}]", "{\"role\": \"user\"}", "[{broken", "[]",
     "array([1, 2])", "(so it is)"],
)  # fmt: skip
def test_a_prompt_that_only_begins_like_a_list_stays_a_text(text, tmp_path):
    assert prompts_of(write(tmp_path / "a.jsonl", [{"prompt": text}])) == [text]
    assert turns_in_text(text) is None
    listed = json.dumps(HI)
    assert prompts_of(write(tmp_path / "b.jsonl", [{"text": listed}])) == [listed]  # plain text, as ever
    assert prompts_of(str(tmp_path / "b.jsonl"), prompt_template="{text}") == [listed]


ROW = {"instruction": "Do it.", "input": "Now.", "n": 3, "none": None, "lines": ["a", "b"], "my column": "x"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{instruction}\n\n{input}", "Do it.\n\nNow."),
        (r"{instruction}\n\n{input}", "Do it.\n\nNow."),  # as a shell passes it on
        (r"{instruction}\t{n}\\n", "Do it.\t3\\n"),
        ("{input} {{n}} {n}", "Now. {n} 3"),
        ("{instruction}\n\n{none}", "Do it."),
        ("{none}\n\n{instruction}", "Do it."),
        ("{instruction}\n\n{none}\n\n{input}", "Do it.\n\nNow."),
        ("Task: {instruction}\nInput: {none}", "Task: Do it.\nInput:"),
        ("{lines}|{my column}", "a\nb|x"),
        ("{none}{none}\n{n}!", "3!"),
    ],
)
def test_a_template_of_columns(template, text, tmp_path):
    for name in ("a.jsonl", "a.parquet"):  # of a parquet file only the columns that are named are read
        path = write(tmp_path / name, [{**ROW, "none": ""}] if name == "a.parquet" else [ROW])
        assert prompts_of(path, prompt_template=template, keep_columns=["n"]) == [text]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt_template": "{instrution}"}, ["no column 'instrution'", "did you mean 'instruction'?"]),
        ({"prompt_template": "no column"}, ["names no column", "{instruction}"]),
        ({"prompt_template": "{{instruction}}"}, ["names no column"]),
        ({"prompt_template": "{instruction"}, ["single {", "{{"]),
        ({"prompt_template": "instruction}"}, ["single }", "}}"]),
        ({"prompt_template": "{}"}, ["no column ''"]),
        ({"prompt_template": "{input}", "prompt_column": "input"}, ["leave one of the two out"]),
        ({"prompt_column": "imput"}, ["no column 'imput'", "did you mean 'input'?"]),
        ({"keep_columns": ["instructon"]}, ["did you mean 'instruction'?"]),
    ],
)
def test_columns_that_are_not_there(settings, words, tmp_path):
    with pytest.raises(UserError) as error:
        read_prompts(write(tmp_path / "a.jsonl", [ROW]), **settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_template_whose_columns_are_empty_or_no_text(tmp_path):
    rows = [{"a": " ", "b": None}, {"a": {"x": 1}, "b": "b"}, {"a": "a", "b": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    empty, mapping, fine = reasons_of(path, prompt_template="Say: {a} {b}")
    assert "empty" in empty and "'a' holds no text but dict" in mapping and fine is None


CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3 degrees", "tool_call_id": "1", "name": "get_weather"}


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        ([{"role": "developer", "content": "Be brief."}, user("a")], [system("Be brief."), user("a")]),
        ([user("a"), CALLING, RESULT, user("b")], [user("a"), CALLING, RESULT, user("b")]),
        ([user("a"), {"role": "assistant", "tool_calls": [CALL]}, user("b")], [user("a"), CALLING, user("b")]),
        ([user("a"), {**answer("So."), "reasoning_content": "Hm."}, user("b")],
         [user("a"), {**answer("So."), "reasoning_content": "Hm."}, user("b")]),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
          {"from": "observation", "value": "r"}, {"from": "human", "value": "b"}],
         [user("a"), {"role": "assistant", "content": None,
                      "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
          {"role": "tool", "content": "r"}, user("b")]),
    ],
)  # fmt: skip
def test_turns_are_kept_with_what_belongs_to_them(turns, wanted, tmp_path):
    assert extract_prompt(turns) == wanted
    assert extract_prompt(extract_prompt(turns)) == wanted
    for name in ("a.jsonl", "a.parquet"):  # a table has nulls where a turn has no such entry
        assert prompts_of(write(tmp_path / name, [{"messages": turns}]), conversation="full") == [wanted]


def test_calls_are_shown_as_text():
    assert text_of(CALLING) == 'get_weather({"city": "Oslo"})'
    assert text_of({**CALLING, "content": "Let me see."}) == 'Let me see.\nget_weather({"city": "Oslo"})'
    assert text_of({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"x": 1}}}) == (
        'f({"x": 1})'
    )
    with pytest.raises(SkippedPrompt, match=r"turn 1 .* no text"):
        extract_prompt([user("a"), {"role": "assistant", "content": None, "tool_calls": []}, user("b")])
    with pytest.raises(SkippedPrompt, match="Unicode"):
        extract_prompt([user("a"), {**CALLING, "tool_calls": [{"function": {"name": "\ud83d"}}]}, user("b")])


@pytest.mark.parametrize(
    ("how", "prompt", "wanted"),
    [
        ("keep", None, [system("s"), *HI]),
        ("merge", None, [user("s\n\nhi"), *HI[1:]]),
        ("drop", None, HI),
        ("keep", "new", [system("new"), *HI]),
        ("merge", "new", [user("new\n\nhi"), *HI[1:]]),
        ("drop", "new", [system("new"), *HI]),
    ],
)
def test_system_turns_are_kept_merged_or_dropped(how, prompt, wanted):
    turns = Conversation([system("s"), *HI])
    assert arranged(turns, how, prompt) == wanted
    assert turns == [system("s"), *HI]  # as it was
