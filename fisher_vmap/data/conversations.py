"""The prompt in a data set's cell: a text, or the turns of a conversation."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Message = dict[str, Any]
"""One turn: "role", "content" (None beside tool calls), and what else its data set has for the chat template."""

# ShareGPT's words for the speakers, and other common ones.
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "model": "assistant", "developer": "system", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles of a turn whose text is a call as JSON
_NAMES = ("role", "from", "content", "value")  # the two spellings of a turn's speaker and text

# How a list of turns begins as text: JSON, Python's repr, or numpy's.
_LIST_AS_TEXT = re.compile(r"""\s*(?:array\(|[\[(]\s*(?:[\[({"'\]]|array\()|\{\s*["'])""")
# What keeps a repr from being a literal: numpy's missing commas, its arrays, and values that have no literal.
_NOT_LITERAL = re.compile(
    r"""(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?P<next>\s+(?=['"]))?"""
    r"""|(?P<turns>\}\s+\{)|(?P<array>\b(?:array|np\.\w+)\()|(?P<dtype>,\s*dtype=[^()\s]+\))"""
    r"""|(?P<value>\b[A-Za-z_][\w.]*\([^()]*\)|\b(?:nan|NaT|null)\b)""",
    re.DOTALL,
)


class SkippedPrompt(ValueError):
    """One prompt cannot be used; the message is the reason, which is stored with the results."""


class Conversation(list[Message]):
    """Turns that end with the user's.

    Attributes:
        tools: the tools that the assistant may call, as JSON schemas; None: no tools.
    """

    def __init__(self, turns: Iterable[Message] = (), tools: list[Any] | None = None) -> None:
        super().__init__(turns)
        self.tools = tools


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


def extract_prompt(value: object, conversation: Literal["first_turn", "full"] = "full") -> str | Conversation:
    """Take the prompt out of a cell.

    Args:
        value: a text; or a conversation: a list of turns with "role" and "content" (or "from" and "value"), a mapping
            with such "messages" and perhaps "tools", or, as some data sets have it, a mapping of lists. Developer
            turns are system turns, and other entries of a turn, such as "tool_calls", are kept.
        conversation: "first_turn" keeps the first user turn and the system turns before it, "full" all turns up to
            and including the last user turn.

    Returns:
        The text as it is, or messages that end with the user's.

    Raises:
        SkippedPrompt: there is no user turn, or a turn that is needed is malformed or holds no text.
    """
    if isinstance(value, str):
        return _not_blank(_valid(value))
    turns, tools = turns_and_tools(value)
    roles = [_role(turn) for turn in turns]
    last = _last_of_prompt(roles, conversation)
    kept = [number for number in range(last) if conversation == "full" or roles[number] == "system"]
    found = Conversation(tools=tools)
    for number in kept:
        message = _message(turns[number], number)
        if message["role"] != "system" or message["content"].strip():  # leave out an empty system turn
            found.append(message)
    message = _message(turns[last], last)
    _not_blank(message["content"])
    return Conversation([*found, message], tools)


def _last_of_prompt(roles: Sequence[str | None], conversation: str) -> int:
    """The number of the user turn that a prompt ends with."""
    if "user" not in roles:
        raise SkippedPrompt("a conversation without a user turn")
    return roles.index("user") if conversation == "first_turn" else len(roles) - 1 - roles[::-1].index("user")


def answer_after(value: object, conversation: Literal["first_turn", "full"] = "full") -> Message:
    """The assistant's message that follows the prompt of a conversation, as `extract_prompt` takes it.

    Raises:
        SkippedPrompt: no assistant turn follows, or it is malformed.
    """
    if isinstance(value, str):
        raise SkippedPrompt("a text, which no assistant turn follows")
    turns, _tools = turns_and_tools(value)
    roles = [_role(turn) for turn in turns]
    at = _last_of_prompt(roles, conversation) + 1
    if at >= len(roles) or roles[at] != "assistant":
        raise SkippedPrompt("no assistant turn follows the prompt")
    return _message(turns[at], at)


def user_turns(value: object) -> int:
    """The number of a user's turns in a conversation; 1 of a text.

    Raises:
        SkippedPrompt: it is neither.
    """
    return 1 if isinstance(value, str) else [_role(turn) for turn in turns_and_tools(value)[0]].count("user")


def last_answer(value: object) -> Message:
    """The last assistant's message of a list of turns.

    Raises:
        SkippedPrompt: there is none, or it is malformed.
    """
    turns, _tools = turns_and_tools(value)
    at = next((at for at in reversed(range(len(turns))) if _role(turns[at]) == "assistant"), None)
    if at is None:
        raise SkippedPrompt("turns without an assistant's")
    return _message(turns[at], at)


def as_answer(completion: str | Message) -> Message:
    """A completion as an assistant's message.

    Raises:
        SkippedPrompt: it has no text, or none that is valid Unicode.
    """
    answer = dict(completion) if isinstance(completion, Mapping) else {"role": "assistant", "content": completion}
    try:
        _not_blank(_valid(text_of(answer)))
    except SkippedPrompt as reason:
        raise SkippedPrompt(f"the completion: {reason}") from reason
    return answer


def turns_and_tools(value: object) -> tuple[list[object], list[Any] | None]:
    """The turns of a conversation in any of the forms of `extract_prompt`, unchecked, and its tools.

    Raises:
        SkippedPrompt: it is not a conversation, or its tools are not a list.
    """
    tools: object = value.tools if isinstance(value, Conversation) else None
    if isinstance(value, Mapping) and "messages" in value:
        tools, value = value.get("tools"), value["messages"]
    if hasattr(value, "tolist"):  # numpy's array, as pandas reads a list from parquet
        value = value.tolist()
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise SkippedPrompt("a conversation whose lists differ in length")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise SkippedPrompt(
            "null" if value is None else f"neither a text nor a conversation but {type(value).__name__}"
        )
    turns = [spelt_out(turn) if isinstance(turn, str) and _LIST_AS_TEXT.match(turn) else turn for turn in value]
    return turns, _tools(tools)


def _tools(value: object) -> list[Any] | None:
    if value is None or value == "":
        return None
    found = spelt_out(value) if isinstance(value, str) else value
    found = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(found, list):
        raise SkippedPrompt(f"the tools are not a list but {type(value).__name__}")
    return list(_plain(found)) or None


def turns_in_text(text: str) -> object:
    """The conversation that a text spells as JSON, or as Python, pandas or numpy print it; None: it spells none."""
    found = spelt_out(text) if _LIST_AS_TEXT.match(text) else None
    try:
        turns, _ = turns_and_tools(found)
    except SkippedPrompt:
        return None
    return found if turns and all(_role(turn) is not None for turn in turns) else None


def looks_like_turns(text: str) -> bool:
    """Whether a text begins as a list or mapping does that was written as text."""
    return _LIST_AS_TEXT.match(text) is not None


def spelt_out(text: str) -> object:
    """The value that a text spells as JSON, or as Python or numpy print it; None: it spells none."""

    def literal(match: re.Match[str]) -> str:
        if match["string"]:
            return match["string"] + ("," if match["next"] else "")
        if match["turns"]:
            return "},{"
        return "(" if match["array"] else ")" if match["dtype"] else "None"

    try:
        return json.loads(text, strict=False)  # line breaks within a text are forgiven
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(_NOT_LITERAL.sub(literal, text.strip()))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


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


def arranged(turns: Sequence[Message], system_turns: str, system_prompt: str | None = None) -> list[Message]:
    """The turns with their system turns as the settings want them.

    Args:
        turns: messages that end with the user's.
        system_turns: "keep"; "merge": put their texts before the first user turn's, with a blank line between;
            "drop": leave out the conversation's own.
        system_prompt: a system turn in place of the conversation's own; None: there is none.
    """
    if system_prompt or system_turns == "drop":
        turns = [turn for turn in turns if turn["role"] != "system"]
    if system_prompt:
        turns = [{"role": "system", "content": system_prompt}, *turns]
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    if system_turns != "merge" or not system:
        return list(turns)
    merged = [dict(turn) for turn in turns if turn["role"] != "system"]
    first = next(turn for turn in merged if turn["role"] == "user")
    first["content"] = "\n\n".join([*system, first["content"]])
    return merged


def text_of(turn: Message) -> str:
    """A turn's text, and the calls beside or in place of it as `name(arguments)`."""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or [] if isinstance(call, dict)]
    if isinstance(turn.get("function_call"), dict):
        calls.append(turn["function_call"])
    spoken = [f"{call.get('name')}({_json(call.get('arguments'))})" for call in calls if isinstance(call, dict)]
    return "\n".join([*([turn["content"]] if turn.get("content") else []), *spoken])


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _message(turn: object, number: int) -> Message:
    """A turn in OpenAI's spelling, with its other entries.

    Raises:
        SkippedPrompt: it has no role, or neither text nor calls.
    """
    given = turn if isinstance(turn, Mapping) else {}
    entries = {str(key): _plain(value) for key, value in given.items() if key not in _NAMES and value is not None}
    for name in ("tool_calls", "function_call"):
        if isinstance(entries.get(name), str):
            entries[name] = spelt_out(entries[name])
        if name in entries and not entries[name]:
            del entries[name]
    role, content = _role(turn), _first_of(turn, "content", "value")
    if role in _CALLS:
        call = spelt_out(content) if isinstance(content, str) else content
        role = "assistant"
        if isinstance(call, Mapping) and "name" in call:
            entries["tool_calls"], content = [{"type": "function", "function": _plain(call)}], None
    if role is None:
        raise SkippedPrompt(f"turn {number} of the conversation has no role")
    has_calls = role == "assistant" and ("tool_calls" in entries or "function_call" in entries)
    return {"role": role, "content": None if content is None and has_calls else _content(content, number), **entries}


def _plain(value: Any) -> Any:
    """The value without nulls in its mappings: tables fill in a null where a row lacks a field that others have."""
    if isinstance(value, str):
        return _valid(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _role(turn: object) -> str | None:
    role = _first_of(turn, "role", "from")
    return _ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else None


def _content(content: object, number: int) -> str:
    if isinstance(content, list):  # parts, as in conversations that may also hold images
        texts = [_first_of(part, "text") for part in content]
        content = "\n".join(text for text in texts if isinstance(text, str)) if None not in texts else None
    if not isinstance(content, str):
        raise SkippedPrompt(f"turn {number} of the conversation holds no text")
    return _valid(content)


def _first_of(turn: object, *names: str) -> object:
    values = [turn.get(name) for name in names] if isinstance(turn, Mapping) else []
    return next((value for value in values if value is not None), None)
