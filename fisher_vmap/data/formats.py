"""From a row's columns to its prompt: formats that are recognised by their columns, and templates of columns.

Columns are joined as trainers join them when they render with a chat template. Alpaca's input follows its instruction
after a line break, as in LLaMA-Factory and in axolotl's chat style, and so does dolly's context. A question follows
its context after a blank line, and the choices follow it as "A. ...", one a line, as in lm-evaluation-harness. Of
chosen and rejected answers the prompt is what they have in common, as in TRL.
"""

from __future__ import annotations

import difflib
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fisher_vmap.data.conversations import SkippedPrompt, looks_like_turns, spelt_out, turns_and_tools, turns_in_text
from fisher_vmap.errors import UserError, listed

_log = logging.getLogger(__name__)

Row = Mapping[str, Any]

CONVERSATION_COLUMNS = ("conversation", "messages", "conversations")  # the last is ShareGPT's name
# Columns that are looked for, in this order.
PROMPT_COLUMNS = (*CONVERSATION_COLUMNS, "prompt", "instruction", "question", "text")
_SYSTEM_COLUMNS, _TOOLS = ("system", "system_prompt"), "tools"
_CHOICES, _LETTERED = ("choices", "options"), ("A", "B", "C", "D")
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|\\\\|\\n|\\t|[^{}\\]+|\\")
_CHARACTERS = {"{{": "{", "}}": "}", "\\\\": "\\", "\\n": "\n", "\\t": "\t"}


class _UnreadableTurns(SkippedPrompt):
    """A cell holds a conversation as text that cannot be read."""


class Form:
    """How a row becomes a prompt.

    Attributes:
        columns: the names of those that are read.
        column: the same in one text, by which two runs are compared; of a template, the template.
        words: what the columns are taken for.
    """

    def __init__(
        self, columns: Sequence[str], prompt: Callable[[Row], object], words: str = "", column: str | None = None
    ) -> None:
        self.columns = tuple(columns)
        self.column = " + ".join(columns) if column is None else column
        self.words = words
        self._prompt = prompt
        self._told = False

    def prompt(self, row: Row) -> object:
        """A row's prompt, for `extract_prompt`.

        Raises:
            SkippedPrompt: a column does not hold what the format has there.
        """
        found = self._prompt(row)
        if not self._told and not isinstance(found, str):
            for name in self.columns:
                if isinstance(row.get(name), str) and turns_in_text(row[name]) is not None:
                    _log.info("column %r holds conversations as text: they are read as turns", name)
                    self._told = True
        return found

    def check(self, table: str, row: object) -> None:
        """Raise UserError if the first row holds a conversation as text that cannot be read."""
        try:
            self._prompt(row if isinstance(row, dict) else {})
        except _UnreadableTurns as reason:
            raise UserError(
                f"{table}: {reason}; write it as a list of turns or as JSON, or set prompt_column to another column"
            ) from reason
        except SkippedPrompt:  # of this row alone
            return


def form_of(table: str, columns: Sequence[str], prompt_column: str, prompt_template: str | None) -> Form:
    """Choose how rows become prompts.

    Args:
        table: the data set's name, for messages.
        columns: the names of its columns.
        prompt_column: the column with the prompt, or "auto": recognise the format.
        prompt_template: a text with columns in braces; None: there is none.

    Raises:
        UserError: there is no such column, or the format is not known.
    """
    if prompt_template is not None:
        if prompt_column != "auto":
            raise UserError(
                f"prompt_column is {prompt_column}, but prompt_template names the columns; leave one of the two out"
            )
        return _template_form(table, columns, prompt_template)
    if prompt_column != "auto":
        check_column(table, columns, prompt_column, "prompt_column")
        return Form([prompt_column], lambda row: cell(row, prompt_column))
    return _recognised(table, columns)


def check_column(table: str, columns: Sequence[str], name: str, setting: str) -> None:
    """Raise UserError, with the nearest name, if there is no such column."""
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"correct {setting}"
        raise UserError(f"{table}: has no column {name!r}; its columns are: {listed(columns, 20)}; {hint}")


def _recognised(table: str, columns: Sequence[str]) -> Form:
    there = set(columns)
    main = next((name for name in PROMPT_COLUMNS if name in there), None)
    body: Callable[[Row], object]
    if main == "text":
        return Form(["text"], lambda row: row.get("text"))
    system = next((name for name in _SYSTEM_COLUMNS if name in there), None)
    beside = [name for name in (system, _TOOLS) if name is not None and name in there]
    if main is None:
        if not {"chosen", "rejected"} <= there:
            raise UserError(
                f"{table}: no column is named {', '.join(PROMPT_COLUMNS)}; set prompt_column to one of: "
                f"{listed(columns, 20)}; or prompt_template to a text with columns in braces"
            )
        body, names, words = _in_common, ["chosen", "rejected"], "a preference pair: the prompt is what both begin with"
    elif main == "instruction":
        names = [main, *(name for name in ("context", "input") if name in there)]
        body = _joined("\n", names)
        words = {1: "", 2: "Alpaca" if "input" in there else "dolly", 3: "Alpaca"}[len(names)]
        words += ": joined by a line break" if words else ""
    elif main == "question":
        context = ["context"] if "context" in there else []
        choices = [next((name for name in _CHOICES if name in there), "")]
        choices = choices if choices[0] else [name for name in _LETTERED if {"A", "B"} <= there and name in there]
        names, body = [*context, main, *choices], _question(context, choices)
        words = ", ".join([*(["the question follows its context"] if context else []),
                           *(["the choices are lettered"] if choices else [])])  # fmt: skip
    else:
        names, words, body = [main], "", _one(main)
    if beside:
        told = [f"{name!r} is the {'tools' if name == _TOOLS else 'system turn'}" for name in beside]
        words = ", ".join([*([words] if words else []), *told])
    tools = _TOOLS if _TOOLS in there else None
    return Form([*beside, *names], _with_companions(body, system, tools), words)


def _one(name: str) -> Callable[[Row], object]:
    return lambda row: cell(row, name)


def cell(row: Row, name: str) -> object:
    """A cell; a conversation that it holds as text is read.

    Raises:
        SkippedPrompt: the column is one of conversations, and the text is none that can be read.
    """
    value = row.get(name)
    if not isinstance(value, str) or name == "text":
        return value
    found = turns_in_text(value)
    if found is None and name in CONVERSATION_COLUMNS and looks_like_turns(value):
        shown = " ".join(value.split())
        raise _UnreadableTurns(
            f"column {name!r} holds a conversation as text that cannot be read: "
            f"{shown if len(shown) <= 80 else shown[:79] + '…'}"
        )
    return value if found is None else found


def _text(row: Row, name: str) -> str:
    """A cell as text; null is an empty text, and a list of texts is one a line.

    Raises:
        SkippedPrompt: it holds something else.
    """
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, list | dict | bytes):
        raise SkippedPrompt(
            f"column {name!r} holds no text but {type(value).__name__}; prompt_column takes one column alone"
        )
    return str(value)


def _joined(between: str, names: Sequence[str]) -> Callable[[Row], object]:
    """The texts of several columns; empty ones are left out."""
    if len(names) == 1:
        return _one(names[0])

    def prompt(row: Row) -> object:
        texts = [_text(row, name) for name in names]
        return between.join(text for text in texts if text.strip())

    return prompt


def _question(context: Sequence[str], choices: Sequence[str]) -> Callable[[Row], object]:
    if not context and not choices:
        return _one("question")
    asked = _joined("\n\n", [*context, "question"])

    def prompt(row: Row) -> object:
        question, text = row.get("question"), asked(row)
        if not question or not str(question).strip():
            return question
        if not choices or not isinstance(text, str):
            return text
        found = _choices(row, choices)
        return "\n".join([text, *(f"{label}. {choice}" for label, choice in found)])

    return prompt


def _choices(row: Row, names: Sequence[str]) -> list[tuple[str, str]]:
    """The letters and texts of a question's choices: of a list, of labels with texts, or of a column for each."""
    if len(names) > 1:
        return [(name, _text(row, name)) for name in names if row.get(name) not in (None, "")]
    value = row.get(names[0])
    value = spelt_out(value) if isinstance(value, str) else value
    labels: Sequence[Any] = string.ascii_uppercase
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels, value = value.get("label") or labels, value["text"]
    elif isinstance(value, dict):
        value = {label: text for label, text in value.items() if text is not None}
        labels, value = list(value), list(value.values())
    if not isinstance(value, list) or not value or len(value) > len(labels):
        raise SkippedPrompt(f"column {names[0]!r} holds no list of choices; prompt_column: question leaves it out")
    return [(str(label), str(choice)) for label, choice in zip(labels, value, strict=False)]


def _in_common(row: Row) -> object:
    """What the chosen and the rejected answer begin with: turns, or characters."""
    chosen, rejected = cell(row, "chosen"), cell(row, "rejected")
    if chosen is None or rejected is None:
        return None
    if isinstance(chosen, str) and isinstance(rejected, str):
        both = enumerate(zip(chosen, rejected, strict=False))
        length = next((i for i, (one, other) in both if one != other), min(len(chosen), len(rejected)))
        common = chosen[:length].removesuffix(" ")
        if not common.strip():
            raise SkippedPrompt("chosen and rejected begin with nothing in common")
        return common
    pairs = zip(turns_and_tools(chosen)[0], turns_and_tools(rejected)[0], strict=False)
    turns = []
    for one, other in pairs:
        if one != other:
            break
        turns.append(one)
    return turns


def _with_companions(body: Callable[[Row], object], system: str | None, tools: str | None) -> Callable[[Row], object]:
    """Add a column's system turn, unless the conversation has its own, and another's tools."""
    if system is None and tools is None:
        return body

    def prompt(row: Row) -> object:
        found = body(row)
        instruction = "" if system is None else _text(row, system)
        schemas = None if tools is None else row.get(tools)
        if not found or (not instruction.strip() and not schemas):
            return found
        turns, own = ([{"role": "user", "content": found}], None) if isinstance(found, str) else turns_and_tools(found)
        roles = [str(turn.get("role") or turn.get("from")).lower() for turn in turns if isinstance(turn, Mapping)]
        if instruction.strip() and not {"system", "developer"} & set(roles):
            turns = [{"role": "system", "content": instruction}, *turns]
        return {"messages": turns, "tools": schemas or own}

    return prompt


def _template_form(table: str, columns: Sequence[str], template: str) -> Form:
    r"""The form of a template: `{name}` is a column, `{{` and `}}` are braces, and `\n` written out is a line break.

    An empty column takes the white space before it along; at the beginning, that after it.
    """
    parts: list[tuple[str, str]] = []  # literal text, and the column after it
    literal = ""
    for match in _PIECE.finditer(template):
        if match[0] in ("{", "}"):
            raise UserError(f"prompt_template has a single {match[0]}; write {match[0] * 2} for the character itself")
        if match[1] is None:
            literal += _CHARACTERS.get(match[0], match[0])
            continue
        check_column(table, columns, match[1], "prompt_template")
        parts.append((literal, match[1]))
        literal = ""
    if not parts:
        raise UserError(
            f"prompt_template names no column; put columns in braces, such as {{{columns[0]}}}; "
            f"{table} has: {listed(columns, 20)}"
        )
    names = list(dict.fromkeys(name for _, name in parts))

    def prompt(row: Row) -> object:
        texts = {name: _text(row, name) for name in names}
        if not any(text.strip() for text in texts.values()):
            raise SkippedPrompt(f"empty text: nothing in {listed(names)}")
        out, after_nothing = "", False
        for before, name in parts:
            before = before.lstrip() if after_nothing and not out else before
            after_nothing = not texts[name].strip()
            out += before.rstrip() if after_nothing else before + texts[name]
        return out + (literal.lstrip() if after_nothing and not out else literal)

    return Form(names, prompt, "by prompt_template", column=template)
