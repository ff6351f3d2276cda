"""Chat templates: prompts that are rendered already, turns that a template refuses, calls, variables, and files."""

import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fisher_vmap.data.conversations import SkippedPrompt
from fisher_vmap.data.render import Renderer
from fisher_vmap.errors import UserError

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As SmolLM2's, whose turns begin with its beginning-of-text token; and Qwen's, whose vocabulary has no such token.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}<|head|>system<|tail|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
# As Llama 2's: its brackets are ordinary text.
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_start|>", "<|im_end|>",
           "<|head|>", "<|tail|>", "<start_of_turn>", "<end_of_turn>"]  # fmt: skip
FAMILIES = {
    "plain": (PLAIN, "<s>"),
    "chatml": (CHATML, None),
    "smollm2": (CHATML, "<|im_start|>"),
    "llama3": (LLAMA3, "<s>"),
    "llama2": (LLAMA2, "<s>"),
    "gemma": (GEMMA, "<s>"),
}


def make(template, bos="<s>", *, adds_bos=True):
    """One token a byte and one for each special token; like most, it puts its first token before a plain text."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos and adds_bos:
        special = [(bos, core.token_to_id(bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def written(tokenizer, turns, **options):
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **options)


@pytest.mark.parametrize("bos", ["as it is", "without"])
@pytest.mark.parametrize("turns", [[user("hi")], [system("Be."), user("hi")], [user("a"), answer("b"), user("hi")]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_text_is_not_rendered_again(family, turns, bos, caplog):
    template, token = FAMILIES[family]
    tokenizer = make(template, token)
    if family in ("llama2", "gemma") and turns[0]["role"] == "system":
        return
    text = written(tokenizer, turns)
    once = tokenizer(text, add_special_tokens=False)["input_ids"]
    if bos == "without" and token and family != "smollm2":
        text = text.removeprefix(token)
    with caplog.at_level(logging.INFO):
        renderer = Renderer(tokenizer)
        assert renderer.render(text).ids == once
        for again in (renderer.render(text), renderer.render([system("Be."), user(text)])):
            assert again[:3] == (once, text, False) and again.start is None
        assert (
            renderer.render("hi").ids
            == tokenizer(written(tokenizer, [user("hi")]), add_special_tokens=False)["input_ids"]
        )
    assert caplog.text.count("rendered already") == 1
    assert "nothing is added" not in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    ["hi", "system: hi", "user\nhi", "[1] hi", "[INST] is a mark of a template", "Today: rain", "x<s>", "assistant"],
)
def test_a_users_text_is_rendered_whatever_it_mentions(family, text):
    tokenizer = make(*FAMILIES[family])
    expected = tokenizer(written(tokenizer, [user(text)]), add_special_tokens=False)["input_ids"]
    assert Renderer(tokenizer).render(text).ids == expected


def test_the_day_of_a_rendered_text_does_not_matter():
    tokenizer = make(LLAMA3)
    text = Renderer(tokenizer, date="2024-07-26").render([user("hi")])
    old = tokenizer.decode(text.ids)
    assert "26 Jul 2024" in old
    assert Renderer(tokenizer).render(old).ids == text.ids


@pytest.mark.parametrize("text", ["<s>hi", "<s> hi <s>", "<s><s>hi", " <s>hi"])
def test_a_text_never_begins_with_two_beginnings(text, caplog):
    plain, chat = make(None), make(PLAIN)
    once = plain(text.strip().removeprefix("<s><s>").removeprefix("<s>"))["input_ids"]
    with caplog.at_level(logging.INFO):
        if not text.startswith(" "):
            assert Renderer(plain).render(text).ids == once
            assert Renderer(chat).render(text).ids == once
    ids = Renderer(chat).render(text).ids
    assert ids.count(plain.bos_token_id) == text.count("<s>") - text.startswith("<s><s>")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [PLAIN, "{{ bos_token }}" + PLAIN, LLAMA2])
def test_a_template_that_writes_the_beginning_and_a_tokenizer_that_adds_it(template, adds_bos):
    tokenizer = make(template, adds_bos=adds_bos)
    for prompt in ("hi", [user("a"), answer("b"), user("c")]):
        ids = Renderer(tokenizer).render(prompt).ids
        assert ids[0] == tokenizer.bos_token_id != ids[1]


def test_a_rendered_text_without_its_end_is_told_and_left_as_it_is(caplog):
    tokenizer = make(PLAIN)
    for text in ("<s><|user|>hi<|end|>", "<|user|>hi<|end|><|assistant|>Sure", "<s>Once upon"):
        with caplog.at_level(logging.INFO):
            ids = Renderer(tokenizer, prefill="So").render(text).ids
        assert tokenizer.decode(ids) == "<s>" + text.removeprefix("<s>")
        assert "does not end where the answer begins ('<|assistant|>')" in caplog.text
        assert "a prefill after no such end" in caplog.text
    ids = Renderer(tokenizer, prefill="So").render("<s><|user|>hi<|end|><|assistant|>").ids
    assert tokenizer.decode(ids).endswith("hi<|end|><|assistant|>So")


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_long_rendered_text_the_template_s_end_stays(family):
    tokenizer = make(*FAMILIES[family])
    text = written(tokenizer, [user("the cat " * 99)])
    whole, end = tokenizer(text, add_special_tokens=False)["input_ids"], text[text.rindex("the cat") + 7 :].strip()
    rendered = Renderer(tokenizer, max_length=90).render(text)
    assert len(rendered.ids) == 90 < len(whole) and rendered.truncated
    assert rendered.text.endswith(end) or rendered.text.rstrip().endswith(end)
    assert rendered.ids[:40] == whole[:40]
    assert Renderer(tokenizer, max_length=90).render(rendered.text).ids == rendered.ids


@pytest.mark.parametrize("family", ["llama2", "gemma"])
def test_a_template_without_system_turns(family, caplog):
    tokenizer = make(*FAMILIES[family])
    turns = [system("Be kind."), user("hi")]
    with pytest.raises(SkippedPrompt, match=r"takes no system turn: set system_turns to merge or drop"):
        Renderer(tokenizer).render(turns)
    with caplog.at_level(logging.INFO):
        merged, dropped = (Renderer(tokenizer, system_turns=how) for how in ("merge", "drop"))
        for _ in range(2):
            assert merged.render(turns).ids == merged.render([user("Be kind.\n\nhi")]).ids
            assert dropped.render([{**turns[0], "role": "developer"}, user("hi")]).ids == dropped.render("hi").ids
    assert caplog.text.count("merged into the first user turn") == caplog.text.count("are dropped") == 1
    with pytest.raises(UserError, match="system_turns to merge"):
        Renderer(tokenizer, system_prompt="Be kind.")
    assert (
        Renderer(tokenizer, system_prompt="Be kind.", system_turns="merge").render("hi").ids == merged.render(turns).ids
    )


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
AS_JSON = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}={{ c.function.arguments ARGUMENTS }}{% endfor %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}<|end|>{% endfor %}<|assistant|>"
)
ENCODING, RAW = CALLS.replace("ARGUMENTS", "| tojson"), CALLS.replace("ARGUMENTS", "")
TURNS = [user("what?"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "content": "blue", "tool_call_id": "7"}, user("and?")]  # fmt: skip


def test_calls_and_their_results_are_what_the_template_makes_of_them(caplog):
    tokenizer = make(ENCODING)
    expected = tokenizer(written(tokenizer, TURNS), add_special_tokens=False)["input_ids"]
    rendered = Renderer(tokenizer).render(TURNS)
    assert rendered.ids == expected
    assert 'look={"at": "sky"}<|end|><|tool|>blue#7<|end|>' in tokenizer.decode(expected)
    assert rendered.text == 'user: what?\n\nassistant: look({"at": "sky"})\n\ntool: blue\n\nuser: and?'
    # As OpenAI's interface has them: JSON in JSON only where the template wants a text.
    as_json = [TURNS[0], {**TURNS[1], "tool_calls": [AS_JSON]}, *TURNS[2:]]
    assert Renderer(tokenizer).render(as_json).ids == expected
    raw = make(RAW)
    assert 'look={"at": "sky"}' in raw.decode(Renderer(raw).render(as_json).ids)
    plain = Renderer(make(None)).render(TURNS)
    assert make(None).decode(plain.ids) == '<s>what?\n\nlook({"at": "sky"})\n\nblue\n\nand?'


def test_tools_reach_the_template(caplog):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    tokenizer = make(ENCODING)
    request = {"messages": TURNS, "tools": [tool]}
    expected = tokenizer(written(tokenizer, TURNS, tools=[tool]), add_special_tokens=False)["input_ids"]
    assert Renderer(tokenizer).render(request).ids == expected
    two = make({"default": PLAIN, "tool_use": ENCODING})
    assert Renderer(two).render(request).ids == expected
    assert Renderer(two).render("hi").ids == Renderer(make(PLAIN)).render("hi").ids
    with caplog.at_level(logging.INFO):
        for prompt in (request, request):
            Renderer(make(PLAIN)).render(prompt)
    for line in ("does not write tool calls", "does not write the tools of a conversation"):
        assert line in caplog.text


def test_turns_that_a_template_leaves_out_are_told_of_once(caplog):
    tokenizer = make(
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    )
    renderer = Renderer(tokenizer)
    with caplog.at_level(logging.INFO):
        for text in ("one", "two"):
            renderer.render([system("Be."), user(text), answer("x"), {"role": "tool", "content": "blue"}, user("b")])
    assert caplog.text.count("does not write all text of system turns (system_turns: merge") == 1
    assert caplog.text.count("does not write all text of tool turns") == 1
    assert "assistant turns" not in caplog.text


THINKING = PLAIN.replace(
    "<|assistant|>{%", "<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{%"
)


def test_variables_of_the_template(caplog):
    tokenizer = make(THINKING)
    for variables in ({"enable_thinking": False}, {"enable_thinking": True}, {"bos_token": "<|end|>"}):
        expected = tokenizer(written(tokenizer, [user("hi")], **variables), add_special_tokens=False)["input_ids"]
        assert Renderer(tokenizer, chat_template_kwargs=variables).render("hi").ids == expected
    assert "reads no variable" not in caplog.text
    Renderer(tokenizer, chat_template_kwargs={"enable_thinkng": False})
    assert "reads no variable 'enable_thinkng'" in caplog.text
    for name in ("tokenize", "messages", "add_generation_prompt"):
        with pytest.raises(UserError, match=f"chat_template_kwargs sets {name}"):
            Renderer(tokenizer, chat_template_kwargs={name: True})
    with pytest.raises(UserError, match="chat_template_kwargs needs a chat template"):
        Renderer(make(None), chat_template_kwargs={"enable_thinking": False})


def test_a_template_from_a_file(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("<|user|>{{ messages[0].content }}<|end|>", encoding="utf-8")
    for tokenizer in (make(PLAIN), make(None)):
        for column in ("prompt", "text"):
            renderer = Renderer(tokenizer, chat_template_file=str(file), column=column)
            assert tokenizer.decode(renderer.render("hi").ids) == "<|user|>hi<|end|>"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {}, ["own.jinja", "cannot be read", "chat_template_file"]),
        (b"", {}, ["own.jinja", "empty"]),
        (b"\xff", {}, ["own.jinja", "UTF-8"]),
        (b"{% for", {}, ["own.jinja", "does not render a user turn", "correct the file"]),
        (b"Hello", {}, ["own.jinja", "does not render a user turn"]),
        (b"{{ messages }}", {"chat_template": False}, ["chat_template is false", "leave one"]),
    ],
)
def test_a_file_that_holds_no_template(content, options, words, tmp_path):
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(UserError) as error:
        Renderer(make(PLAIN), chat_template_file=str(tmp_path / "own.jinja"), **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
