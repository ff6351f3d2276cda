"""The prompt in a data set's cell: a text, or the turns of a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Message = dict[str, str]

# ShareGPT's words for the two speakers, and other common ones.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


class SkippedPrompt(ValueError):
    """One prompt cannot be used; the message is the reason, which is stored with the results."""


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, which no tokenizer accepts
        raise SkippedPrompt(f"character {error.start} of the text is not valid Unicode") from error
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise SkippedPrompt("only white space" if text else "empty text")
    return text


def extract_prompt(value: object, conversation: Literal["first_turn", "full"] = "full") -> str | list[Message]:
    """Take the prompt out of a cell.

    Args:
        value: a text; or a conversation: a list of turns with "role" and "content" (or "from" and "value"), or, as some
            data sets have it, a mapping of lists.
        conversation: "first_turn" keeps the first user turn and the system turns before it, "full" all turns up to
            and including the last user turn.

    Returns:
        The text as it is, or messages that end with the user's.

    Raises:
        SkippedPrompt: there is no user turn, or a turn that is needed is malformed or holds no text.
    """
    if isinstance(value, str):
        return _not_blank(_valid(value))
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise SkippedPrompt("a conversation whose lists differ in length")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise SkippedPrompt(
            "null" if value is None else f"neither a text nor a conversation but {type(value).__name__}"
        )
    roles = [_role(turn) for turn in value]
    if "user" not in roles:
        raise SkippedPrompt("a conversation without a user turn")
    if conversation == "first_turn":
        last = roles.index("user")
        kept = [number for number in range(last) if roles[number] == "system"]
    else:
        last = len(roles) - 1 - roles[::-1].index("user")
        kept = list(range(last))
    turns: list[Message] = []
    for number in kept:
        role, content = roles[number], _content(value[number], number)
        if role is None:
            raise SkippedPrompt(f"turn {number} of the conversation has no role")
        if role != "system" or content.strip():  # leave out an empty system turn
            turns.append({"role": role, "content": content})
    return [*turns, {"role": "user", "content": _not_blank(_content(value[last], last))}]


def check_prompts(prompts: object) -> None:
    """Raise ValueError for one text, one conversation or a table, whose iteration does not give prompts."""
    if isinstance(prompts, str | bytes):
        raise ValueError("prompts is one text; give a list: fisher([text])")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is a {type(prompts).__name__}; expected a list of texts or conversations")
    if hasattr(prompts, "columns") or hasattr(prompts, "column_names"):
        raise ValueError(f"prompts is a table ({type(prompts).__name__}); give its column of prompts")
    if isinstance(prompts, Sequence) and prompts and all(_role(prompt) is not None for prompt in prompts):
        raise ValueError("prompts is one conversation, a list of messages; give a list of those: fisher([messages])")


def _role(turn: object) -> str | None:
    role = _first_of(turn, "role", "from")
    return _ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else None


def _content(turn: object, number: int) -> str:
    content = _first_of(turn, "content", "value")
    if isinstance(content, list):  # parts, as in conversations that may also hold images
        texts = [_first_of(part, "text") for part in content]
        content = "\n".join(text for text in texts if isinstance(text, str)) if None not in texts else None
    if not isinstance(content, str):
        raise SkippedPrompt(f"turn {number} of the conversation holds no text")
    return _valid(content)


def _first_of(turn: object, *names: str) -> object:
    values = [turn.get(name) for name in names] if isinstance(turn, Mapping) else []
    return next((value for value in values if value is not None), None)
