"""A tokenizer's chat template: turns to text, and how a text begins that the template has written already."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from fisher_vmap.data.conversations import Message, SkippedPrompt, spelt_out
from fisher_vmap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_MARK, _OTHER = "q7Zx probe", "k4Vw probe"  # texts that no template contains
# What a template raises: its own error, or that of an operation on a turn of an unexpected form.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
# Arguments of `apply_chat_template` that are no variables of a template, or that a run sets itself.
_RESERVED = (
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


class Frame(NamedTuple):
    """What a template puts around the text of a user turn, as far as it shows that a text is rendered already.

    Attributes:
        openings: beginnings of a rendered text that hold a special token, without the beginning-of-text token.
        plain_openings: those of ordinary characters, which a text may begin with by chance.
        closings: its possible ends, the longest first: up to where the answer begins.
        bos: whether the template writes the beginning-of-text token in front.
    """

    openings: tuple[str, ...]
    plain_openings: tuple[str, ...]
    closings: tuple[str, ...]
    bos: bool

    def wrote(self, text: str) -> bool:
        """Whether the template has written this text, which begins after a beginning-of-text token."""
        return text.startswith(self.openings) or (
            text.startswith(self.plain_openings) and any(closing in text for closing in self.closings)
        )

    def end(self, text: str) -> int:
        """Where the template's own end begins in a text; its length if the text has no such end."""
        stripped = text.rstrip()
        found = next((closing for closing in self.closings if stripped.endswith(closing)), None)
        return len(text) if found is None else len(stripped) - len(found)


class ChatTemplate:
    """A chat template with its variables.

    Attributes:
        date: the date that the template writes into every prompt, ISO 8601, or None.
        takes_system: whether it writes a system turn.
        source: the template's text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        date: str | None,
        variables: Mapping[str, Any],
        with_tools: str | None = None,
    ) -> None:
        """Open a template; `with_tools` is another one for conversations with tools."""
        self._tokenizer = tokenizer
        self._variables = dict(variables)
        day = datetime.date.today().isoformat() if date is None else date
        self.source = _with_fixed_date(source, day)
        self._with_tools = self.source if with_tools is None else _with_fixed_date(with_tools, day)
        self.date = day if self.source != source else None
        # Most data sets have the arguments of a call as JSON text, as OpenAI's interface does. A template that writes
        # them as JSON itself expects a mapping, and would quote the text a second time.
        encodes = re.search(r"arguments\s*\|\s*tojson", source) is not None
        takes_both = re.search(r"arguments\s+is\s+(not\s+)?(string|mapping)", source) is not None
        self._parses_arguments = encodes and not takes_both
        self.takes_system = True
        self.takes_system = self._writes([{"role": "system", "content": _MARK}, {"role": "user", "content": "a"}])

    def usable(self) -> bool:
        """Whether it renders a user turn."""
        return self._writes([{"role": "user", "content": _MARK}])

    def render(self, turns: Sequence[Message], tools: list[Any] | None = None, *, answer: bool = True) -> str:
        """The turns as text.

        Args:
            turns: messages.
            tools: the tools of the conversation, as JSON schemas.
            answer: whether the text ends where the assistant's answer begins.

        Raises:
            SkippedPrompt: the template refuses the turns.
        """
        messages = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        if self._parses_arguments:
            messages = [_with_parsed_arguments(message) for message in messages]
        variables = self._variables if tools is None else {**self._variables, "tools": tools}
        template = self.source if variables.get("tools") is None else self._with_tools
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=answer, tokenize=False, **variables
                )
            )
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            asked = ""
            if not self.takes_system and any(turn["role"] == "system" for turn in turns):
                asked = "; it takes no system turn: set system_turns to merge or drop"
            raise SkippedPrompt(f"the chat template refuses the conversation ({reason}){asked}") from error

    def frame(self) -> Frame:
        """What it puts around the text of a user turn."""
        user, system = {"role": "user", "content": _MARK}, {"role": "system", "content": _MARK}
        bos = getattr(self._tokenizer, "bos_token", None) or ""
        first, after = self._around([user])
        before_system, _ = self._around([system, {"role": "user", "content": "a"}])
        header = self._header()
        # In some vocabularies the token that begins each turn is named as the one that begins a text.
        separate = bool(bos) and not header.startswith(bos)
        special, plain = list[str](), list[str]()
        for text in (first, before_system, header):
            opening = (text.removeprefix(bos) if separate else text).strip()
            line = opening.partition("\n")[0].rstrip()  # a default system turn may go on with today's date
            if any(name in line for name in special_names(self._tokenizer)):
                special.append(line)
            elif opening:
                plain.append(opening)
        end, answer = after.strip(), self._answer().strip()
        closings = {end, end.removeprefix(self._closed().strip()).strip(), answer} - {""}
        return Frame(
            tuple(dict.fromkeys(special)),
            tuple(dict.fromkeys(plain)),
            tuple(sorted(closings, key=len, reverse=True)),
            separate and first.startswith(bos),
        )

    def _writes(self, turns: Sequence[Message]) -> bool:
        """Whether it accepts these turns and writes the mark."""
        try:
            return _MARK in self.render(turns)
        except SkippedPrompt:
            return False

    def _around(self, turns: Sequence[Message]) -> tuple[str, str]:
        """What it writes before and after the mark; nothing if it refuses the turns or leaves out the mark."""
        try:
            before, mark, after = self.render(turns).partition(_MARK)
        except SkippedPrompt:
            return "", ""
        return (before, after) if mark else ("", "")

    def _header(self) -> str:
        """What it writes in front of a user turn that is not the first."""
        turns = [*self._two(), {"role": "user", "content": _MARK}]
        return self._around(turns)[0].partition(_OTHER)[2].removeprefix(self._closed())

    def _closed(self) -> str:
        """What it writes after an assistant's turn."""
        try:
            return self.render(self._two(), answer=False).partition(_OTHER)[2]
        except SkippedPrompt:
            return ""

    def _two(self) -> list[Message]:
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": _OTHER}]

    def _answer(self) -> str:
        """What it writes in front of the answer."""
        turns = [{"role": "user", "content": _MARK}]
        try:
            begun, ended = self.render(turns), self.render(turns, answer=False)
        except SkippedPrompt:
            return ""
        return begun.removeprefix(ended) if begun.startswith(ended) else ""


def open_template(
    tokenizer: PreTrainedTokenizerBase,
    *,
    required: bool,
    file: str | None = None,
    variables: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> ChatTemplate | None:
    """A chat template that renders a user turn, or None.

    Args:
        tokenizer: the model's.
        required: whether it is an error that there is none.
        file: a file with a template, in place of the tokenizer's own.
        variables: further variables of the template.
        date: today's date for the template, ISO 8601; None: the real one.

    Raises:
        UserError: there is none though it is required, the file cannot be read, or a variable is not one.
    """
    if taken := [name for name in variables or {} if name in _RESERVED]:
        raise UserError(f"chat_template_kwargs sets {taken[0]}, which is no variable of a template; leave it out")
    with_tools = None
    if file is None:
        try:
            source = str(tokenizer.get_chat_template())
            with_tools = str(tokenizer.get_chat_template(tools=[]))
        except ValueError as error:  # there is none, or several and no default
            if required:
                raise UserError("the tokenizer has no chat template; set chat_template to auto or false") from error
            return None
        whose, advice = "the tokenizer's chat template", "set chat_template to false"
    else:
        source, whose, advice = read_template(file), f"the chat template in {file}", "correct the file"
    template = ChatTemplate(tokenizer, source, date, variables or {}, with_tools)
    if not template.usable():
        if required:
            raise UserError(f"{whose} does not render a user turn; {advice}")
        _log.warning("%s does not render a user turn and is not used", whose)
        return None
    for name in variables or {}:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            _log.warning("chat_template_kwargs: %s reads no variable %r, which changes nothing", whose, name)
    return template


def read_template(file: str) -> str:
    """The text of a file with a chat template.

    Raises:
        UserError: it is not there, empty, or not UTF-8.
    """
    try:
        source = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{file}: the chat template cannot be read ({error.strerror}); correct chat_template_file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; save the chat template as UTF-8 text") from error
    if not source.strip():
        raise UserError(f"{file}: empty; expected a chat template in Jinja")
    return source


def content_mark(file: str) -> str:
    """The same text for the same template; errors as `read_template`."""
    return f"sha256:{hashlib.sha256(read_template(file).encode()).hexdigest()}"


def special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of special and other added tokens, without those of white space."""
    names = {*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_encoder", {})}
    return sorted(name for name in map(str, names) if name.strip())


def _with_fixed_date(template: str, day: str) -> str:
    """Replace a template's call for the date by the date, so that prompts do not change at midnight."""
    midnight = datetime.datetime.fromisoformat(day)
    return _DATE_CALL.sub(
        lambda call: json.dumps(midnight.strftime(call[1] or call[2] or ""), ensure_ascii=False), template
    )


def _with_parsed_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as mappings where they are JSON text."""

    def parsed(call: Any) -> Any:
        inner = call.get("function") if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
            return call
        found = spelt_out(inner["arguments"])
        return {**call, "function": {**inner, "arguments": found}} if isinstance(found, dict) else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [parsed(call) for call in calls]} if isinstance(calls, list) else message
