"""From prompts to token ids: the template applied once, the cut of long prompts, what is refused and skipped."""

import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fisher_vmap.data.conversations import SkippedPrompt
from fisher_vmap.data.render import Renderer
from fisher_vmap.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
DROPS_SYSTEM = TEMPLATE.replace(
    "<|{{ m['role'] }}|>", "{% if m['role'] == 'system' %}{% continue %}{% endif %}<|user|>"
)
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}" + TEMPLATE
CORPUS = ["the cat sat on the mat and the dog ran after the ball", "hello world, how are you today? éàü 你好 👋🏽"]
SPECIAL = ["<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


@pytest.fixture(scope="module")
def backend() -> str:
    """A byte-level BPE, as most models have, that puts <s> before a plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


@pytest.fixture
def make(backend):
    def build(template=TEMPLATE):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), bos_token="<s>")
        tokenizer.chat_template = template
        return tokenizer

    return build


def user(text):
    return {"role": "user", "content": text}


def test_a_chat_prompt_is_what_transformers_makes_of_it(make):
    tokenizer = make()
    rendered = Renderer(tokenizer).render("hello world")
    expected = tokenizer.apply_chat_template([user("hello world")], add_generation_prompt=True)["input_ids"]
    assert rendered.ids == expected
    assert rendered.ids.count(0) == 1  # one <s>
    assert tokenizer.decode(rendered.ids) == "<s><|user|>hello world<|end|><|assistant|>"
    assert (rendered.text, rendered.truncated) == ("hello world", False)


def test_plain_text_gets_the_tokenizers_own_special_tokens(make):
    tokenizer = make(None)
    rendered = Renderer(tokenizer).render("hello world")
    assert rendered.ids == tokenizer("hello world")["input_ids"]
    assert rendered.ids[0] == 0


@pytest.mark.parametrize(
    ("template", "choice", "column", "used"),
    [
        (TEMPLATE, "auto", "prompt", True),
        (TEMPLATE, "auto", None, True),
        (TEMPLATE, "auto", "text", False),
        (TEMPLATE, True, "text", True),
        (TEMPLATE, False, "prompt", False),
        (None, "auto", "prompt", False),
        ("{{ bos_token }}", "auto", "prompt", False),
        ("{{ raise_exception('never') }}", "auto", "prompt", False),
        ("{% for", "auto", "prompt", False),
        ("{{ messages.nothing.at_all }}", "auto", "prompt", False),
        ({"tools": TEMPLATE}, "auto", "prompt", False),
        ({"default": TEMPLATE, "tools": "x"}, "auto", "prompt", True),
    ],
)
def test_when_the_template_is_used(make, template, choice, column, used):
    assert Renderer(make(template), chat_template=choice, column=column).uses_template is used


def test_system_prompt_and_prefill(make):
    tokenizer = make()
    renderer = Renderer(tokenizer, system_prompt="be kind", prefill="Sure,")
    ids = renderer.render([{"role": "system", "content": "be rude"}, user("hello")]).ids
    assert tokenizer.decode(ids) == "<s><|system|>be kind<|end|><|user|>hello<|end|><|assistant|>Sure,"


def test_a_conversation_keeps_its_turns_and_ends_with_the_user(make):
    tokenizer = make()
    turns = [
        user("one"),
        {"role": "assistant", "content": "two"},
        user("three"),
        {"role": "assistant", "content": "four"},
    ]
    rendered = Renderer(tokenizer).render(turns)
    assert tokenizer.decode(rendered.ids) == (
        "<s><|user|>one<|end|><|assistant|>two<|end|><|user|>three<|end|><|assistant|>"
    )
    assert rendered.text == "user: one\n\nassistant: two\n\nuser: three"
    plain = Renderer(tokenizer, chat_template=False).render(turns)
    assert plain.ids == tokenizer("one\n\ntwo\n\nthree")["input_ids"]


def test_the_date_in_a_template_is_pinned(make):
    tokenizer = make(DATED)
    renderer = Renderer(tokenizer, date="2024-07-26")
    assert tokenizer.decode(renderer.render("hello").ids).startswith("26 Jul 2024\n<s>")
    assert renderer.template_date == "2024-07-26"
    today = Renderer(tokenizer)
    expected = tokenizer.apply_chat_template([user("hello")], add_generation_prompt=True)["input_ids"]
    assert today.render("hello").ids == expected
    assert Renderer(make()).template_date is None


@pytest.mark.parametrize(
    ("template", "arguments", "words"),
    [
        (None, {"chat_template": True}, ["no chat template", "chat_template"]),
        ("{{ bos_token }}", {"chat_template": True}, ["does not render", "chat_template"]),
        (None, {"system_prompt": "x"}, ["system_prompt", "chat template"]),
        (None, {"prefill": "x"}, ["prefill", "chat template"]),
        (TEMPLATE, {"system_prompt": "x", "column": "text"}, ["system_prompt", "chat_template: true"]),
        (NO_SYSTEM, {"system_prompt": "x"}, ["takes no system turn"]),
        (DROPS_SYSTEM, {"system_prompt": "x"}, ["takes no system turn"]),
        (TEMPLATE, {"max_length": 4}, ["max_length 4", "5 tokens"]),
        (TEMPLATE, {"prefill": "Sure, " * 99, "max_length": 50}, ["max_length 50"]),
        (None, {"max_length": 1}, ["max_length 1", "2 tokens"]),
    ],
)
def test_choices_that_cannot_work(make, template, arguments, words):
    with pytest.raises(UserError) as error:
        Renderer(make(template), **arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [
        (TEMPLATE, "", "empty"),
        (TEMPLATE, " \n\t", "white space"),
        (TEMPLATE, None, "null"),
        (TEMPLATE, 3, "int"),
        (TEMPLATE, [], "user turn"),
        (TEMPLATE, [{"role": "assistant", "content": "hi"}], "user turn"),
        (TEMPLATE, "half a pair \ud83d", "Unicode"),
        (TEMPLATE, [{"role": "system", "content": "\ud83d"}, user("hi")], "Unicode"),
        (TEMPLATE, [user("the cat " * 99), user("hi")], "no room"),
        (TEMPLATE, 999 * " " + "hi", None),
        (None, 999 * "\n" + "hi", "white space"),
        (NO_SYSTEM, [{"role": "system", "content": "be kind"}, user("hi")], "refuses"),
    ],
)
def test_prompts_that_are_skipped(make, template, prompt, reason):
    renderer = Renderer(make(template), max_length=40)
    if reason is None:  # the template trims the white space away
        assert renderer.render(prompt).truncated is False
        return
    with pytest.raises(SkippedPrompt, match=reason):
        renderer.render(prompt)


def test_a_text_that_gives_no_tokens_is_skipped():
    vanishing = Tokenizer(models.BPE({"a": 0}, []))  # without an unknown token, BPE drops what it does not know
    with pytest.raises(SkippedPrompt, match="no tokens"):
        Renderer(PreTrainedTokenizerFast(tokenizer_object=vanishing)).render("zzz")
    refusing = Tokenizer(models.WordLevel({"a": 0}))  # and WordLevel refuses it
    with pytest.raises(SkippedPrompt, match="refuses the text"):
        Renderer(PreTrainedTokenizerFast(tokenizer_object=refusing)).render("zzz")


def random_text(generator: random.Random, length: int) -> str:
    return "".join(generator.choice("thecatsonm  \né你👋🏽") for _ in range(length)) + "end"


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("seed", range(12))
def test_a_long_prompt_loses_the_end_of_the_users_text_only(make, template, seed):
    generator = random.Random(seed)
    tokenizer, max_length = make(template), generator.randrange(12, 60)
    renderer = Renderer(tokenizer, max_length=max_length, prefill="Sure" if template else None)
    text = random_text(generator, generator.choice([50, 300, 5000]))
    rendered = renderer.render(text)
    whole = Renderer(tokenizer, max_length=10**6, prefill="Sure" if template else None)
    assert rendered.truncated == (len(whole.render(text).ids) > max_length)
    assert len(rendered.ids) <= max_length
    assert text.startswith(rendered.text)
    assert rendered.ids == whole.render(rendered.text).ids
    if template:
        assert tokenizer.decode(rendered.ids).endswith("<|end|><|assistant|>Sure")
    if rendered.truncated:
        assert len(whole.render(text[: len(rendered.text) + 1]).ids) > max_length  # no character was lost in vain


def test_a_prompt_of_exactly_max_length_is_not_cut(make):
    tokenizer = make()
    length = len(Renderer(tokenizer).render("the cat sat on the mat").ids)
    assert Renderer(tokenizer, max_length=length).render("the cat sat on the mat").truncated is False
    assert Renderer(tokenizer, max_length=length - 1).render("the cat sat on the mat").truncated is True


def test_the_end_of_the_last_turn_is_cut_and_earlier_turns_stay(make):
    tokenizer = make()
    rendered = Renderer(tokenizer, max_length=30).render(
        [user("one"), {"role": "assistant", "content": "two"}, user("the cat " * 99)]
    )
    assert tokenizer.decode(rendered.ids).startswith("<s><|user|>one<|end|><|assistant|>two<|end|><|user|>the cat the")
    assert len(rendered.ids) == 30
    assert rendered.truncated


def test_a_prompt_of_ten_megabytes_is_not_tokenised_whole(make):
    class Counting(PreTrainedTokenizerFast):
        characters = 0

        def __call__(self, text, **options):
            Counting.characters += len(text)
            return super().__call__(text, **options)

    tokenizer = Counting(tokenizer_object=make()._tokenizer, bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    renderer = Renderer(tokenizer, max_length=2048)
    started = time.perf_counter()
    rendered = renderer.render("the cat " * 1_250_000)
    assert len(rendered.ids) == 2048
    assert Counting.characters < 1_000_000
    assert time.perf_counter() - started < 5


def test_a_tokenizers_own_truncation_and_padding_are_off(make):
    tokenizer = make(None)
    tokenizer._tokenizer.enable_truncation(4)
    tokenizer._tokenizer.enable_padding(length=64)
    text = "the cat sat on the mat"
    assert len(Renderer(tokenizer).render(text).ids) == len(make(None)(text)["input_ids"])
