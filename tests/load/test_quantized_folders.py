"""Quantised checkpoints through the command: packed or unpacked, the scores are those of their weights."""

import json

import pytest
import torch
from quantized_cases import bitsandbytes_folder, compressed_folder, fp8_folder
from source_cases import agrees, base, run, save

from fisher_vmap import fisher_scores, load_model
from fisher_vmap.kernels.quantized import quantized_linears


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(bitsandbytes_folder, marks=pytest.mark.needs("bitsandbytes")),
        pytest.param(compressed_folder, marks=pytest.mark.needs("compressed_tensors")),
        fp8_folder,
    ],
)
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_quantised_folder(tmp_path, make, dequantize):
    folder, oracle, budget = make(tmp_path / "model")
    agrees(run(folder, tmp_path, dequantize=dequantize), oracle, 2e-4 if dequantize else budget)
    loaded = load_model(str(folder), dtype="float32", device="cpu", dequantize=dequantize)
    assert loaded.identity.get("dequantized", False) == dequantize
    if dequantize:
        assert not quantized_linears(loaded.model)


@pytest.mark.needs("compressed_tensors")
def test_unpacked_weights_are_another_model_than_packed_ones(tmp_path, capsys):
    folder, _, _ = compressed_folder(tmp_path / "model")
    run(folder, tmp_path)
    run(folder, tmp_path, dequantize=True, code=2)
    assert "model" in capsys.readouterr().err


def test_a_format_whose_package_is_missing_is_named(tmp_path, capsys):
    folder = save(tmp_path / "model", base())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    run(folder, tmp_path, code=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be loaded" in line and "install" in line, line


@pytest.mark.needs("compressed_tensors")
def test_compressed_tensors_with_rounded_inputs_needs_dequantize(tmp_path, capsys):
    folder, oracle, _ = compressed_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    (folder / "config.json").write_text(json.dumps(config))
    run(folder, tmp_path, code=2)
    assert "dequantize: true" in capsys.readouterr().err
    agrees(run(folder, tmp_path, dequantize=True), oracle, 2e-4)


@pytest.mark.needs("compressed_tensors")
def test_compressed_tensors_own_storage_is_refused_in_one_line(tmp_path):
    import transformers

    folder, _, _ = compressed_folder(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="CompressedTensorsConfig"):
        fisher_scores(model, torch.arange(5)[None], layers=0)
