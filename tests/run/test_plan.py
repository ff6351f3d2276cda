"""--plan: what it foretells beside what real runs leave and count."""

import numpy as np
import pytest
import torch
import transformers
from command_cases import VOCABULARY, arguments, run_here, save_model, texts, write_prompts
from models import FAMILIES, fresh, tiny

from fisher_vmap import open_results
from fisher_vmap.linearize.probe import layer_widths
from fisher_vmap.model.layers import decoder_blocks, resolve_layers
from fisher_vmap.model.precision import Rates
from fisher_vmap.run.__main__ import main
from fisher_vmap.run.cli_args import load_settings
from fisher_vmap.run.plan import plan, planned, readable
from fisher_vmap.run.plan_model import Work, skeleton_of, unavoidable

PROMPTS = [*texts(61), "", "x" * 300]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "p.jsonl", PROMPTS, kind=["a", "b", "c"] * 21)


def settings_of(model, data, out="never", **settings):
    return load_settings(arguments(model, data, out, **settings))


def folder_bytes(out):
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"shard_size": 32},
        {"hook_layer_name": "all", "vectors_dtype": "float16"},
        {"hook_layer_name": "0,2", "export_npz": "false", "keep_columns": "kind"},
        {"hook_layer_name": "0,2", "save": "mean", "shard_size": 16},
        {"save": "prompts", "store_text": "false", "include_rest": "true"},
        {"estimator": "full"},
    ],
)
def test_tokens_and_storage_are_those_of_the_run(model, data, tmp_path, choice):
    settings = settings_of(model, data, **choice)
    found = planned(settings, skeleton_of(settings))
    out = tmp_path / "out"
    assert run_here(model, data, out, **choice) == 0
    table = open_results(out).to_pandas()
    assert found.tokens == table["tokens"].sum() and found.tokens_error == 0
    assert found.sample.total == len(table)
    assert found.storage.total == pytest.approx(folder_bytes(out), rel=0.05)
    sizes = open_results(out).index.files
    npz = [entry.bytes for name, entry in sizes.items() if name.endswith(".npz")]
    assert found.storage.parts.get("npz", 0) == sum(npz)  # to the byte
    if "mean" in found.storage.parts:
        assert found.storage.parts["mean"] == sizes["mean.safetensors"].bytes
    if choice.get("save") != "mean":
        stored = sum(path.stat().st_size for path in out.glob("shards/*.safetensors"))
        assert found.storage.parts["shards"] == pytest.approx(stored, rel=0.002)


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        (
            {"targets": 3, "estimator": "full"},
            "of these up to 186 that the model writes: a completion of 3 tokens to each prompt",
        ),
        (
            {"targets": 4, "samples": 2, "top_k_tokens": 3},
            "of these up to 496 that the model writes: 2 completions of 4 tokens to each prompt",
        ),
        ({"targets": "completion", "completion_column": "kind", "estimator": "full"}, None),
        ({"targets": "all", "estimator": "sampled"}, None),
    ],
)
def test_completions_are_counted(model, data, tmp_path, choice, line):
    settings, last = settings_of(model, data, **choice), settings_of(model, data, max_length=124)
    found, plain = planned(settings, skeleton_of(settings)), planned(last, skeleton_of(last))
    out = tmp_path / "out"
    assert run_here(model, data, out, **choice) == 0
    rows = open_results(out).to_pandas()
    rows = rows[rows["status"] == "ok"]
    written, samples = choice["targets"] if isinstance(choice["targets"], int) else 0, choice.get("samples", 1)
    given = 2 * len(rows) if choice["targets"] == "completion" else 0  # a letter, and the end of the turn
    assert found.tokens == samples * (rows["tokens"].sum() + written * len(rows)) + given
    assert found.storage.total == pytest.approx(folder_bytes(out), rel=0.08)
    told = [told.strip() for told in plan(settings) if "that the model writes" in told]
    assert told == ([] if line is None else [line])
    assert ("writing" in found.operations) == (written > 0)
    assert found.operations["head"] > plain.operations["head"]
    assert found.batch.parts and found.longest.tokens <= 128 * samples


def test_the_lines(model, data, tmp_path, capsys, monkeypatch):
    """Without the weights, and without a folder."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    assert main([*arguments(model, data, tmp_path / "out", shard_size=8), "--plan", "--plan_rate", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = ("prompts", "matrices", "tokens", "operations", "storage", "", "", "", "memory", "", "", "", "time")
    assert [line.split(" ")[0] for line in lines] == list(starts)
    assert lines[0] == "prompts     63 in 8 shards of 8"
    assert "all prompts tokenised" in lines[2] and "the longest 128" in lines[2]
    changes = ["vectors_dtype: float16", "export_npz: false", "save: mean"]
    assert all(change in line for change, line in zip(changes, lines[5:8], strict=True))
    assert lines[10].strip().startswith("finishing, one file after another: the mean ")
    assert "100 tokens a second a worker" in lines[-1] and lines[-1].endswith("on 64")
    assert not (tmp_path / "out").exists()


def test_what_would_change_is_what_a_run_with_the_change_stores(model, data, capsys):
    lines = plan(settings_of(model, data))
    for change, words in (
        ({"vectors_dtype": "float16"}, "vectors_dtype: float16"),
        ({"export_npz": "false"}, "export_npz: false"),
        ({"save": "mean"}, "save: mean"),
    ):
        settings = settings_of(model, data, **change)
        shown = next(line for line in lines if words in line).split(" with ")[0].strip()
        assert shown == readable(planned(settings, skeleton_of(settings)).storage.total)


def test_a_layer_too_wide_for_a_mean(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fisher_vmap.results.means.DENSE_WIDTH", VOCABULARY - 1)
    choice = {"hook_layer_name": "lm_head,1"}
    settings = settings_of(model, data, **choice)
    found = planned(settings, skeleton_of(settings))
    line = next(line for line in plan(settings) if "finishing" in line)
    assert line.endswith("; lm_head is too wide for a mean") and "the mean " in line and "the npz " in line
    out = tmp_path / "out"
    assert run_here(model, data, out, **choice) == 0
    assert found.storage.parts["mean"] == open_results(out).index.files["mean.safetensors"].bytes
    assert found.storage.total == pytest.approx(folder_bytes(out), rel=0.05)
    assert "mean" not in planned(settings_of(model, data, hook_layer_name="lm_head"), skeleton_of(
        settings_of(model, data, hook_layer_name="lm_head"))).storage.parts  # fmt: skip
    capsys.readouterr()
    assert main([*arguments(model, data, out, **choice, save="mean"), "--plan"]) == 2
    assert "save is mean, but lm_head has the width" in capsys.readouterr().err


def test_a_sample_of_many_prompts(model, data, monkeypatch):
    settings = settings_of(model, data)
    exact = planned(settings, skeleton_of(settings))
    monkeypatch.setattr("fisher_vmap.run.plan.MOST_TOKENISED", 30)
    found = planned(settings, skeleton_of(settings))
    assert found.sample.tokenised == 30 and not found.sample.exact and found.tokens_error > 0
    assert abs(found.tokens - exact.tokens) < 4 * found.tokens_error
    assert found.storage.total == pytest.approx(exact.storage.total, rel=0.05)
    ratio = sum(found.operations.values()) / sum(exact.operations.values())
    assert ratio == pytest.approx(found.tokens / exact.tokens, rel=0.1)
    assert "every n-th, 30 prompts tokenised, standard error" in "\n".join(plan(settings))


def test_a_stream_whose_end_is_not_known(model, data, monkeypatch):
    from fisher_vmap.data.prompts import PromptSource

    monkeypatch.setattr(PromptSource, "total", property(lambda self: None, lambda self, value: None), raising=False)
    settings = settings_of(model, data)
    assert planned(settings, skeleton_of(settings)).sample.total == len(PROMPTS)
    monkeypatch.setattr("fisher_vmap.run.plan.MOST_TOKENISED", 30)
    assert planned(settings, skeleton_of(settings)).sample.total == len(PROMPTS)
    asked = settings_of(model, data, num_prompts=50)
    found = planned(asked, skeleton_of(asked))
    assert found.sample.total == 50 and found.sample.first_alone


def test_a_measured_rate(model, data, monkeypatch):
    monkeypatch.setattr("fisher_vmap.run.plan.MEASURED_S", 0.3)
    settings = settings_of(model, data)
    rate = planned(settings, skeleton_of(settings), "measure").rate
    assert 10 < rate < 1e6


def test_operations_by_hand():
    """Of a llama, from its configuration: no list of its modules."""
    lm = tiny("llama", vocab_size=VOCABULARY)
    c = lm.config
    D, I, L, V, H, G = (
        c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size, c.num_attention_heads,
        c.num_key_value_heads,
    )  # fmt: skip
    E, K, hook, lengths = D // H, 5, 1, [6, 10]
    M, B = sum(lengths), len(lengths)
    attention, keys, rest = 2 * H * E * D, 2 * G * E * D, 3 * D * I
    top = keys * M + (attention + rest) * B
    linear = lambda passes, blocks: 2 * passes * (blocks * (attention + keys + rest) * M + top)  # noqa: E731
    inner = sum(4 * H * E * (T // 2) * T for T in lengths)  # Q K^T and P V, the causal half
    last = sum(4 * H * E * T for T in lengths)
    forward = linear(1, L - 1) + (L - 1) * inner + last
    pulled = linear(K, L - 1 - hook - 1) + 2 * K * ((L - 1 - hook - 1) * inner + last)
    head = 2 * 2 * B * V * D
    counted = unavoidable(lm, list(lm.model.layers), lengths, [hook], Work(shared=K))
    assert sum(product.shape.flops for product in counted) == forward + pulled + head


def test_operations_of_the_forward_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for family in ("llama", "gpt2", "gemma2", "phi"):
        lm = tiny(family, torch.float32)
        blocks, T = list(decoder_blocks(lm).values()), 24
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            lm(input_ids=torch.zeros(1, T, dtype=torch.int64), logits_to_keep=1)
        products = unavoidable(lm, blocks, [T], [len(blocks) - 1], Work(shared=1))
        ours = sum(p.shape.flops for p in products if p.kind.startswith("forward") or p.kind == "head")
        assert 0.6 < ours / counter.get_total_flops() < 1.1  # less: of the last block the last row, of attention a half


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_skeleton_is_the_model(family, tmp_path):
    lm = tiny(family, torch.float32, vocab_size=VOCABULARY)
    save_model(tmp_path / "model", lm)
    skeleton = skeleton_of(settings_of(tmp_path / "model", "none", hook_layer_name="all"))
    names = resolve_layers(lm, "all")
    assert list(skeleton.blocks) == list(skeleton.widths) == names
    assert skeleton.widths == layer_widths(lm, names) and skeleton.hooks == list(range(len(names)))
    assert skeleton.weight_bytes == sum(p.numel() * p.element_size() for p in lm.parameters())
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_layers_by_name_and_number(model):
    def of(layers):
        return skeleton_of(settings_of(model, "none", hook_layer_name=layers))

    found = of("model.layers.1.mlp,-1,model.embed_tokens")
    assert found.hooks == [1, 3, -1] and len(set(found.widths.values())) == 1
    from fisher_vmap.errors import UserError

    with pytest.raises(UserError, match=r"no layer 9; its 4 layers are model.layers.0 to model.layers.3"):
        of(9)


def test_weights_and_a_batch_are_what_a_worker_has(model, data):
    settings = settings_of(model, data)
    found = planned(settings, skeleton_of(settings))
    lm = tiny("llama", torch.float32, vocab_size=VOCABULARY)
    assert found.weights == sum(p.numel() * 4 for p in lm.parameters())
    table = sorted(found.sample.lengths)
    assert found.batch.prompts <= 8 and max(table) <= found.batch.tokens <= 1024
    assert found.longest == found.longest._replace(prompts=1, tokens=128)  # the model has so many positions
    short = settings_of(model, data, max_length=40, batch_size=2, cotangent_chunk=1)
    shorter = planned(short, skeleton_of(short))
    assert (shorter.longest.tokens, shorter.batch.prompts) == (40, 2) and 40 < shorter.batch.tokens <= 80
    assert shorter.batch.total < found.batch.total and shorter.longest.total < found.longest.total
    assert np.isfinite(found.tokens)


@pytest.mark.needs("peft")
def test_an_adapter_is_counted_as_its_base(model, tmp_path):
    import peft

    lm = fresh("llama", torch.float32, vocab_size=VOCABULARY)
    lm.name_or_path = lm.config.name_or_path = str(model)
    adapted = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    found = skeleton_of(settings_of(tmp_path / "adapter", "none"))
    base = skeleton_of(settings_of(model, "none"))
    assert (found.weight_bytes, found.widths, found.hooks) == (base.weight_bytes, base.widths, base.hooks)


def test_what_cannot_be_planned_is_said_in_one_line(model, data, tmp_path, capsys):
    for settings, words in (
        ({"hook_layer_name": 9}, "no layer 9"),
        ({"save": "mean", "export_npz": "true"}, "export_npz is true"),
    ):
        assert main([*arguments(model, data, tmp_path / "out", **settings), "--plan"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("fisher_vmap: ") and words in error
    assert main([*arguments(tmp_path / "none", data, tmp_path / "out"), "--plan"]) == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["without bfloat16", "with it"])
def test_the_precision_of_this_machine_its_memory_and_its_rate(model, data, monkeypatch, kind):
    slow, fast = Rates((11.0, 1.1), (80.0, 120.0)), Rates((900.0, 600.0), (120.0, 120.0))
    for module in ("run.plan", "model.precision"):
        monkeypatch.setattr(f"fisher_vmap.{module}.product_rates", lambda *_: fast if kind == "with it" else slow)
    settings, wide = settings_of(model, data, dtype="bfloat16"), settings_of(model, data, dtype="float32")
    found, in_float32 = (planned(each, skeleton_of(each)) for each in (settings, wide))
    share, rate, name = (0.5, 720e9, "model") if kind == "with it" else (1, 96e9, "float32")
    assert (found.precision.name, found.product_rate) == (name, pytest.approx(rate))
    assert found.weights == share * in_float32.weights
    passing, wide = (each.batch.parts["chunk"] for each in (found, in_float32))
    assert passing == share * wide
    lines = plan(settings)
    assert any(line.startswith(f"precision   {name}, because products in float32 run at") for line in lines)
    assert lines[-1].endswith(f"on a machine like this one, whose products run at {rate / 1e9:.0f} GFLOP/s")
