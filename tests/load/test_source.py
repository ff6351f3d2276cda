"""Where weights come from, end to end through the command: shards, GGUF, adapters, several devices.

The oracle is plain autograd on the same weights, had by other means: the model in memory, weights unpacked by hand, the
adapter's product added by hand.
"""

import copy
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
import transformers
from command_cases import tiny_tokenizer
from oracles import plain_scores, relative
from safetensors.torch import load_file, save_file
from source_cases import PROMPTS, agrees, base, run, save, with_tokenizer

from fisher_vmap import FisherModel, load_model, open_results

peft = pytest.importorskip("peft", reason="adapters need the package peft (in the dev extra)")

RANK, ALPHA = 3, 12
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), base())


def stored(out):
    return [(record.S, record.V) for record in open_results(out)]


# Shards


def test_shards_of_weights_give_what_one_file_gives(model, tmp_path):
    sharded = tmp_path / "sharded"
    base().save_pretrained(sharded, max_shard_size="100KB")
    with_tokenizer(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    out, whole = run(sharded, tmp_path, out=tmp_path / "a"), run(model, tmp_path, out=tmp_path / "b")
    for (S, V), (S_whole, V_whole) in zip(stored(out), stored(whole), strict=True):
        np.testing.assert_allclose(S, S_whole, rtol=1e-5)
        np.testing.assert_allclose(V, V_whole, atol=1e-4)
    agrees(out, base(), 2e-4)


def test_every_shard_is_part_of_the_models_identity(tmp_path, capsys):
    sharded = tmp_path / "sharded"
    base().save_pretrained(sharded, max_shard_size="100KB")
    with_tokenizer(sharded)
    out = run(sharded, tmp_path)
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    save_file({name: tensor * 1.01 for name, tensor in load_file(last).items()}, last, {"format": "pt"})
    run(sharded, tmp_path, code=2)
    assert "model" in capsys.readouterr().err and open_results(out) is not None


# GGUF


def write_gguf(path, model, kind, leave_out=()):
    """A llama as llama.cpp stores it, its matrices quantised; returns the model with the weights as they come back."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf (in the dev extra)")
    config, heads = model.config, {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = tiny_tokenizer()
    vocabulary = {i: word for word, i in tokenizer.get_vocab().items()}
    vocabulary |= {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()} | {0: "~~"}
    words = [vocabulary.get(i, f"<unused{i}>") for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<") and len(word) > 1 else 1 for word in words])
    writer.add_token_merges(["~ ~"])  # at least one, of what no prompt holds
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(4)
    writer.add_chat_template(tokenizer.chat_template)

    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    unpacked = copy.deepcopy(model)
    for name, tensor in model.state_dict().items():
        inner = name.removesuffix(".weight")
        prefix = ""
        if inner.startswith("model.layers."):
            number, inner = inner.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        weight = tensor.float().numpy()
        rotary = inner.rpartition(".")[2][0] if inner.endswith(("q_proj", "k_proj")) else None
        if rotary:  # llama.cpp rotates neighbours, transformers halves
            pairs = weight.reshape(heads[rotary], 2, -1, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        dtype = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(weight, dtype)
        if name not in leave_out:
            writer.add_tensor(f"{prefix}{names[inner]}.weight", packed, raw_dtype=dtype)
        back = gguf.dequantize(packed, dtype)
        if rotary:
            back = back.reshape(heads[rotary], -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        unpacked.get_parameter(name).data.copy_(torch.from_numpy(back.copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_gguf_file_gives_the_scores_of_its_weights_unpacked(tmp_path, monkeypatch, kind):
    gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf (in the dev extra)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    oracle = write_gguf(tmp_path / "tiny.gguf", base(), gguf.GGMLQuantizationType[kind])
    agrees(run(tmp_path / "tiny.gguf", tmp_path), oracle, 2e-4)


def test_a_gguf_file_is_converted_once_wherever_it_lies_and_old_copies_go(tmp_path, monkeypatch, caplog):
    gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf (in the dev extra)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level("INFO", "fisher_vmap")
    one, other = tmp_path / "one.gguf", tmp_path / "elsewhere" / "other.gguf"
    write_gguf(one, base(), gguf.GGMLQuantizationType.F32)
    load_model(str(one), dtype="float32")
    (copy_of_it,) = (tmp_path / "cache" / "fisher_vmap").iterdir()
    assert copy_of_it.name.endswith(f"-float32-transformers-{transformers.__version__}")
    size = sum(file.stat().st_size for file in copy_of_it.iterdir()) / 1e6
    assert f"one.gguf is kept, converted, in {copy_of_it}: {size:.0f} MB" in caplog.text
    other.parent.mkdir()
    shutil.copy(one, other)
    before = time.time() - 30 * 24 * 3600
    unused, used, of_another = (
        copy_of_it.with_name(name)
        for name in (f"{copy_of_it.name}.9", f"{copy_of_it.name}.8", copy_of_it.name.replace("-float32", "-float16"))
    )
    for folder in (unused, used, of_another):
        shutil.copytree(copy_of_it, folder)
    for folder in (unused, of_another, copy_of_it):
        os.utime(folder, (before, before))
    caplog.clear()
    load_model(str(other), dtype="float32")
    assert "converting" not in caplog.text
    assert set(copy_of_it.parent.iterdir()) == {copy_of_it, used, of_another}
    assert copy_of_it.stat().st_mtime > before + 1000  # it counts as used now


def test_a_gguf_file_on_the_hub_is_owner_name_and_file(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf (in the dev extra)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    oracle = write_gguf(tmp_path / "file.gguf", base(), gguf.GGMLQuantizationType.F32)
    asked = []

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr("fisher_vmap.load.source.hf_hub_download", download)
    agrees(run("owner/name/file.gguf", tmp_path, model_revision="v2"), oracle, 2e-4)
    assert asked == [("owner/name", "file.gguf", "v2")]


def test_a_part_of_a_gguf_model_is_refused(tmp_path, monkeypatch, capsys):
    gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf (in the dev extra)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gone = [f"model.layers.3.mlp.{part}_proj.weight" for part in ("gate", "up")]
    write_gguf(tmp_path / "part.gguf", base(), gguf.GGMLQuantizationType.F32, leave_out=gone)
    run(tmp_path / "part.gguf", tmp_path, code=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lacks 2 weights" in line and "layers.3.mlp.gate_proj" in line and "--merge" in line


# Adapters


def adapter(folder, model_folder, targets=TARGETS, seed=0, **options):
    """A LoRA adapter of random weights in a folder; returns the merged model, made by hand."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False,
                             base_model_name_or_path=str(model_folder), task_type="CAUSAL_LM", **options)  # fmt: skip
    adapted = peft.get_peft_model(base(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(model_folder)
    adapted.save_pretrained(folder)
    return merged_by_hand(folder)


def merged_by_hand(folder):
    merged, weights = base(), load_file(folder / "adapter_model.safetensors")
    downs = [name for name in weights if name.endswith("lora_A.weight")]
    assert downs
    for name in downs:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up = weights[name.replace("lora_A", "lora_B")]
        merged.get_submodule(module).weight.data += ALPHA / RANK * up @ weights[name]
    return merged


def test_an_adapter_as_the_model_is_put_on_the_base_that_it_names(model, tmp_path):
    merged = adapter(tmp_path / "adapter", model)
    out = run(tmp_path / "adapter", tmp_path)
    agrees(out, merged, 2e-4)
    with pytest.raises(AssertionError):
        agrees(out, base(), 2e-4)


def test_an_adapter_beside_the_model(model, tmp_path):
    merged = adapter(tmp_path / "adapter", "/somewhere/else")
    agrees(run(model, tmp_path, adapter_path=tmp_path / "adapter"), merged, 2e-4)


def test_a_whole_model_with_an_adapter_in_its_folder_is_its_own_base(tmp_path):
    save(tmp_path / "both", base())
    merged = adapter(tmp_path / "both", "/somewhere/else")
    agrees(run(tmp_path / "both", tmp_path), merged, 2e-4)


@pytest.mark.parametrize("kind", ["dora", "rslora", "ia3", "modules_to_save"])
def test_other_kinds_of_adapters_are_what_peft_makes_of_them(model, tmp_path, kind):
    torch.manual_seed(1)
    common = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    config = {
        "dora": lambda: peft.LoraConfig(r=RANK, use_dora=True, init_lora_weights=False, **common),
        "rslora": lambda: peft.LoraConfig(r=RANK, use_rslora=True, init_lora_weights=False, **common),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], init_ia3_weights=False, **common),
        "modules_to_save": lambda: peft.LoraConfig(
            r=RANK, init_lora_weights=False, modules_to_save=["lm_head"], **common
        ),
    }[kind]()
    adapted = peft.get_peft_model(base(), config)
    adapted.get_base_model().get_output_embeddings().weight.data *= 1.3 if kind == "modules_to_save" else 1.0
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    agrees(run(tmp_path / "adapter", tmp_path), adapted.get_base_model().eval(), 2e-4)


def test_an_adapter_with_added_tokens_brings_embeddings_and_tokenizer(model, tmp_path):
    grown = base()
    grown.resize_token_embeddings(grown.config.vocab_size + 3, mean_resizing=False)
    config = peft.LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(grown, config)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}!"
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), dtype="float32", device="cpu")
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.model.get_input_embeddings().num_embeddings == grown.config.vocab_size
    ids = torch.arange(8)[None] + 256
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_adapter_is_part_of_the_models_identity(model, tmp_path, capsys):
    adapter(tmp_path / "one", model, seed=1)
    adapter(tmp_path / "two", model, seed=2)
    run(tmp_path / "one", tmp_path)
    run(tmp_path / "one", tmp_path)  # the same: carries on
    for other in ({"model": tmp_path / "two"}, {"model": model}, {"model": model, "adapter_path": tmp_path / "two"}):
        run(other.pop("model"), tmp_path, code=2, **other)
        assert "model" in capsys.readouterr().err
    run(model, tmp_path, adapter_path=tmp_path / "one")  # the same by another way


def prompt_tuning(folder, model_folder):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = peft.get_peft_model(base(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(model_folder)
    adapted.save_pretrained(folder)


def of_other_size(folder, _model):
    other = copy.deepcopy(base())
    config = peft.LoraConfig(r=RANK, target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(other, config).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in load_file(path).items()}, path)


def without_a_weight(folder, model_folder):
    adapter(folder, model_folder)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    del weights["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"]
    save_file(weights, path)


def with_a_weight_too_many(folder, model_folder):
    adapter(folder, model_folder)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.model.layers.7.mlp.down_proj.lora_B.weight"] = torch.ones(64, RANK)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (prompt_tuning, ["PROMPT_TUNING", "virtual tokens"]),
        (of_other_size, ["cannot be put on", "another model's"]),
        (without_a_weight, ["lacks 1 weights", "layers.2.mlp.down_proj"]),
        (with_a_weight_too_many, ["has no place", "layers.7.mlp.down_proj"]),
        (lambda folder, _m: adapter(folder, "/no/such/model"), ["/no/such/model", "adapter_path"]),
        (
            lambda folder, _m: (folder.mkdir(), (folder / "adapter_config.json").write_text("{}")),
            ["names no base"],
        ),
        (lambda folder, _m: (folder.mkdir(), (folder / "adapter_config.json").write_text("{")), ["cannot be read"]),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_in_one_line(model, tmp_path, capsys, make, words):
    make(tmp_path / "adapter", model)
    named = {"adapter_path": tmp_path / "adapter"} if make in (of_other_size,) else {}
    run(model if named else tmp_path / "adapter", tmp_path, code=2, **named)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_an_adapter_path_that_is_none(model, tmp_path, capsys):
    run(model, tmp_path, code=2, adapter_path=tmp_path)
    assert "adapter_config.json" in capsys.readouterr().err


# Several devices


def test_a_device_map_on_the_cpu_is_the_model_on_the_cpu(model, tmp_path):
    out = run(model, tmp_path, device="auto", device_map="auto")
    agrees(out, base(), 2e-4)


PLACES = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2"], "cpu")
PLACES |= dict.fromkeys(["model.layers.1", "model.layers.3", "model.norm", "lm_head"], "disk")


def test_blocks_on_disk_are_fetched_as_they_are_needed(model, tmp_path):
    out = run(model, tmp_path, device="auto", device_map=json.dumps(PLACES))
    agrees(out, base(), 2e-4)


@pytest.mark.parametrize("kernel", ["auto", "whole", "loop"])
def test_every_form_and_both_products_with_blocks_on_disk(model, kernel):
    loaded = load_model(str(model), dtype="float32", device_map=PLACES).model
    aside = {name for name, parameter in loaded.named_parameters() if parameter.is_meta}
    opened = FisherModel(loaded, layers=[0, 2], top_k=3, kernel=kernel)
    ids = torch.arange(9)[None]
    scores = opened.scores(ids)
    for layer in opened.layers:
        plain = plain_scores(base(), ids[0], layer, token_ids=scores.token_ids[0])
        assert relative(scores.gradients[layer][0], plain.gradients) < 2e-4
    if kernel == "auto":
        with pytest.raises(ValueError, match=r"precision mixed .* put aside"):
            opened.scores(ids, precision="mixed")
        with opened.linearize(ids) as net, FisherModel(base(), layers=[0, 2]).linearize(ids) as other:
            v = torch.randn(1, 2, 64)
            torch.testing.assert_close(
                net.pushforward(v, opened.layers[0]), other.pushforward(v, opened.layers[0]), rtol=1e-3, atol=1e-4
            )
            assert relative(net.metric(opened.layers[0]).product(v), other.metric(opened.layers[0]).product(v)) < 1e-4
    assert aside == {name for name, parameter in loaded.named_parameters() if parameter.is_meta}


def test_an_adapter_on_weights_that_do_not_fit_is_refused(model, tmp_path, capsys):
    adapter(tmp_path / "adapter", model)
    run(tmp_path / "adapter", tmp_path, code=2, device="auto", device_map=json.dumps(PLACES))
    assert "merge the two beforehand" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cpu", "device_map": "auto"}, ["device", "device_map", "one of the two"]),
        ({"device": "auto", "max_memory": "{cpu: 1GiB}"}, ["max_memory", "device_map"]),
        ({"device": "auto", "device_map": '{"": cuda:7}'}, ["cannot be loaded"]),
        ({"device": "auto", "device_map": "everywhere"}, ["device_map", "balanced"]),
        ({"device": "auto", "device_map": "auto", "max_memory": "{cpu: much}"}, ["max_memory", "20GiB"]),
    ],
)
def test_what_is_wrong_with_a_device_map_is_said(model, tmp_path, capsys, settings, words):
    run(model, tmp_path, code=2, **settings)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_where_a_model_stands_is_not_part_of_its_identity(model, tmp_path):
    out = run(model, tmp_path)
    before = stored(out)
    shutil.rmtree(out / "shards")
    run(model, tmp_path, device="auto", device_map="auto")
    for (S, _), (S_before, _) in zip(stored(out), before, strict=True):
        np.testing.assert_allclose(S, S_before, rtol=1e-4)
    assert len(before) == len(PROMPTS)
