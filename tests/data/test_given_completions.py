"""Completions that are given in Python: as many as there are prompts, and texts."""

import pytest

from fisher_vmap.data.batching import with_completions
from fisher_vmap.data.conversations import SkippedPrompt

TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("completions", [["a", "b"], iter(["a", "b"]), [TURNS[1], "b"]])
def test_one_for_each_prompt(completions):
    found = list(with_completions(["u", "v"], completions, True))
    assert [prompt for prompt, _ in found] == ["u", "v"] and found[1][1] == "b"
    assert found[0][1] in ("a", TURNS[1])


@pytest.mark.parametrize(
    ("completions", "words"),
    [
        (["a"], "as many completions as prompts, but one of the two ends after 1"),
        (["a", "b", "c"], "as many completions as prompts, but one of the two ends after 2"),
        ([], "ends after 0"),
        (["a", None], "completion 1 is a NoneType; expected a text"),
        ([3, "b"], "completion 0 is a int; expected a text"),
    ],
)
def test_what_is_wrong_with_them_is_said(completions, words):
    with pytest.raises(ValueError, match=words):
        list(with_completions(["u", "v"], completions, True))


def test_without_them_the_turn_after_the_prompt():
    (one, other) = with_completions([TURNS, "u"], None, True)
    assert one[1] == TURNS[1] and isinstance(other[1], SkippedPrompt)
    assert list(with_completions([TURNS, "u"], None, False)) == [(TURNS, None), ("u", None)]
