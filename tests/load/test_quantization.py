"""`quantization: 4bit | 8bit` and `attn_implementation`: the scores are those of the model that was asked for."""

import copy
import logging

import pytest
import torch
from command_cases import VOCABULARY, save_model, write_prompts
from models import tiny
from oracles import plain_scores, relative
from quantized_cases import bitsandbytes_folder, unpacked_by_bitsandbytes
from source_cases import PROMPTS, agrees, base, run

from fisher_vmap import FisherModel, UserError, fisher_scores, load_model, open_results
from fisher_vmap.kernels.quantized import quantized_linears
from fisher_vmap.load.options import saved_by_packing
from fisher_vmap.run.plan import plan
from fisher_vmap.run.plan_model import skeleton_of
from fisher_vmap.run.settings import Settings

packed = pytest.mark.needs("bitsandbytes")


def quantized_by_the_library(folder, bits, dtype=torch.float32):
    """The model as transformers quantises it, before any forward, and an ordinary model of the same matrices."""
    import transformers

    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = transformers.BitsAndBytesConfig(**how if bits == 4 else {"load_in_8bit": True})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    return model, unpacked_by_bitsandbytes(model, bits)


@packed
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_model_quantised_when_loaded(model, tmp_path, caplog, bits, dequantize):
    caplog.set_level(logging.INFO)
    packed_model, oracle = quantized_by_the_library(model, bits)
    if bits == 8 and not dequantize:
        oracle = packed_model  # it rounds its inputs as well, and its own gradient is straight through
    out = run(model, tmp_path, quantization=f"{bits}bit", dequantize=dequantize)
    # Its kernels round to bfloat16, or their inputs to 8 bits; unpacked weights are an ordinary model.
    agrees(out, oracle, 2e-3 if dequantize else 0.08)
    assert f"28 layers quantised to {bits}bit, by bitsandbytes" in caplog.text
    assert open_results(out).index.fingerprint["quantization"] == f"{bits}bit"
    run(model, tmp_path, code=2)


@packed
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("precision", ["auto", "mixed"])
def test_scores_are_those_of_plain_autograd_on_the_unpacked_weights(model, quantization, precision):
    loaded = load_model(str(model), dtype="bfloat16", device="cpu", quantization=quantization, precision=precision)
    assert len(quantized_linears(loaded.model)) == 28
    ids = torch.arange(9)[None]
    scores = fisher_scores(loaded.model, ids, layers=1, top_k=3, precision=precision)
    _, oracle = quantized_by_the_library(model, 4 if quantization == "4bit" else 8, torch.bfloat16)
    (layer,) = scores.gradients
    plain = plain_scores(oracle, ids[0], layer, token_ids=scores.token_ids[0])
    assert relative(scores.gradients[layer][0], plain.gradients) < 0.12


@packed
def test_an_adapter_stays_beside_quantised_weights_and_is_merged_into_unpacked_ones(model, tmp_path, caplog):
    import peft

    caplog.set_level(logging.INFO)
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(base()), config)
    adapted.save_pretrained(tmp_path / "adapter")
    _, oracle = quantized_by_the_library(model, 4)
    oracle = peft.PeftModel.from_pretrained(oracle, str(tmp_path / "adapter")).merge_and_unload()
    for dequantize, said, budget in ((False, "next to the quantised weights", 0.08), (True, "merged into", 2e-3)):
        out = tmp_path / f"out-{dequantize}"
        agrees(run(model, tmp_path, out=out, adapter_path=tmp_path / "adapter", quantization="4bit",
                   dequantize=dequantize), oracle, budget)  # fmt: skip
        assert said in caplog.text


@packed
def test_what_quantization_cannot_be_combined_with(model, tmp_path, capsys, monkeypatch):
    folder, _, _ = bitsandbytes_folder(tmp_path / "stored")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")

    def line(path, **settings):
        run(path, tmp_path, code=2, **{"quantization": "4bit"} | settings)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "quantised already (bitsandbytes)" in line(folder)
    assert "quantised already (gguf)" in line(tmp_path / "a.gguf")
    assert "is quantised; use precision model" in line(model, precision="float32", dtype="bfloat16")
    assert "none, 4bit or 8bit" in line(model, quantization="2bit")
    for missing in ("bitsandbytes", "accelerate"):
        with monkeypatch.context() as patched:
            patched.setattr("importlib.util.find_spec", lambda name, gone=missing: None if name == gone else object())
            assert f"pip install {missing}" in line(model)


@packed
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_knows_what_packed_weights_take(tmp_path, quantization, family):
    sizes = {
        "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16},
        "gpt2": {"n_embd": 64, "n_head": 4, "n_inner": 128},
    }
    folder = save_model(tmp_path / "model", tiny(family, torch.float32, vocab_size=VOCABULARY, **sizes[family]))
    loaded = load_model(str(folder), device="cpu", quantization=quantization, precision="model").model
    held = sum(p.numel() * p.element_size() for p in loaded.parameters())
    for layer in quantized_linears(loaded).values():
        state = getattr(layer.weight, "quant_state", None)
        scales = state.absmax if state is not None else layer.weight.SCB
        scales = layer.state.SCB if scales is None else scales  # where its first forward has put them
        held += scales.numel() * 4  # which a processor with bfloat16 arithmetic has narrowed to 2 bytes there
    settings = Settings(model_path=str(folder), hook_layer_name=1, quantization=quantization, device="cpu",
                        dataset_name=str(write_prompts(tmp_path / "a.jsonl", PROMPTS)))  # fmt: skip
    skeleton = skeleton_of(settings)
    assert abs(skeleton.weight_bytes - held) <= 0.02 * held
    assert saved_by_packing(skeleton.model, quantization) > 0
    assert f"({quantization})" in next(line for line in plan(settings) if line.startswith("memory"))
    unpacked = skeleton_of(settings.model_copy(update={"dequantize": True}))
    assert unpacked.weight_bytes == skeleton_of(settings.model_copy(update={"quantization": None})).weight_bytes


@pytest.mark.parametrize(("given", "ran"), [("none", "sdpa"), ("eager", "eager"), ("sdpa", "sdpa")])
def test_the_attention_that_audits_compare_with_is_told(model, tmp_path, caplog, given, ran):
    caplog.set_level(logging.INFO)
    out = run(model, tmp_path, attn_implementation=given)
    agrees(out, base(), 2e-4)
    assert f"LlamaForCausalLM, float32, attention {ran}, on cpu" in caplog.text
    (form,) = open_results(out).index.resolved["forms"].values()
    assert form["audit_attention"] == ran


@pytest.mark.parametrize("given", ["eager", "sdpa", None])
def test_a_model_that_was_loaded_with_another_attention(model, given):
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation=given, dtype=torch.float32)
    ids = torch.arange(9)[None]
    opened = FisherModel(loaded, layers=1, top_k=3)
    scores = opened.scores(ids)
    (layer,) = opened.layers
    assert opened.forms[layer]["audit_attention"] == (given or "sdpa")
    plain = plain_scores(base(), ids[0], layer, token_ids=scores.token_ids[0])
    assert relative(scores.gradients[layer][0], plain.gradients) < 2e-4
    assert loaded.config._attn_implementation == (given or "sdpa")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("flash", ["'flash'", "eager", "sdpa", "flash_attention_2"]),
        ("Eager", ["'Eager'", "eager"]),
        ("flash_attention_2", ["flash_attention_2 needs a GPU", "sdpa or eager"]),
        ("flash_attention_3", ["flash_attention_3 needs a GPU"]),
        ("paged|sdpa", ["'paged|sdpa'"]),
        ("flex_attention", ["FlexAttention does not support backward on CPU"]),
        ("fisher_vmap", ["'fisher_vmap'"]),
    ],
)
def test_an_attention_that_is_not_there_is_refused_in_one_line(model, tmp_path, capsys, given, words):
    run(model, tmp_path, code=2, attn_implementation=given)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_an_attention_that_the_model_or_the_machine_lacks(model, tmp_path, capsys):
    import transformers

    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    bloom = save_model(tmp_path / "bloom", transformers.BloomForCausalLM(config))
    run(bloom, tmp_path, code=2, attn_implementation="sdpa")
    assert "check attn_implementation" in capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(UserError, match=r"install it|check attn_implementation"):
        load_model(str(model), device_map="auto", precision="model", attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match="computes in bfloat16 or float16"):
        load_model(str(model), device_map="auto", dtype="float32", attn_implementation="flash_attention_2")
