"""PEFT adapters through the command: the scores are those of the base with the adapter's product added by hand."""

import copy
import json

import pytest
import torch
from command_cases import tiny_tokenizer
from safetensors.torch import load_file, save_file
from source_cases import PLACES, agrees, base, run, save

from fisher_vmap import load_model

pytestmark = pytest.mark.needs("peft")
RANK, ALPHA = 3, 12
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(folder, model_folder, targets=TARGETS, seed=0, **options):
    """A LoRA adapter of random weights in a folder; returns the merged model, made by hand."""
    import peft

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
    import peft

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
    import peft

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
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = peft.get_peft_model(base(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(model_folder)
    adapted.save_pretrained(folder)


def of_other_size(folder, _model):
    import peft

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


def test_an_adapter_on_weights_that_do_not_fit_is_refused(model, tmp_path, capsys):
    adapter(tmp_path / "adapter", model)
    run(tmp_path / "adapter", tmp_path, code=2, device="auto", device_map=json.dumps(PLACES))
    assert "merge the two first" in capsys.readouterr().err
