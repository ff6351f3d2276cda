"""Quantised checkpoints, and the ordinary model of the same weights: what their scores are compared with."""

import json

import torch
from safetensors.torch import load_file, save_file
from source_cases import base, save

from fisher_vmap.kernels.quantized import quantized_linears


def unpacked_by_bitsandbytes(model, bits):
    """An ordinary model of the same weights, by the library's own functions, before any forward has repacked them."""
    import bitsandbytes.functional as F

    oracle = base()
    for name in quantized_linears(model):
        weight = model.get_submodule(name).weight
        if bits == 4:
            matrix = F.dequantize_4bit(weight.data, weight.quant_state)
        else:
            matrix = weight.CB.float() * weight.SCB[:, None].float() / 127
        oracle.get_submodule(name).weight.data = matrix.float()
    return oracle


def bitsandbytes_folder(folder):
    import transformers

    save(folder / "plain", base())
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    oracle = unpacked_by_bitsandbytes(model, 4)
    save(folder / "quantised", model)
    return folder / "quantised", oracle, 0.08


def compressed_folder(folder):
    """8-bit integers with a scale a row, as compressed-tensors stores them."""
    return _by_hand(folder, torch.int8, 127, "weight_scale", {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"format": "int-quantized",
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        }},
    })  # fmt: skip


def fp8_folder(folder):
    """8-bit floats with a scale a block, as DeepSeek stores them."""
    return _by_hand(folder, torch.float8_e4m3fn, 448, "weight_scale_inv", {
        "quant_method": "fp8", "weight_block_size": [1, 1000], "modules_to_not_convert": ["lm_head"],
    })  # fmt: skip


def _by_hand(folder, dtype, largest, scale_name, quantization):
    oracle = base()
    save(folder, oracle)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if "_proj" in n]:
        weight = tensors[name]
        scale = weight.abs().amax(1, keepdim=True) / largest
        rounded = (weight / scale).round() if dtype == torch.int8 else weight / scale
        tensors[name] = rounded.to(dtype)
        tensors[f"{name.removesuffix('weight')}{scale_name}"] = scale
        oracle.get_parameter(name).data = tensors[name].float() * scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder, oracle, 2e-4
