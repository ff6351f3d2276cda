"""A prompt with its completion as tokens: where the completion begins and ends, with every kind of template."""

import logging

import pytest
from test_chat_template import FAMILIES, make

from fisher_vmap.data.conversations import SkippedPrompt
from fisher_vmap.data.render import Renderer

# Templates whose rendering of an answer is not the generation prompt and the answer.
THINKS = (  # as Qwen3's: the last answer gets an empty think block
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}[think][/think]{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BEGINS_TO_THINK = (  # as DeepSeek-R1's: the generation prompt opens a block that a given answer has not
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>[think]{% endif %}"
)
DROPS_THOUGHTS = (  # of the answer only what follows its thoughts
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('[/think]')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONLY_ASKING = (  # as Mistral's tools: the last user turn is written otherwise where an answer follows
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' and loop.last %}[asked]{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def parts(tokenizer, found):
    """The prompt's own tokens and the completion's, as text."""
    return tokenizer.decode(found.ids[: found.start]), tokenizer.decode(found.ids[found.start :])


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_template(family):
    template, bos = FAMILIES[family]
    tokenizer = make(template, bos)
    renderer = Renderer(tokenizer)
    for prompt in ("hi", [user("a"), {"role": "assistant", "content": "b"}, user("hi")]):
        found = renderer.render(prompt, "blue sky")
        own = renderer.render(prompt)
        turns = [user("hi")] if prompt == "hi" else list(prompt)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "blue sky"}], tokenize=False)
        assert tokenizer.decode(found.ids) == whole
        assert found.ids[: found.start] == own.ids[: found.start]
        assert parts(tokenizer, found)[1].strip().startswith("blue sky")
        assert (found.text, found.truncated, found.completion) == (own.text, False, "blue sky")


@pytest.mark.parametrize(
    ("template", "answer", "prompt", "completion"),
    [
        (THINKS, "yes", "<|user|>hi<|end|><|assistant|>", "[think][/think]yes<|end|>"),
        (BEGINS_TO_THINK, "yes", "<|user|>hi<|end|><|assistant|>", "yes<|end|>"),
        (BEGINS_TO_THINK, "[think]so[/think]yes", "<|user|>hi<|end|><|assistant|>[think]", "so[/think]yes<|end|>"),
        (DROPS_THOUGHTS, "[think]so[/think]yes", "<|user|>hi<|end|><|assistant|>", "yes<|end|>"),
        (ONLY_ASKING, "yes", "<|user|>hi<|end|><|assistant|>", "yes<|end|>"),
        (ONLY_ASKING, "q7Zy", "<|user|>hi<|end|><|assistant|>", "q7Zy<|end|>"),
    ],
)
def test_a_template_that_writes_an_answer_otherwise(template, answer, prompt, completion, caplog):
    tokenizer = make(template)
    with caplog.at_level(logging.INFO):
        found = Renderer(tokenizer).render("hi", answer)
    assert parts(tokenizer, found) == (prompt, completion)
    told = [r for r in caplog.records if "tokens of two answers part" in r.getMessage()]
    assert len(told) == (template == ONLY_ASKING)


@pytest.mark.parametrize(
    "prompt", ["The sky", "a\n\nb ", [user("u1"), {"role": "assistant", "content": "a"}, user("u")]]
)
@pytest.mark.parametrize("completion", [" is blue", "x", "\n"])
def test_without_a_template_the_tokens_are_appended(prompt, completion):
    tokenizer = make(None)
    renderer = Renderer(tokenizer)
    own = renderer.render(prompt)
    if not completion.strip():
        with pytest.raises(SkippedPrompt, match="the completion: only white space"):
            renderer.render(prompt, completion)
        return
    found = renderer.render(prompt, completion)
    assert found.ids == own.ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
    assert (found.start, found.text, found.completion) == (len(own.ids), own.text, completion)


@pytest.mark.parametrize("family", ["chatml", "llama3", None])
@pytest.mark.parametrize("completion", ["", "  \n", {"role": "assistant", "content": " "}])
def test_a_completion_of_white_space_is_none(family, completion):
    renderer = Renderer(make(*FAMILIES[family]) if family else make(None))
    with pytest.raises(SkippedPrompt, match=r"the completion: (empty text|only white space)"):
        renderer.render("hi", completion)


@pytest.mark.parametrize("family", ["chatml", "llama3", "plain", None])
@pytest.mark.parametrize("completion", ["yes", "a longer answer"])
def test_of_a_long_prompt_the_users_text_is_cut_and_the_completion_stays(family, completion):
    tokenizer = make(*FAMILIES[family]) if family else make(None)
    text = "x" * 500
    short = Renderer(tokenizer).render("x", completion)
    room = len(short.ids) + 20
    found = Renderer(tokenizer, max_length=room).render(text, completion)
    assert len(found.ids) == room and found.truncated and found.text == 21 * "x"
    assert parts(tokenizer, found)[1] == parts(tokenizer, short)[1]
    with pytest.raises(SkippedPrompt, match="no room for the text beside the completion in"):
        Renderer(tokenizer, max_length=len(short.ids) - 1).render(text, completion)


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_rendered_prompts_keep_their_end_and_get_the_tokens_appended(family):
    tokenizer = make(*FAMILIES[family])
    renderer = Renderer(tokenizer)
    for text in ("hi", "x" * 300):
        rendered = tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, tokenize=False)
        found = renderer.render(rendered, "yes")
        assert parts(tokenizer, found) == (rendered, "yes") and not found.truncated
        room = 120
        cut = Renderer(tokenizer, max_length=room).render(rendered, "yes")
        if text != "hi":
            own, completion = parts(tokenizer, cut)
            assert len(cut.ids) == room and cut.truncated and completion == "yes"
            assert own[-15:] == rendered[-15:] and rendered.startswith(own[:100])


def with_end(template):
    """Its turns end with the tokenizer's end-of-text token."""
    tokenizer = make(template)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize("template", [FAMILIES["chatml"][0], None])
@pytest.mark.parametrize(("answer", "shown"), [("yes", "yes"), ("yes<|im_end|>no", "yes"), ("a<|im_end|>", "a")])
def test_a_completion_ends_with_the_first_end_of_text_token(template, answer, shown):
    tokenizer = with_end(template)
    found = Renderer(tokenizer).render("hi", answer)
    ended = template is not None or answer != "yes"
    assert parts(tokenizer, found)[1] == shown + ("<|im_end|>" if ended else "") and found.completion == shown
    assert (found.ids[-1] == tokenizer.eos_token_id) == ended


@pytest.mark.parametrize("template", [FAMILIES["chatml"][0], FAMILIES["llama3"][0], None])
@pytest.mark.parametrize("answer", ["a<|im_end|>b", "<|user|>", "x</s>"])
def test_special_tokens_of_a_completion_taken_literally(template, answer):
    tokenizer = with_end(template)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    plain = Renderer(tokenizer, special_tokens_in_text="literal").render("hi", "x" * len(answer))
    found = Renderer(tokenizer, special_tokens_in_text="literal").render("hi", answer)
    n = len(answer)
    assert found.start == plain.start and len(found.ids) == len(plain.ids)
    assert not special & set(found.ids[found.start : found.start + n])
    assert tokenizer.decode(found.ids[found.start : found.start + n]) == answer and found.completion == answer
    parsed = Renderer(tokenizer).render("hi", answer)
    assert special & set(parsed.ids[parsed.start : parsed.start + n])


def test_a_completion_that_is_no_text():
    with pytest.raises(SkippedPrompt, match="the completion: character 0 of the text is not valid Unicode"):
        Renderer(make(None)).render("hi", "\ud800")
