"""Token ids back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
