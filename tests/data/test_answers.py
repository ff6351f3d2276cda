"""Completions out of data: which column or turn is the answer to which prompt, and which rows have none."""

import json
import logging

import pytest

from fisher_vmap.data.prompts import read_prompts
from fisher_vmap.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be."}
TWO = [user("u1"), bot("a1"), user("u2"), bot("a2")]
SHAREGPT = [{"from": "human", "value": "u1"}, {"from": "gpt", "value": "a1"}]


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path, *rows, **settings):
    source = read_prompts(str(written(tmp_path, *rows)), completions=True, **settings)
    return list(source)


@pytest.mark.parametrize(
    ("row", "settings", "prompt", "completion"),
    [
        ({"messages": TWO}, {}, [user("u1")], bot("a1")),
        ({"messages": TWO}, {"conversation": "full"}, TWO[:3], bot("a2")),
        ({"messages": [SYSTEM, *TWO]}, {"conversation": "full"}, [SYSTEM, *TWO[:3]], bot("a2")),
        ({"conversations": SHAREGPT}, {}, [user("u1")], bot("a1")),
        ({"messages": json.dumps(TWO)}, {}, [user("u1")], bot("a1")),
        ({"prompt": "The sky is", "completion": " blue."}, {}, "The sky is", " blue."),
        ({"prompt": [user("u1")], "completion": [bot("a1")]}, {}, [user("u1")], bot("a1")),
        ({"prompt": [SYSTEM, user("u1")], "completion": [bot("a1")]}, {}, [SYSTEM, user("u1")], bot("a1")),
        ({"prompt": TWO[:3], "completion": [bot("a2")]}, {"conversation": "full"}, TWO[:3], bot("a2")),
        ({"prompt": [user("u1")], "completion": bot("a1")}, {}, [user("u1")], bot("a1")),
        ({"prompt": "Sky?", "chosen": "blue", "rejected": "green"}, {}, "Sky?", "blue"),
        ({"prompt": [user("u1")], "chosen": [bot("a1")], "rejected": [bot("b1")]}, {}, [user("u1")], bot("a1")),
        # As ultrafeedback has it: the answers repeat the prompt.
        ({"prompt": "u1", "chosen": TWO[:2], "rejected": [user("u1"), bot("b1")]}, {}, "u1", bot("a1")),
        ({"chosen": "Q: sky? A: blue", "rejected": "Q: sky? A: green"}, {}, "Q: sky? A:", " blue"),
        ({"chosen": TWO[:2], "rejected": [user("u1"), bot("b1")]}, {}, [user("u1")], bot("a1")),
        ({"chosen": TWO, "rejected": [*TWO[:3], bot("b2")]}, {"conversation": "full"}, TWO[:3], bot("a2")),
        ({"chosen": TWO, "rejected": [*TWO[:3], bot("b2")]}, {}, [user("u1")], bot("a1")),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, {}, "Add.\n1 and 2", "3"),
        ({"instruction": "Add.", "context": "1 and 2", "response": "3"}, {}, "Add.\n1 and 2", "3"),
        ({"question": "1 + 2?", "answer": "3"}, {}, "1 + 2?", "3"),
        ({"question": "1 + 2?", "answer": 3}, {}, "1 + 2?", "3"),
        ({"prompt": "u1", "completion": "a1", "mine": "m1"}, {"completion_column": "mine"}, "u1", "m1"),
        ({"messages": [user("u1")], "mine": "m1"}, {"completion_column": "mine"}, [user("u1")], "m1"),
        ({"prompt": "u1", "mine": [bot("a1"), bot("a2")]}, {"completion_column": "mine"}, "u1", bot("a2")),
    ],
)
def test_the_answer_to_each_prompt(row, settings, prompt, completion, tmp_path):
    (found,) = read(tmp_path, row, **settings)
    assert found.skipped is None
    assert (found.messages_or_text, found.completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("u1")]}, "no assistant turn follows the prompt"),
        ({"messages": [user("u1"), user("u2"), bot("a2")]}, "no assistant turn follows the prompt"),
        ({"prompt": "u1", "completion": None}, "column 'completion' is null"),
        ({"prompt": "u1", "completion": " \n "}, "column 'completion' holds no completion"),
        ({"prompt": "u1", "completion": ["a", "b"]}, "turns without an assistant's"),
        ({"prompt": "u1", "completion": {"n": 3}}, "neither a text nor a conversation but dict"),
        ({"prompt": TWO[:3], "completion": [bot("a2")]}, "set conversation to full"),
        ({"prompt": TWO[:3], "completion": "a2"}, "set conversation to full"),
        ({"chosen": "Q: sky? A:", "rejected": "Q: sky? A: green"}, "holds no completion"),
        ({"chosen": TWO[:1], "rejected": TWO[:1]}, "no assistant turn follows the prompt"),
    ],
)
def test_a_row_without_an_answer_says_why(row, reason, tmp_path):
    good = dict.fromkeys(row) | {"prompt": "u", "completion": "a"} if "prompt" in row else row
    found = read(tmp_path, row, good)
    assert reason in found[0].skipped and found[0].completion is None
    assert found[1].skipped is None or good is row


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"prompt": "u1", "answers": "a1"}, {}, ["no column is named completion", "set completion_column to one of"]),
        ({"prompt": "u1", "answer": "a1"}, {"completion_column": "anwser"}, ["'anwser'", "did you mean 'answer'?"]),
        ({"text": "u1"}, {}, ["targets is completion"]),
    ],
)
def test_a_column_that_is_not_there(row, settings, words, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, row, **settings)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "u1", "response": "a1", "answer": "b1"}, "column 'response'"),
        ({"messages": TWO}, "the assistant turn after each prompt"),
        ({"chosen": TWO, "rejected": TWO[:3]}, "column 'chosen'"),
    ],
)
def test_one_line_says_what_was_taken(row, words, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert read_prompts(str(written(tmp_path, row)), completions=True).completions == words
    line = f"completions are {words} (completion_column takes another column)"
    assert [r.getMessage() for r in caplog.records].count(line) == 1
