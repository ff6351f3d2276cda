"""Prompts to token ids: the chat template, special tokens, and a length that fits.

A prompt of more than `max_length` tokens loses as few characters as possible at the end of the last user's text, and is
rendered and tokenised again. So the template's tail (generation prompt and prefill) stays whole, and the ids are those
of the shorter text. Bisection finds the number of characters; it starts from a short text, so that a text of 10 MB is
never tokenised whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fisher_vmap.data.chat_template import Frame, open_template
from fisher_vmap.data.conversations import (
    Conversation,
    Message,
    SkippedPrompt,
    arranged,
    as_answer,
    extract_prompt,
    text_of,
    turns_in_text,
)
from fisher_vmap.data.literal_text import LiteralText
from fisher_vmap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

MAX_LENGTH = 2048  # tokens of a prompt, by default
_OTHER_ANSWERS = ("q7Zx", "4 k")  # which begin with different tokens
_FIRST_CUT = 8  # characters per token of max_length at which the search for a cut begins


class TokenizedPrompt(NamedTuple):
    """A prompt as token ids.

    Attributes:
        ids: token ids with special tokens; never empty.
        text: the text that was used, without template and system turn; of several turns, each after its role; of a
            prompt that was rendered already, all of it.
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
        uses_template: whether prompts are rendered with a chat template.
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
        chat_template_file: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        system_turns: Literal["keep", "merge", "drop"] = "keep",
        special_tokens_in_text: Literal["parse", "literal"] = "parse",
        advice: str = "raise max_length",
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
            chat_template_file: a file with a template, in place of the tokenizer's own.
            chat_template_kwargs: further variables of the template, such as {"enable_thinking": False}.
            system_turns: "keep"; "merge": put them before the first user turn's text; "drop": leave out the prompt's
                own.
            special_tokens_in_text: "parse": the name of a special token in a prompt's text becomes that token;
                "literal": it is split as ordinary text is. The template and the prefill are always parsed.
            advice: what to do if `max_length` leaves no room for a prompt.

        Raises:
            UserError: a template is missing or takes no system turn, or `max_length` leaves no room for a prompt.
        """
        self._tokenizer = tokenizer
        self._bos: str = getattr(tokenizer, "bos_token", None) or ""
        self._max_length = max_length
        self._system_prompt, self._system_turns = system_prompt, system_turns
        self._prefill = prefill or ""
        self._said: set[str] = set()
        self._template, self._frame = None, Frame((), (), (), bos=False)
        own_file = chat_template_file is not None
        if own_file and chat_template is False:
            raise UserError("chat_template is false, but chat_template_file gives one; leave one of the two out")
        if own_file or chat_template is True or (chat_template == "auto" and column != "text"):
            self._template = open_template(
                tokenizer,
                required=own_file or chat_template is True,
                file=chat_template_file,
                variables=chat_template_kwargs,
                date=date,
            )
        self.template_date = self._template.date if self._template else None
        self.uses_template = self._template is not None
        _log.info("prompts are %s", "rendered with the chat template" if self.uses_template else "taken as plain text")
        needs = {"system_prompt": system_prompt, "prefill": prefill, "chat_template_kwargs": chat_template_kwargs}
        if self._template is None and (setting := next((name for name, value in needs.items() if value), None)):
            raise UserError(
                f"{setting} needs a chat template, and none is in use; remove it or set chat_template: true"
            )
        if self._template is not None:
            if system_prompt and system_turns != "merge" and not self._template.takes_system:
                raise UserError(
                    "the chat template takes no system turn; set system_turns to merge, or remove system_prompt"
                )
            self._frame = self._template.frame()
        self._literal: LiteralText | None = None
        if special_tokens_in_text == "literal":
            self._literal = LiteralText(tokenizer, self._template.source if self._template else "")
        least = len(self._ids(self._arranged([{"role": "user", "content": "a"}]), None))
        if least > max_length:
            raise UserError(
                f"max_length {max_length} leaves no room for a prompt: one letter, with what the template and the "
                f"tokenizer put around it, takes {least} tokens; {advice}"
            )

    def given(self, prompt: Any) -> Any:
        """A prompt as given in Python: a conversation that it spells as text, as JSON or as Python does, is read."""
        found = turns_in_text(prompt) if isinstance(prompt, str) else None
        if found is None:
            return prompt
        self._say("prompts that spell a list of turns are read as conversations")
        return found

    def render(self, prompt: object, completion: str | Message | None = None) -> TokenizedPrompt:
        """Tokenise one prompt, with its completion if one is given.

        With a template the completion is an assistant turn. It begins where the tokens of the conversation with that
        turn part from those of the prompt alone, and ends with the first end-of-text token. Without a template its
        tokens are appended to those of the prompt.

        Args:
            completion: a text or an assistant's message; None: there is none.
            prompt: a text, which is one user turn of a template; or a conversation, which is used up to its last user
                turn. Without a template the turns' texts are joined by blank lines. A text that begins with the
                beginning-of-text token, or as the template begins, is rendered already and is used as it is.

        Returns:
            The token ids, at most `max_length`.

        Raises:
            SkippedPrompt: it has no text or no tokens, the template refuses a turn, or the earlier turns leave no room
                for the last one.
        """
        answer = None if completion is None else as_answer(completion)
        extracted = extract_prompt(prompt)
        if isinstance(extracted, str):
            extracted = Conversation([{"role": "user", "content": extracted}])
        if self._is_rendered(extracted[-1]["content"]) and all(turn["role"] == "system" for turn in extracted[:-1]):
            system = bool(extracted[:-1] or self._system_prompt)
            return self._rendered_already(extracted[-1]["content"], answer, system=system)
        *earlier, last = self._arranged(extracted)
        text, tools = last["content"], extracted.tools
        if earlier or tools:
            self._tell_of_lost_turns([*earlier, {**last, "content": "a"}], tools)

        def turns_with(length: int) -> list[Message]:
            return [*earlier, {**last, "content": text[:length]}]

        crowd = [*(["the turns before the last one"] if earlier else []), *(["the completion"] if answer else [])]
        length, ids = self._longest_fit(
            text, lambda length: self._ids(turns_with(length), tools, answer), before=" and ".join(crowd)
        )
        shown, spoken = text[:length], [turn for turn in earlier if turn["role"] != "system"]
        if spoken:
            said = [*spoken, {"role": "user", "content": shown}]
            shown = "\n\n".join(f"{turn['role']}: {text_of(turn)}" for turn in said)
        found = TokenizedPrompt(ids, shown, length < len(text))
        if answer is None:
            return found
        return self._ended(found, self._start(ids, turns_with(length), tools, answer), answer)

    def _start(self, ids: list[int], turns: Sequence[Message], tools: list[Any] | None, answer: Message) -> int:
        """The number of the first token of a completion in the ids of a prompt with it."""
        if self._template is None:
            return len(self._ids(turns, tools))
        own = self._ids(turns, tools)
        start = _agreeing(own, ids)
        if start < _agreeing(own, self._ids(turns, tools, begun=False)):  # not even the prompt is written alike
            self._say(
                "the chat template writes a prompt otherwise where an answer follows: a completion begins where the "
                "tokens of two answers part"
            )
            others = (self._ids(turns, tools, {**answer, "content": other}) for other in _OTHER_ANSWERS)
            start = min(_agreeing(other, ids) for other in others)
        return start

    def _ended(self, found: TokenizedPrompt, start: int, answer: Message) -> TokenizedPrompt:
        """The prompt with its completion, which ends with the first end-of-text token."""
        ids, shown, end = found.ids, text_of(answer), getattr(self._tokenizer, "eos_token", None)
        ends = [i for i in range(start, len(ids)) if ids[i] == self._tokenizer.eos_token_id]
        if self._literal is None and end and end in shown:
            self._say(f"completions that hold {end} end there (special_tokens_in_text: literal takes it as text)")
            shown = shown.partition(end)[0]
        ids = ids[: ends[0] + 1] if ends else ids
        if not 0 < start < len(ids):
            raise SkippedPrompt("the completion gives no tokens of its own")
        return found._replace(ids=ids, start=start, completion=shown)

    def _arranged(self, turns: Sequence[Message]) -> list[Message]:
        if self._system_turns != "keep" and any(turn["role"] == "system" for turn in turns):
            done = "merged into the first user turn" if self._system_turns == "merge" else "dropped"
            self._say(f"system turns are {done} (system_turns: {self._system_turns})")
        return arranged(turns, self._system_turns, self._system_prompt)

    def _is_rendered(self, text: str) -> bool:
        begun = text.lstrip()
        return (
            self._literal is None
            and self._template is not None
            and (bool(self._bos and begun.startswith(self._bos)) or self._frame.wrote(begun))
        )

    def _rendered_already(self, text: str, answer: Message | None, *, system: bool) -> TokenizedPrompt:
        """The tokens of a text that a template has written; of a long one the template's end stays whole.

        Those of a completion are appended. `system` is whether there is a system turn besides, which has no place.
        """
        self._say(
            "prompts that begin as the chat template does, or with the tokenizer's beginning-of-text token, are "
            "rendered already and taken as they are (special_tokens_in_text: literal renders them as a user's text)"
        )
        end = self._frame.end(text)
        body, tail = text[:end], text[end:]
        if not tail:
            self._say(
                "a rendered prompt does not end where the answer begins"
                + (f" ({self._frame.closings[-1]!r})" if self._frame.closings else "")
                + ": nothing is added to it"
            )
        if system or (self._prefill and not tail):
            self._say("a system turn, and a prefill after no such end, are not added to rendered prompts")
        front = self._bos if self._frame.bos and not body.lstrip().startswith(self._bos) else ""
        tail += self._prefill if tail else ""
        added = [] if answer is None else self._encoded(text_of(answer), add_special_tokens=False)

        def ids_with(length: int) -> list[int]:
            return self._encoded(front + body[:length] + tail, add_special_tokens=False) + added

        length, ids = self._longest_fit(body, ids_with, before="the completion" if added else "")
        found = TokenizedPrompt(ids, body[:length] + text[end:], length < len(body))
        return found if answer is None else self._ended(found, len(ids) - len(added), answer)

    def _longest_fit(self, text: str, ids_with: Callable[[int], list[int]], before: str) -> tuple[int, list[int]]:
        """The most characters of a text that fit into `max_length`, and the prompt's ids with them.

        Args:
            text: the text that may be cut.
            ids_with: the ids with so many characters of it.
            before: what else may leave no room; empty: nothing.
        """
        fits, fitting_ids = 0, list[int]()
        length = min(len(text), _FIRST_CUT * self._max_length)
        while len(ids := ids_with(length)) <= self._max_length:
            if length == len(text):
                return length, _not_empty(ids)
            fits, fitting_ids = length, ids
            length = min(len(text), 2 * length)
        if before and not fits and len(ids_with(1)) > self._max_length:
            raise SkippedPrompt(f"no room for the text beside {before} in {self._max_length} tokens")
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
        return fits, _not_empty(fitting_ids)

    def _ids(
        self, turns: Sequence[Message], tools: list[Any] | None, answer: Message | None = None, *, begun: bool = True
    ) -> list[int]:
        """The ids of turns and the answer; without one, `begun` says whether they end where it begins."""
        if self._literal is not None:
            turns, tools, answer = (self._literal.hidden(each) for each in (turns, tools, answer))
        if self._template is None:
            ids = self._encoded("\n\n".join(map(text_of, turns)), add_special_tokens=True)
            return ids if answer is None else ids + self._encoded(text_of(answer), add_special_tokens=False)
        # A template writes the special tokens itself.
        if answer is not None:
            return self._encoded(self._template.render([*turns, answer], tools, answer=False), add_special_tokens=False)
        rendered = self._template.render(turns, tools, answer=begun)
        return self._encoded(rendered + (self._prefill if begun else ""), add_special_tokens=False)

    def _encoded(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            if self._literal is not None:
                ids = self._literal.encode(text, add_special_tokens)
            else:
                encoded = self._tokenizer(
                    text, add_special_tokens=add_special_tokens, padding=False, truncation=False, verbose=False
                )
                ids = list(encoded["input_ids"])
        except Exception as error:
            if type(error) is not Exception:  # the `tokenizers` library raises exactly `Exception`
                raise
            raise SkippedPrompt(f"the tokenizer refuses the text ({error})") from error
        while self._bos and ids[:2] == 2 * [self._tokenizer.bos_token_id]:
            self._say(f"prompts would begin with {self._bos} twice: one is enough")
            ids = ids[1:]
        return ids

    def _tell_of_lost_turns(self, turns: Sequence[Message], tools: list[Any] | None) -> None:
        """Say once for each kind what the template leaves out."""
        if self._template is None:
            return
        text = self._template.render(turns, tools)
        for turn in turns:
            content = (turn["content"] or "").strip()
            if content and content not in text:
                asked = " (system_turns: merge puts it into the first user turn)" if turn["role"] == "system" else ""
                self._say(f"the chat template does not write all text of {turn['role']} turns{asked}")
            for call in turn.get("tool_calls") or []:
                if str(call.get("function", call).get("name")) not in text:
                    self._say("the chat template does not write tool calls")
        names = [tool.get("function", tool).get("name") for tool in tools or [] if isinstance(tool, dict)]
        if not all(str(name) in text for name in names):
            self._say("the chat template does not write the tools of a conversation")

    def _say(self, line: str) -> None:
        """Tell what was decided, once for all prompts."""
        if line not in self._said:
            self._said.add(line)
            _log.info("%s", line)


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise SkippedPrompt("the text gives no tokens")
    return ids
