"""Token ids back to text.

Tokenizers of bytes have tokens that are parts of characters. Decoded alone, each of them is U+FFFD, whatever its bytes.
So `Pieces.single` shows the bytes, "<0xE4><0xB8>", which come from the vocabulary: a piece of a byte-level tokenizer
spells them in GPT-2's alphabet, and one of SentencePiece's byte fallback is written "<0xE4>". A reading is taken only
if it decodes to what the tokenizer says.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # decoded from an incomplete character
ANY_OTHER = "(any other token)"
_MOST_BYTES = 8  # tokens of one character, at most
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# GPT-2's alphabet: bytes that are printable in Latin-1 stand for themselves, the others for letters from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))}


class Pieces:
    """The texts of tokens, with a cache.

    A token's text depends on its neighbours: SentencePiece drops the space of a first word, and a character outside
    ASCII may be several tokens. The texts of a prompt's tokens join to its text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}
        self._size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        anchor = tokenizer.encode("a", add_special_tokens=False)
        self._anchor: list[int] = list(anchor)[-1:]
        self._anchor_text = self._decode(self._anchor)

    def single(self, token: int) -> str:
        """One token's text after another word.

        Bytes that are no whole character are shown as "<0xE4><0xB8>"; where the tokenizer does not tell them, or has no
        such token, it is "<id 1234>". -1 is the outcome "any other token"; what pads has no text.
        """
        if token < 0:
            return ANY_OTHER if token == -1 else ""
        text, part = self._of(token)
        return text if part is None else _with_bytes(part) or f"<id {token}>"

    def each(self, ids: Sequence[int]) -> list[str]:
        """Each token's text; of a character's several tokens the last has the character, the others are empty."""
        found = [self._of(int(token)) for token in ids]
        texts = [text for text, _ in found]
        start = 0
        while start < len(ids):
            stop = start
            parts: list[bytes] = []
            while stop < len(ids) and (part := found[stop][1]) is not None:
                parts.append(part)
                stop += 1
            if parts:
                texts[start:stop] = _joined(parts) if all(parts) else self._joined_by_decoding(ids[start:stop])
            start = stop + 1
        return texts

    def _of(self, token: int) -> tuple[str, bytes | None]:
        """A token as it is decoded; and its bytes if they are no whole characters, b"" if they are not known."""
        if token not in self._known:
            if self._size is not None and token >= self._size:  # a model's vocabulary may be padded
                self._known[token] = f"<id {token}>", None
            else:
                text = self._decode([*self._anchor, token])
                text = text.removeprefix(self._anchor_text) if self._anchor else text
                self._known[token] = text, self._part(token, text)
        return self._known[token]

    def _part(self, token: int, text: str) -> bytes | None:
        if text and _UNFINISHED not in text:
            return None
        vocabulary = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        piece = vocabulary(token) if callable(vocabulary) else None
        for data in _readings(piece):
            if data and text in (data.decode("utf-8", "replace"), data.decode("utf-8", "ignore")):
                return data if _with_bytes(data) != data.decode("utf-8", "replace") else None
        if not text or (isinstance(piece, str) and _UNFINISHED in piece):  # the vocabulary's own U+FFFD
            return None
        return b""

    def _joined_by_decoding(self, ids: Sequence[int]) -> list[str]:
        """The texts of parts of characters whose bytes are not known: decoded together until they are whole."""
        texts = [self._of(int(token))[0] for token in ids]
        start: int | None = None
        for i in range(len(ids)):
            start = i if start is None or i - start >= _MOST_BYTES else start
            whole = self._decode([*self._anchor, *(int(token) for token in ids[start : i + 1])])
            if i > start and _UNFINISHED not in whole:
                texts[start:i] = [""] * (i - start)
                texts[i] = whole.removeprefix(self._anchor_text)
                start = None
        return texts

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _readings(piece: object) -> Iterator[bytes]:
    """What the vocabulary's entry may say of a token's bytes."""
    if isinstance(piece, bytes):
        yield piece
    elif isinstance(piece, str):
        if byte := _FALLBACK.fullmatch(piece):
            yield bytes.fromhex(byte[1])
        if set(piece) <= BYTE_OF.keys():
            yield bytes(BYTE_OF[letter] for letter in piece)


def _with_bytes(data: bytes) -> str:
    """Whole characters as they are, and the bytes of others as "<0xE4>"."""
    shown = ""
    while data:
        try:
            return shown + data.decode()
        except UnicodeDecodeError as error:
            shown += data[: error.start].decode() + "".join(f"<0x{byte:02X}>" for byte in data[error.start : error.end])
            data = data[error.end :]
    return shown


def _joined(parts: Sequence[bytes]) -> list[str]:
    """Each character at the token with its last byte; bytes that become none are U+FFFD at the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    for data in parts:
        if texts and not 0x80 <= data[0] < 0xC0:  # the beginning of a character: what came before has no end
            texts[-1] += decoder.decode(b"", True)
        texts.append(decoder.decode(data))
    texts[-1] += decoder.decode(b"", True)
    return texts
