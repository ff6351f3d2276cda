"""dequantize: true in another dtype than the checkpoint's: all weights have the format of an ordinary checkpoint."""

import pytest
import torch
import transformers
from models import tiny
from oracles import plain_scores, relative
from quantized_cases import compressed_folder, fp8_folder, unpacked_by_bitsandbytes
from source_cases import base, save

from fisher_vmap import FisherModel
from fisher_vmap.load.model import load_model, to_one_dtype

DTYPES = ("float32", "bfloat16", "float16")


def bitsandbytes_in(saved, computed):
    """A 4-bit checkpoint whose other weights are saved in one format, and whose products are computed in another."""

    def make(folder):
        save(folder / "plain", base())
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "plain", quantization_config=config, dtype=saved, device_map={"": "cpu"}
        )
        save(folder / "quantised", model)
        return folder / "quantised", unpacked_by_bitsandbytes(model, 4).float(), 0.0

    return make


def formats(model):
    return {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


CHECKPOINTS = {
    "4-bit beside float32": bitsandbytes_in(torch.float32, torch.float16),
    "4-bit beside bfloat16": bitsandbytes_in(torch.bfloat16, torch.float32),
    "4-bit beside float16": bitsandbytes_in(torch.float16, torch.bfloat16),
    "compressed-tensors": compressed_folder,
    "fp8": fp8_folder,
}


def needs(name):
    packages = {"4": ["bitsandbytes"], "c": ["compressed_tensors"]}
    return [pytest.mark.needs(*packages[name[0]])] if name[0] in packages else []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in CHECKPOINTS])
def test_unpacked_weights_and_the_others_are_of_one_format(tmp_path, name, dtype):
    folder, oracle, _ = CHECKPOINTS[name](tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        save(tmp_path / "ordinary", base()), dtype=getattr(torch, dtype)
    )
    loaded = load_model(str(folder), dtype=dtype, device="cpu", dequantize=True, precision="model")
    assert formats(loaded.model) == formats(plain)
    ids, layer = torch.arange(3, 12), "model.layers.1"
    scores = FisherModel(loaded.model, layers=1, top_k=3, precision="model").scores(ids[None])
    expected = plain_scores(oracle.float(), ids, layer, token_ids=scores.token_ids[0])
    budget = {"float32": 1e-2, "bfloat16": 0.1, "float16": 0.03}[dtype]  # what it was packed from had a format as well
    assert relative(scores.gradients[layer][0].float(), expected.gradients.float()) < budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_model_keeps_in_float32_stays_so(tmp_path, monkeypatch, dtype):
    """As an ordinary checkpoint of it is loaded; what is made in a format of its own keeps that."""
    kind = type(tiny("llama"))
    monkeypatch.setattr(kind, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    monkeypatch.setattr(kind, "_keep_in_fp32_modules", ["post_*_layernorm"])
    folder = save(tmp_path / "model", base())
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    changed = to_one_dtype(model, dtype)
    assert formats(model) == formats(plain)
    norm = "model.layers.0.input_layernorm.weight"
    assert norm not in changed and model.get_parameter(norm).dtype == torch.float32
    after = "model.layers.0.post_attention_layernorm.weight"
    assert (after in changed) == (dtype == torch.bfloat16)


def test_shared_weights_stay_shared(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(tiny("llama", tie_word_embeddings=True).config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    to_one_dtype(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
