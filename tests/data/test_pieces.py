"""Tokens as text: the pieces of a prompt join to what was tokenised, whatever the tokenizer does to single tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fisher_vmap.data.pieces import Pieces

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
