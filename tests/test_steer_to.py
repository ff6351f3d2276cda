"""`fisher-vmap steer-to`: the file is `natural_step`'s step, and what is printed is what plain passes give."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from command_cases import (
    VOCABULARY,
    real_command,
    save_model,
    tiny_tokenizer,
    write_prompts,
)
from models import tiny, word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fisher_vmap
from fisher_vmap import FisherModel, Step, natural_step, steer
from fisher_vmap.before_after import used
from fisher_vmap.cli import main as fisher_vmap_main
from fisher_vmap.cli import usage
from fisher_vmap.errors import UserError
from fisher_vmap.run.settings import Settings
from fisher_vmap.steer_to import _tokens, main
from fisher_vmap.steer_to_flags import SETTINGS

pytestmark = pytest.mark.usefixtures("no_power_cuts")

PROMPT, OTHER = "the quick brown fox", "a lazy dog"
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family a model folder with a tokenizer of bytes."""
    found = {}
    for family in BLOCKS:
        model = tiny(family, torch.float32, vocab_size=VOCABULARY)
        found[family] = save_model(tmp_path_factory.mktemp(family) / "model", model)
    return found


@pytest.fixture
def folder(folders, tmp_path, monkeypatch):
    """The llama's; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    return folders["llama"]


def words(folder, *more, prompt=PROMPT, towards="e", kl=1e-3, layer=1, tokens=0):
    """The words of a command line."""
    own = ["--prompt", prompt] if prompt is not None else []
    own += ["--towards", towards] if towards is not None else []
    common = f"--hook_layer_name {layer} --kl {kl} --tokens {tokens} --dtype float32 --device cpu".split()
    return ["--model_path", str(folder), *own, *common, *map(str, more)]


def told(capsys):
    """What a command has printed: the names of lines -> what stands behind; and all of it."""
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return {line[:15].strip(): line[15:] for line in text.splitlines() if line[:15].strip()}, text


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(prompt):
    """A prompt as the tokenizer's chat template renders it."""
    return tiny_tokenizer().encode(f"<|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False)


def token(text):
    (found,) = tiny_tokenizer().encode(text, add_special_tokens=False)
    return found


def log_p(model, ids, layer=None, step=None, mask=None, targets=(-1,)):
    """[m, V] float64: log-probabilities by a plain pass, with a step added by a plain hook at the places of a mask."""
    handle = None
    if step is not None:
        where = torch.ones(len(ids)) if mask is None else torch.tensor(mask, dtype=torch.float32)
        added = where[:, None] * step
        handle = model.get_submodule(layer).register_forward_hook(
            lambda _m, _i, out: out + added if isinstance(out, torch.Tensor) else (out[0] + added, *out[1:])
        )
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, list(targets)].double().log_softmax(1)
    finally:
        if handle is not None:
            handle.remove()


def kl_of(p, q):
    return float((p.exp() * (p - q)).sum())


def number(text):
    return [float(found) for found in re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e[-+]?\d+)?", text)]


# The step and the numbers


@pytest.mark.parametrize("positions", ["all", "last", "prompt"])
@pytest.mark.parametrize("family", BLOCKS)
def test_the_file_holds_the_natural_step_of_the_same_settings(folders, family, positions, tmp_path, capsys):
    out, layer = tmp_path / "step.safetensors", BLOCKS[family].format(1)
    assert main(words(folders[family], "--bias_positions", positions, "--output", out)) == 0
    model = loaded(folders[family])
    fisher = FisherModel(model, tiny_tokenizer(), layers=1, positions=positions)
    expected = natural_step(fisher, PROMPT, towards=token("e"), kl=1e-3)
    stored = load_file(out)
    assert list(stored) == ["step"] and stored["step"].dtype == torch.float32 and stored["step"].dim() == 1
    torch.testing.assert_close(stored["step"], expected.step, rtol=1e-5, atol=1e-7)

    ids = ids_of(PROMPT)
    mask = [float(positions != "last" or i == len(ids) - 1) for i in range(len(ids))]
    p, q = log_p(model, ids), log_p(model, ids, layer, stored["step"], mask)
    seen, text = told(capsys)
    at = token("e")
    others = [v for v in range(VOCABULARY) if v != at]
    assert number(seen["probability"]) == pytest.approx([100 * float(x[0, at].exp()) for x in (p, q)], rel=6e-3)
    odds = [float(x[0, at] - x[0, others].logsumexp(0)) for x in (p, q)]
    assert number(seen["log-odds"]) == pytest.approx(odds, abs=2e-3) and odds[1] > odds[0]
    budget, predicted, measured = number(seen["KL in nats"])
    (off,) = number(seen["off target"])
    assert budget == 0.001 and predicted == pytest.approx(expected.predicted_kl, rel=6e-3)
    assert measured == pytest.approx(kl_of(p, q), rel=0.02)
    assert off == pytest.approx(kl_of(*(x[:, others].log_softmax(1) for x in (p, q))), rel=0.03)
    assert number(seen["budget used"]) == pytest.approx([100 * measured / 0.001], abs=1)
    length = float(stored["step"].norm())
    norm = float(torch.cat([_stream(model, ids, layer)]).norm(dim=-1).median())
    assert number(seen["length"]) == pytest.approx([length, 100 * length / norm, norm], rel=6e-3)
    assert layer in seen["step"] and ("note" in seen) == (not expected.quadratic)
    pieces = tiny_tokenizer()
    lines = text.split("next token")[1].split("probability")[0].splitlines()[1:7]
    for x, column in ((p, 0), (q, 1)):
        top = x[0].exp().topk(6)
        for line, value, t in zip(lines, top.values, top.indices, strict=True):
            half = line[15:51] if column == 0 else line[51:]
            assert float(half.split("%")[0]) == pytest.approx(100 * float(value), rel=6e-3)
            name = pieces.decode([int(t)])
            assert not name.isalnum() or half.split("%")[1].strip() == name


def _stream(model, ids, layer):
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def test_step_load_and_steer_give_the_printed_probability(folder, tmp_path, capsys):
    out = tmp_path / "step.safetensors"
    assert main(words(folder, "--bias_positions", "last", "--output", out)) == 0
    model, ids = loaded(folder), torch.tensor([ids_of(PROMPT)])
    found = Step.load(out)
    assert (found.layer, found.positions) == ("model.layers.1", "last")
    with torch.no_grad(), steer(model, found):
        p = model(input_ids=ids).logits[0, -1].softmax(0)[token("e")]
    assert number(told(capsys)[0]["probability"])[1] == pytest.approx(100 * float(p), rel=6e-3)


def test_tokens_to_trade_for_it(folder, tmp_path, capsys):
    out = tmp_path / "step.safetensors"
    flags = ["--towards", " ", "--away_from", "o", "--away-from=a", "--damping", 0.001, "--output", out]
    assert main(words(folder, *flags)) == 0
    model, ids = loaded(folder), ids_of(PROMPT)
    towards, away = [token("e"), token(" ")], [token("o"), token("a")]
    fisher = FisherModel(model, tiny_tokenizer(), layers=1)
    expected = natural_step(fisher, PROMPT, towards=towards, away_from=away, kl=1e-3, damping=0.001)
    torch.testing.assert_close(load_file(out)["step"], expected.step, rtol=1e-5, atol=1e-7)
    seen, _ = told(capsys)
    each = [log_p(model, ids), log_p(model, ids, "model.layers.1", expected.step.float())]
    odds = [float(x[0, towards].logsumexp(0) - x[0, away].logsumexp(0)) for x in each]
    assert number(seen["log-odds"]) == pytest.approx(odds, abs=2e-3)
    assert seen["towards"].count(",") == 1 and "␣" in seen["towards"] and set(seen["away from"]) >= {"o", "a"}


def test_the_kl_of_tokens_that_the_model_writes(folder, tmp_path, capsys):
    out, N = tmp_path / "step.safetensors", 4
    assert main(words(folder, "--targets", N, "--output", out, tokens=N)) == 0
    model, ids, step = loaded(folder), ids_of(PROMPT), load_file(out)["step"]
    written = list(ids)
    for _ in range(N):
        written.append(int(log_p(model, written).argmax()))
    read = range(len(ids) - 1, len(written) - 1)
    p, q = (log_p(model, written[:-1], *more, targets=read) for more in ((), ("model.layers.1", step)))
    seen, _ = told(capsys)
    assert number(seen["KL in nats"])[2] == pytest.approx(kl_of(p, q), rel=0.02)
    first = [100 * float(x[0, token("e")].exp()) for x in (p, q)]
    assert number(seen["probability"]) == pytest.approx(first, rel=6e-3)
    expected = natural_step(
        FisherModel(model, tiny_tokenizer(), layers=1, targets=N), PROMPT, towards=token("e"), at="first", kl=1e-3
    )
    torch.testing.assert_close(step, expected.step, rtol=1e-5, atol=1e-7)
    assert Step.load(out).positions == "all" and notes(out)["targets"] == str(N)


def test_completions_that_are_drawn(folder, tmp_path, capsys):
    out = tmp_path / "step.safetensors"
    flags = ["--targets", 3, "--samples", 2, "--completion_seed", 5, "--bias_positions", "prompt", "--output", out]
    assert main(words(folder, *flags)) == 0
    fisher = FisherModel(loaded(folder), tiny_tokenizer(), layers=1, targets=3, samples=2, seed=5, positions="prompt")
    expected = natural_step(fisher, PROMPT, towards=token("e"), at="first", kl=1e-3)
    torch.testing.assert_close(load_file(out)["step"], expected.step, rtol=1e-5, atol=1e-7)
    assert "of up to 3 tokens together" in told(capsys)[0]["KL in nats"]


def test_the_texts_are_greedy_ones_of_the_first_prompt(folder, tmp_path, capsys):
    out = tmp_path / "step.safetensors"
    assert main(words(folder, "--prompt", OTHER, "--output", out, kl=5.0, tokens=7)) == 0
    seen, _ = told(capsys)
    model, step, tokenizer = loaded(folder), load_file(out)["step"], tiny_tokenizer()
    texts = []
    for more in ((), ("model.layers.1", step)):
        ids = ids_of(PROMPT)
        for _ in range(7):
            ids.append(int(log_p(model, ids, *more).argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
        texts.append(tokenizer.decode(ids[len(ids_of(PROMPT)) :]))
    assert texts[0] != texts[1]
    for name, text in zip(("text without", "text with"), texts, strict=True):
        shown = "".join(c for c in text if c.isascii() and c.isalnum())
        assert all(c in seen[name] for c in shown)


def test_prompts_of_a_data_set(folder, tmp_path, capsys, caplog):
    data, out = tmp_path / "prompts.jsonl", tmp_path / "step.safetensors"
    write_prompts(data, ["skipped by offset", PROMPT, "", OTHER, "seven wizards", "not read"])
    flags = ["--dataset_name", data, "--num_prompts", 4, "--offset", 1, "--output", out]
    assert main(words(folder, *flags, prompt=None)) == 0
    model, texts = loaded(folder), [PROMPT, OTHER, "seven wizards"]
    expected = natural_step(FisherModel(model, tiny_tokenizer(), layers=1), texts, towards=token("e"), kl=1e-3)
    step = load_file(out)["step"]
    torch.testing.assert_close(step, expected.step, rtol=1e-4, atol=1e-6)
    each = [[log_p(model, ids_of(text), *more) for text in texts] for more in ((), ("model.layers.1", step))]
    p = [[float(x[0, token("e")].exp()) for x in one] for one in each]
    seen, _ = told(capsys)
    assert number(seen["probability"]) == pytest.approx([100 * np.mean(x) for x in p], rel=6e-3)
    gained = sum(after > before for before, after in zip(*p, strict=True))
    assert f"{gained} of 3 gained" in seen["prompts"] and "and 2 more" in seen["prompt"]
    kl = np.mean([kl_of(*both) for both in zip(*each, strict=True)])
    assert number(seen["KL in nats"])[2] == pytest.approx(kl, rel=0.02)
    assert any("1 of 4 prompts are left out (prompt 1: empty text)" in line for line in caplog.messages)
    assert (
        notes(out)["prompts"] == "3" and notes(out)["dataset"] == "prompts.jsonl" and "prompt_texts" not in notes(out)
    )


def test_it_says_where_the_quadratic_form_ends(folder, capsys):
    assert main(words(folder, kl=20.0)) == 0
    text = " ".join(told(capsys)[1].split())
    assert "measured KL differs from the budget by more than 10%" in text and "comes nearer to 20" in text
    assert main(words(folder, "--steps", 8, kl=20.0)) == 0
    assert "in 8 steps" in told(capsys)[0]["length"]


def test_several_steps_and_topk(folder, tmp_path):
    out = tmp_path / "step.safetensors"
    assert main(words(folder, "--steps", 3, "--estimator", "topk", "--top_k_tokens", 7, "--output", out)) == 0
    fisher = FisherModel(loaded(folder), tiny_tokenizer(), layers=1, top_k=7)
    expected = natural_step(fisher, PROMPT, towards=token("e"), kl=1e-3, steps=3, estimator="topk")
    torch.testing.assert_close(load_file(out)["step"], expected.step, rtol=1e-5, atol=1e-7)


def test_a_bar_of_any_length():
    assert used(0.5, True) == "█" * 20 + "░" * 20 + " 50%"
    assert used(0.0, False) == "." * 40 + " 0%" and used(3.2, False) == "#" * 40 + " 320%"


# The files


def notes(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_file_says_what_it_was_made_from(folder, tmp_path):
    out = tmp_path / "step.safetensors"
    assert main(words(folder, "--prompt", OTHER, "--away_from", "o", "--out", out)) == 0
    found = notes(out)
    told = {name: float(found.pop(name)) for name in ("predicted_kl", "measured_kl", "off_target_kl", "damping")}
    assert all(value > 0 for value in told.values()) and told["predicted_kl"] == pytest.approx(0.001, rel=0.5)
    assert {name: found[name] for name in found if name != "format"} == {
        "layer": "model.layers.1", "positions": "all", "model": "model", "towards": '["e"]', "away_from": '["o"]',
        "kl": "0.001", "steps": "1", "estimator": "topk", "rank": "32", "targets": "last", "prompts": "2",
        "prompt_texts": json.dumps([PROMPT, OTHER]), "fisher_vmap": fisher_vmap.__version__,
    }  # fmt: skip
    assert str(tmp_path).encode() not in out.read_bytes() and str(folder).encode() not in out.read_bytes()
    assert main(words(folder, "--no-text", "--output", out)) == 0
    assert "prompt_texts" not in notes(out) and PROMPT.encode() not in out.read_bytes()


@pytest.mark.needs("gguf")
def test_a_control_vector_beside_it(folder, tmp_path, capsys):
    from gguf import GGUFReader

    plain, vector = tmp_path / "step.safetensors", tmp_path / "step.gguf"
    assert main(words(folder, "--output", plain, "--output", vector)) == 0
    reader = GGUFReader(vector)
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1"
    np.testing.assert_array_equal(np.array(tensor.data), load_file(plain)["step"].numpy())
    text = told(capsys)[1]
    assert text.endswith(f"\nwritten in {plain}\nwritten in {vector}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.gguf", "step.safetensors"]


@pytest.mark.needs("gguf")
@pytest.mark.parametrize("positions", ["all", "prompt", "last"])
def test_a_control_vector_of_a_step_at_some_positions_is_told(folder, tmp_path, caplog, positions):
    line = f"bias_positions is {positions}, and llama.cpp adds a control vector at all positions"
    for output, tells in (("step.gguf", positions != "all"), ("step.safetensors", False)):
        caplog.clear()
        assert main(words(folder, "--bias_positions", positions, "--output", tmp_path / output)) == 0
        assert any(line in message for message in caplog.messages) is tells


def test_without_an_output_nothing_is_written(folder, tmp_path, capsys):
    assert main(words(folder)) == 0
    assert not list(tmp_path.iterdir()) and "written" not in told(capsys)[1]


def test_a_results_folder_that_lies_here_decides_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fisher_vmap.run.open.stored_precision", lambda *_: pytest.fail("it was looked at"))
    assert main(words(folder)) == 0


# Mistakes


@pytest.mark.parametrize(
    ("more", "instead", "message"),
    [
        ([], {"towards": None}, "nothing is wanted; say which token with --towards"),
        (["--towards", ""], {}, "--towards is an empty text; expected a token"),
        ([], {"prompt": None}, "there is no prompt; give a text with --prompt, or a data set with --dataset_name"),
        (["--dataset_name", "p.jsonl"], {}, "--prompt and --dataset_name are both given; keep one"),
        ([], {"prompt": " \n"}, "--prompt is an empty text; expected a prompt"),
        (["--num_prompts", "3"], {}, "--num_prompts is for --dataset_name, and --prompt is given"),
        ([], {"kl": 0}, "--kl is 0; expected nats above zero, such as 0.1"),
        ([], {"kl": "nan"}, "--kl is nan; expected nats above zero"),
        ([], {"kl": "x"}, "invalid float value: 'x'"),
        (["--damping", "-1"], {}, "--damping is -1; expected a number above zero"),
        (["--steps", "0"], {}, "--steps is 0; expected 1 or more"),
        (["--rank", "0"], {}, "--rank is 0; expected 1 or more"),
        ([], {"tokens": -1}, "--tokens is -1; expected 0 or more"),
        (["--estimator", "sampled"], {}, "invalid choice: 'sampled'"),
        ([], {"layer": "1,2"}, "hook_layer_name is 1,2; a step is for one layer, such as 15"),
        ([], {"layer": "all"}, "hook_layer_name is all; a step is for one layer"),
        (["--targets", "all"], {}, "targets is all; expected last, or how many tokens the model is to write"),
        (["--targets", "completion"], {}, "targets is completion; expected last"),
        (["--targets", "0"], {}, "correct the flag --targets"),
        (["--bias_positions", "completion"], {}, "bias_positions is completion, which begins behind the token"),
        (["--samples", "2"], {}, "samples and temperature are of completions"),
        (["--output", "step.txt"], {}, "step.txt ends in .txt; expected .safetensors or .gguf"),
        (["--output", "step"], {}, "step ends in nothing; expected .safetensors or .gguf"),
        (["--output", "no/such/step.safetensors"], {}, "cannot write no/such/step.safetensors: no such file"),
        (["--output", "taken.safetensors"], {}, "taken.safetensors is a folder, not a file"),
        (["--config", "my.yaml"], {}, "this command reads no file of settings"),
        (["--output_dir", "out"], {}, "unknown flag '--output_dir'"),
        pytest.param(
            ["--output", "step.gguf"], {"layer": 0}, "block 0, which llama.cpp cannot steer",
            marks=pytest.mark.needs("gguf"),
        ),
        pytest.param(
            ["--output", "step.gguf"], {"layer": "model.layers.1.mlp"}, "model.layers.1.mlp is not a block",
            marks=pytest.mark.needs("gguf"),
        ),
    ],
)  # fmt: skip
def test_mistakes_that_are_told_before_anything_is_loaded(
    folder, tmp_path, monkeypatch, capsys, more, instead, message
):
    (tmp_path / "taken.safetensors").mkdir()
    for later in ("run.open.model_of", "load.model.without_weights", "run.open.source_of"):
        monkeypatch.setattr(f"fisher_vmap.{later}", lambda *_, **__: pytest.fail("something was loaded"))
    assert main(words(folder, *more, **instead)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--towards", " e"], "--towards: ' e' is 2 tokens, [' ', 'e']"),
        (["--away_from", "no"], "--away_from: 'no' is 2 tokens, ['n', 'o']"),
        (["--away_from", "e"], "--away_from: 'e' is a token of --towards as well"),
    ],
)
def test_tokens_that_are_none_are_told_before_the_weights_are_loaded(folder, monkeypatch, capsys, more, message):
    monkeypatch.setattr("fisher_vmap.run.open.model_of", lambda *_: pytest.fail("the model was loaded"))
    assert main(words(folder, *more)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line


def test_a_text_that_the_vocabulary_has_not(folder):
    asked = type("Asked", (), {"towards": ["w3", "nonsense"], "away_from": []})
    with pytest.raises(UserError, match="--towards: 'nonsense' is not in the vocabulary"):
        _tokens(asked, word_tokenizer())


@pytest.mark.parametrize(
    ("more", "layer", "message"),
    [
        ([], "model.layers.9", "model.layers.9"),
        ([], 9, "9"),
        pytest.param(["--output", "s.gguf"], -4, "is block 0, which llama.cpp", marks=pytest.mark.needs("gguf")),
        (["--max_length", "2"], 1, "max_length 2 leaves no room for a prompt"),
    ],
)
def test_mistakes_that_the_model_shows(folder, tmp_path, monkeypatch, capsys, more, layer, message):
    monkeypatch.setattr(
        sys.modules["fisher_vmap.natural"], "natural_step", lambda *_, **__: pytest.fail("it was computed")
    )
    assert main(words(folder, *more, layer=layer)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fisher_vmap: ") and message in line and not list(tmp_path.iterdir())


def test_a_data_set_without_a_prompt_that_can_be_used(folder, tmp_path, capsys):
    write_prompts(tmp_path / "p.jsonl", ["", " "])
    assert main(words(folder, "--dataset_name", tmp_path / "p.jsonl", prompt=None)) == 2
    assert "no prompt can be used (prompt 0: empty text)" in capsys.readouterr().err


# The command


def test_it_has_every_setting_that_is_not_of_results_or_machines():
    left = set(Settings.model_fields) - set(SETTINGS)
    assert left == {
        "output_dir", "overwrite", "shard_size", "vectors_dtype", "store_text", "export_npz", "save", "strict",
        "keep_columns", "completion_column", "estimator", "include_rest", "oversampling", "passes", "trace_samples",
        "score_samples", "num_singular_values", "engine", "ray_address", "ray_workers", "ray_gpus_per_worker",
        "ray_cpus_per_worker",
    }  # fmt: skip


def test_help(capsys):
    for name in ("steer-to", "steer_to"):
        with pytest.raises(SystemExit) as stop:
            fisher_vmap_main([name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and text.startswith("usage: fisher-vmap steer-to --towards TOKEN")
        assert all(f"--{name} " in text for name in (*SETTINGS, "prompt", "towards", "away_from", "kl", "output"))
    assert "  steer-to  find the step" in usage()


def test_settings_reach_the_prompt(folder, capsys):
    flags = ["--system_prompt", "Be brief.", "--prefill", "x", "--hook-layer-name", "model.layers.1"]
    assert main([word for word in words(folder, *flags) if word not in ("--hook_layer_name", "1")]) == 0
    ids = tiny_tokenizer().encode(
        f"<|system|>Be brief.<|end|><|user|>{PROMPT}<|end|><|assistant|>x", add_special_tokens=False
    )
    expected = 100 * float(log_p(loaded(folder), ids)[0, token("e")].exp())
    assert number(told(capsys)[0]["probability"])[0] == pytest.approx(expected, rel=6e-3)


def test_the_real_command(folder, tmp_path):
    out = tmp_path / "step.safetensors"
    done = real_command(words(folder, "--quiet", "--model", folder, "--output", out)[2:], "fisher_vmap.steer_to")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.endswith(f"\nwritten in {out}\n")
    assert Step.load(out).step.norm() > 0


# What a file is in place of


def test_a_file_that_is_no_step_is_not_replaced(folder, tmp_path, capsys):
    weights = folder / "model.safetensors"
    (tmp_path / "lens" / "shards").mkdir(parents=True)
    (tmp_path / "lens" / "lens.json").write_text("{}")
    part = tmp_path / "lens" / "shards" / "part-1-of-1.safetensors"
    part.write_bytes(b"")
    note = tmp_path / "note.gguf"
    note.write_bytes(b"mine")
    for path, line in (
        (weights, f"{weights} is there and holds something else than a step; choose another --output"),
        (part, f"{part} is a file of the lens in {tmp_path / 'lens'}; choose another --output"),
        (note, f"{note} is there and holds something else than a step"),
    ):
        before = path.read_bytes()
        assert main(words(folder, "--output", path)) == 2
        assert line in capsys.readouterr().err and path.read_bytes() == before


def test_an_older_step_is_replaced_and_a_link_stays_one(folder, tmp_path):
    for name in ("step.safetensors", "step.gguf"):
        real, link = tmp_path / f"real-{name}", tmp_path / name
        assert main(words(folder, "--output", real)) == 0
        before = real.read_bytes()
        link.symlink_to(real)
        assert main(words(folder, "--output", link, kl=1e-4)) == 0
        assert link.is_symlink() and real.read_bytes() != before


def test_the_file_is_there_before_anything_is_printed(folder, tmp_path, monkeypatch):
    out = tmp_path / "step.safetensors"

    def closed(*_, **__):
        assert out.exists()
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        main(words(folder, "--output", out))
    assert list(load_file(out)) == ["step"]


def test_a_model_that_measures_no_divergence_at_all(folder, tmp_path, capsys):
    """In bfloat16 a step of 1e-12 nats changes nothing that is measured."""
    out = tmp_path / "step.safetensors"
    given = words(folder, "--output", out, "--precision", "model", kl=1e-12)
    assert main([word.replace("float32", "bfloat16") for word in given]) == 0
    seen, _ = told(capsys)
    assert number(seen["KL in nats"])[0] == 1e-12 and out.exists()


@pytest.mark.parametrize(
    ("more", "changes", "line"),
    [
        (["--bias_positions", "last", "--targets", "3"], {}, "behind which nothing is read; take all or prompt"),
        (["--output", "a.safetensors", "--output", "./a.safetensors"], {}, "--output is a.safetensors twice"),
        ([], {"kl": 1e-300}, "kl is 1e-300; expected nats above zero, such as 0.1"),
        ([], {"kl": 1e300}, "kl is 1e+300; expected nats above zero"),
        (
            [],
            {"layer": "model.norm"},
            "a step at model.norm, outside of the decoder blocks, cannot be followed; take one",
        ),
        ([], {"layer": "lm_head"}, "take one such as model.layers.0"),
        ([], {"layer": "model.embed_tokens"}, "outside of the decoder blocks"),
    ],
)
def test_more_mistakes_are_one_line(folder, capsys, more, changes, line):
    assert main(words(folder, *more, **changes)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert line in lines[-1] and lines[-1].startswith("fisher_vmap: ")
