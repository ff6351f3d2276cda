"""GGUF files through the command: unpacked once, and the scores are those of their weights."""

import copy
import os
import shutil
import time

import pytest
import torch
import transformers
from command_cases import tiny_tokenizer
from source_cases import agrees, base, run

from fisher_vmap import load_model

pytestmark = pytest.mark.needs("gguf")


def write_gguf(path, model, kind, leave_out=()):
    """A llama as llama.cpp stores it, its matrices quantised; returns the model with the weights as they come back."""
    import gguf

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
    import gguf

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    oracle = write_gguf(tmp_path / "tiny.gguf", base(), gguf.GGMLQuantizationType[kind])
    agrees(run(tmp_path / "tiny.gguf", tmp_path), oracle, 2e-4)


def test_a_gguf_file_is_converted_once_wherever_it_lies_and_old_copies_go(tmp_path, monkeypatch, caplog):
    import gguf

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
    import gguf

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
    import gguf

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gone = [f"model.layers.3.mlp.{part}_proj.weight" for part in ("gate", "up")]
    write_gguf(tmp_path / "part.gguf", base(), gguf.GGMLQuantizationType.F32, leave_out=gone)
    run(tmp_path / "part.gguf", tmp_path, code=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lacks 2 weights" in line and "layers.3.mlp.gate_proj" in line and "--merge" in line
