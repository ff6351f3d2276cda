"""Prompts to token ids: the chat template, special tokens, and a length that fits.

A prompt of more than `max_length` tokens loses as few characters as possible at the end of the last user's text, and is
rendered and tokenised again. So the template's tail (generation prompt and prefill) stays whole, and the ids are those
of the shorter text. Bisection finds the number of characters; it starts from a short text, so that a text of 10 MB is
never tokenised whole.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from jinja2 import TemplateError

from fisher_vmap.data.conversations import Message, SkippedPrompt, extract_prompt
from fisher_vmap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

MAX_LENGTH = 2048  # tokens of a prompt, by default
_MARK = "q7Zx probe"  # a text that no template contains
_FIRST_CUT = 8  # characters per token of max_length at which the search for a cut begins

# What a template raises: its own error, or that of an operation on a turn of an unexpected form.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")


class TokenizedPrompt(NamedTuple):
    """A prompt as token ids.

    Attributes:
        ids: token ids with special tokens; never empty.
        text: the text that was used, without template and system turn; of several turns, each after its role.
        truncated: whether the end of the last user's text was cut off.
        start: the number of the first token of the completion, which the ids end with; None: there is none.
        completion: its text.
    """

    ids: list[int]
    text: str
    truncated: bool
    start: int | None = None
    completion: str | None = None


class Renderer:
    """Turns prompts into token ids.

    Attributes:
        uses_template: whether prompts are rendered with the tokenizer's chat template.
        template_date: the date that the template writes into every prompt, ISO 8601, or None. As `date` it renders the
            same prompts alike on another day.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = MAX_LENGTH,
        chat_template: bool | Literal["auto"] = "auto",
        column: str | None = None,
        system_prompt: str | None = None,
        prefill: str | None = None,
        date: str | None = None,
    ) -> None:
        """Choose between the template and plain text, and try the choice on a short prompt.

        Args:
            tokenizer: the model's.
            max_length: most tokens of a prompt, template and special tokens included.
            chat_template: True, False, or "auto": use the template if it renders a user turn, but not for a column
                named "text".
            column: the column of the prompts, for "auto".
            system_prompt: system turn of every prompt; it replaces the prompt's own.
            prefill: text after the template's generation prompt.
            date: today's date for the template, ISO 8601; None: the real one.

        Raises:
            UserError: a template is missing or takes no system turn, or `max_length` leaves no room for a prompt.
        """
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._system_turns: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._prefill = prefill or ""
        self._template: str | None = None
        self.template_date: str | None = None
        if chat_template is True or (chat_template == "auto" and column != "text"):
            self._template, self.template_date = _usable_template(tokenizer, date, required=chat_template is True)
        self.uses_template = self._template is not None
        _log.info("prompts are %s", "rendered with the chat template" if self.uses_template else "taken as plain text")
        if self._template is None and (system_prompt or prefill):
            setting = "system_prompt" if system_prompt else "prefill"
            raise UserError(
                f"{setting} needs a chat template, and none is in use; remove it or set chat_template: true"
            )
        if self._template is not None and system_prompt:
            probe = [{"role": "system", "content": _MARK}, {"role": "user", "content": "a"}]
            if not _renders_mark(tokenizer, self._template, probe):
                raise UserError("the chat template takes no system turn; remove system_prompt")
        least = len(self._ids([*self._system_turns, {"role": "user", "content": "a"}]))
        if least > max_length:
            raise UserError(
                f"max_length {max_length} leaves no room for a prompt: one letter, with what the template and the "
                f"tokenizer put around it, takes {least} tokens; raise max_length"
            )

    def render(self, prompt: object) -> TokenizedPrompt:
        """Tokenise one prompt.

        Args:
            prompt: a text, which is one user turn of a template; or a conversation, which is used up to its last user
                turn. Without a template the turns' texts are joined by blank lines.

        Returns:
            The token ids, at most `max_length`.

        Raises:
            SkippedPrompt: it has no text or no tokens, the template refuses a turn, or the earlier turns leave no room
                for the last one.
        """
        extracted = extract_prompt(prompt)
        turns = [{"role": "user", "content": extracted}] if isinstance(extracted, str) else extracted
        text = turns[-1]["content"]
        earlier = turns[:-1]
        if self._system_turns:
            earlier = self._system_turns + [turn for turn in earlier if turn["role"] != "system"]
        length, ids = self._longest_fit(earlier, text)
        if not ids:
            raise SkippedPrompt("the text gives no tokens")
        spoken = [turn for turn in earlier if turn["role"] != "system"]
        if spoken:
            shown = [*spoken, {"role": "user", "content": text[:length]}]
            return TokenizedPrompt(ids, "\n\n".join(f"{t['role']}: {t['content']}" for t in shown), length < len(text))
        return TokenizedPrompt(ids, text[:length], length < len(text))

    def _longest_fit(self, earlier: list[Message], text: str) -> tuple[int, list[int]]:
        """The most characters of the last turn that fit into `max_length`, and the prompt's ids with them."""

        def ids_with(length: int) -> list[int]:
            return self._ids([*earlier, {"role": "user", "content": text[:length]}])

        fits, fitting_ids = 0, list[int]()
        length = min(len(text), _FIRST_CUT * self._max_length)
        while len(ids := ids_with(length)) <= self._max_length:
            if length == len(text):
                return length, ids
            fits, fitting_ids = length, ids
            length = min(len(text), 2 * length)
        if earlier and not fits and len(ids_with(1)) > self._max_length:
            raise SkippedPrompt(f"the turns before the last one leave no room for it in {self._max_length} tokens")
        too_long = length
        while too_long - fits > 1:
            length = (fits + too_long) // 2
            ids = ids_with(length)
            if len(ids) <= self._max_length:
                fits, fitting_ids = length, ids
            else:
                too_long = length
        if not text[:fits].strip():
            raise SkippedPrompt(f"what fits of the text into {self._max_length} tokens is only white space")
        return fits, fitting_ids

    def _ids(self, turns: list[Message]) -> list[int]:
        if self._template is None:
            text = "\n\n".join(turn["content"] for turn in turns)
        else:
            try:
                text = _rendered(self._tokenizer, self._template, turns) + self._prefill
            except _TEMPLATE_ERRORS as error:
                reason = " ".join(str(error).split())[:200]
                raise SkippedPrompt(f"the chat template refuses the conversation ({reason})") from error
        try:
            # A template writes the special tokens itself.
            encoded = self._tokenizer(
                text, add_special_tokens=self._template is None, padding=False, truncation=False, verbose=False
            )
        except Exception as error:
            if type(error) is not Exception:  # the `tokenizers` library raises exactly `Exception`
                raise
            raise SkippedPrompt(f"the tokenizer refuses the text ({error})") from error
        return list(encoded["input_ids"])


def _usable_template(
    tokenizer: PreTrainedTokenizerBase, date: str | None, *, required: bool
) -> tuple[str | None, str | None]:
    """The tokenizer's chat template if it renders a user turn, and the date that it writes, if any."""
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:  # there is none, or several and no default
        if required:
            raise UserError("the tokenizer has no chat template; set chat_template to auto or false") from error
        return None, None
    day = datetime.date.today().isoformat() if date is None else date
    dated = _with_fixed_date(template, day)
    if not _renders_mark(tokenizer, dated, [{"role": "user", "content": _MARK}]):
        if required:
            raise UserError("the tokenizer's chat template does not render a user turn; set chat_template to false")
        _log.warning("the tokenizer's chat template does not render a user turn and is not used")
        return None, None
    return dated, day if dated != template else None


def _with_fixed_date(template: str, day: str) -> str:
    """Replace a template's call for the date by the date, so that prompts do not change at midnight."""
    midnight = datetime.datetime.fromisoformat(day)
    return _DATE_CALL.sub(
        lambda call: json.dumps(midnight.strftime(call[1] or call[2] or ""), ensure_ascii=False), template
    )


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Message]) -> str:
    return str(
        tokenizer.apply_chat_template(list(turns), chat_template=template, add_generation_prompt=True, tokenize=False)
    )


def _renders_mark(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Message]) -> bool:
    """Whether the template accepts these turns and its output contains the mark."""
    try:
        return _MARK in _rendered(tokenizer, template, turns)
    except _TEMPLATE_ERRORS:
        return False
