"""From a data set's cell to token ids, and from token ids back to text.

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
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from fisher_vmap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """

    ids: list[int]
    text: str
    truncated: bool


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


_UNFINISHED = "\ufffd"  # decoded from an incomplete character
ANY_OTHER = "(any other token)"
_MOST_BYTES = 8  # tokens of one character, at most


class Pieces:
    """The texts of tokens, with a cache.

    A token's text depends on its neighbours: SentencePiece drops the space of a first word, and a character outside
    ASCII may be several tokens. The texts of a prompt's tokens join to its text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        anchor = tokenizer.encode("a", add_special_tokens=False)
        self._anchor: list[int] = list(anchor)[-1:]
        self._anchor_text = self._decode(self._anchor)

    def single(self, token: int) -> str:
        """One token's text after another word; a negative id is the outcome "any other token"."""
        if token < 0:
            return ANY_OTHER
        if token not in self._known:
            if self._size is not None and token >= self._size:  # a model's vocabulary may be padded
                self._known[token] = f"<{token}>"
                return self._known[token]
            text = self._decode([*self._anchor, token])
            self._known[token] = text.removeprefix(self._anchor_text) if self._anchor else text
        return self._known[token]

    def each(self, ids: Sequence[int]) -> list[str]:
        """Each token's text; of a character's several tokens the last has the character, the others are empty."""
        texts = [self.single(int(token)) for token in ids]
        start: int | None = None
        for i, text in enumerate(texts):
            if _UNFINISHED not in text:
                start = None
                continue
            start = i if start is None or i - start >= _MOST_BYTES else start
            whole = self._decode([*self._anchor, *(int(token) for token in ids[start : i + 1])])
            if i > start and _UNFINISHED not in whole:
                texts[start:i] = [""] * (i - start)
                texts[i] = whole.removeprefix(self._anchor_text)
                start = None
        return texts

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
