"""Names of special tokens in a prompt's text as ordinary text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fisher_vmap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LiteralText:
    """Encodes texts in which the names of special tokens are ordinary text where a prompt has them.

    In a copy of the tokenizer each special token has another name, which no text holds. The template's own special
    tokens are given that name before encoding; those of a prompt's text are not, so that they match no token. All else
    is in one piece and unchanged: a text without special tokens has the same ids as ever.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        """Make the copy; `template` holds further names that are tokens of chats, if the tokenizer added them."""
        from tokenizers import Tokenizer

        core = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(core, Tokenizer):
            raise UserError(
                f"special_tokens_in_text: literal is not possible with a {type(tokenizer).__name__}, which is none of "
                "the tokenizers library; set it to parse"
            )
        parts = json.loads(core.to_str())
        salt = secrets.token_hex(4)
        self._renamed: dict[str, str] = {}
        for added in parts["added_tokens"]:
            name = added["content"]
            if name.strip() and (added["special"] or name in template):
                self._renamed[name] = added["content"] = f"\uf8f0{salt}{added['id']}\uf8f1"
        self._ids = {added["content"]: added["id"] for added in parts["added_tokens"]}
        model = parts["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {self._renamed.get(name, name): number for name, number in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[self._renamed.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token") in self._renamed:
            model["unk_token"] = self._renamed[model["unk_token"]]
        self._copy = Tokenizer.from_str(json.dumps(parts))
        self._copy.no_truncation()
        self._copy.no_padding()
        names = sorted(self._renamed, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._hidden = {
            f"q{salt}x{number}z": name for number, name in enumerate(names)
        }  # letters that any filter keeps
        self._hiding = {name: hidden for hidden, name in self._hidden.items()}
        self._marks = re.compile("|".join(self._hidden) or r"(?!)")
        probe = " Two  words,\n3.5 é\t"
        same = self._copy.encode(probe).ids == list(tokenizer(probe, verbose=False)["input_ids"])
        if not same or any(self._copy.token_to_id(name) != number for name, number in self._ids.items()):
            raise UserError(
                f"special_tokens_in_text: literal is not possible with this {type(tokenizer).__name__}, whose tokens "
                "cannot be renamed; set it to parse"
            )

    def hidden(self, value: Any) -> Any:
        """Turns or tools with a stand-in for each name of a special token."""
        if isinstance(value, str):
            return self._names.sub(lambda match: self._hiding[match[0]], value)
        if isinstance(value, Mapping):
            return {key: self.hidden(item) for key, item in value.items()}
        return [self.hidden(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a rendered text: what is hidden in it as ordinary text, other special tokens as those."""
        own = self._names.sub(lambda match: self._renamed[match[0]], text)
        plain = self._marks.sub(lambda match: self._hidden[match[0]], own)
        return list(self._copy.encode(plain, add_special_tokens=add_special_tokens).ids)
