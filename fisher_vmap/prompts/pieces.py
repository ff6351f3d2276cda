"""Token ids as text, one piece a token: what the pieces of a prompt join to is what was tokenised.

A token alone does not say its text: SentencePiece drops the space of a first word, and one letter outside ASCII may be
spread over several tokens of bytes.
"""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what decoding gives for a part of a letter
ANY_OTHER = "(any other token)"
_MOST_BYTES = 8  # tokens that one letter is spread over, at most


class Pieces:
    """The texts of tokens, remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        anchor = tokenizer.encode("a", add_special_tokens=False)
        self._anchor: list[int] = list(anchor)[-1:]
        self._anchor_text = self._decode(self._anchor)

    def single(self, token: int) -> str:
        """One token's text, as it stands after another word; a negative id stands for all tokens not listed."""
        if token < 0:
            return ANY_OTHER
        if token not in self._known:
            if self._size is not None and token >= self._size:  # the model's vocabulary is larger, as if padded
                self._known[token] = f"<{token}>"
                return self._known[token]
            text = self._decode([*self._anchor, token])
            self._known[token] = text.removeprefix(self._anchor_text) if self._anchor else text
        return self._known[token]

    def each(self, ids: Sequence[int]) -> list[str]:
        """Each token's text; of a letter spread over tokens the last has the letter, and those before it nothing."""
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
