"""What people have in their model folders, and how they spell its path: it loads, or one line says what to do."""

import json
import os
import shutil

import pytest
import torch
from command_cases import VOCABULARY, run_here, write_prompts
from models import tiny
from safetensors.torch import load_file, save_file
from source_cases import PROMPTS, agrees, base, run, save, with_tokenizer

from fisher_vmap import UserError, load_model
from fisher_vmap.load.source import without_slash

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.mark.parametrize("name", ["my model", "run [3]", "a*b?", "modèle-模型", "v1.5", "it's {this}", "model.gguf"])
@pytest.mark.parametrize("end", ["", "/"])
def test_a_folder_of_any_name(model, tmp_path, name, end):
    folder = shutil.copytree(model, tmp_path / name)
    agrees(run(f"{folder}{end}", tmp_path), base(), 2e-4)


def test_a_home_folder_and_a_path_from_here(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/mine", "~/mine/", "mine", "./mine", "../" + tmp_path.name + "/mine//"):
        assert type(load_model(path, device="cpu").model).__name__ == "LlamaForCausalLM"
    agrees(run("~/mine", tmp_path), base(), 2e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("owner/name/", "owner/name"), ("owner/name", "owner/name"), ("gpt2", "gpt2"), ("/", "/"), ("./a//", "./a")],
)
def test_a_slash_at_the_end_is_no_part_of_a_name(given, expected):
    assert without_slash(given) == expected


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/owner/name", "huggingface.co/owner/name/tree/main", "http://hf.co/owner/name?x=1",
     "https://www.huggingface.co/owner/name/"],
)  # fmt: skip
def test_an_address_of_the_hub_is_answered_with_the_id(address, tmp_path, capsys):
    run(address, tmp_path, code=2)
    assert capsys.readouterr().err.strip().endswith("is a web address; give the model's id, owner/name")


def file(name, content=b""):
    return lambda folder: ((folder / name).parent.mkdir(parents=True, exist_ok=True),
                           (folder / name).write_bytes(content))  # fmt: skip


def only(*names_and_contents):
    """A folder with these files alone."""

    def make(folder):
        shutil.rmtree(folder)
        for name, content in names_and_contents:
            file(name, content)(folder)

    return make


def sharded(spoil):
    def make(folder):
        base().save_pretrained(folder, max_shard_size="100KB")
        (folder / "model.safetensors").unlink()
        spoil(sorted(folder.glob("model-*.safetensors")), folder / "model.safetensors.index.json")

    return make


def headless(kind):
    """The folder of a causal LM as one of its other classes saves it."""

    def make(folder):
        import transformers

        config = base().config
        if kind == "LlamaForSequenceClassification":
            config.num_labels, config.pad_token_id = 2, 0
        getattr(transformers, kind)(config).save_pretrained(folder)

    return make


def adapter(folder):
    shutil.rmtree(folder)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder.parent / "base"), "r": 2,
              "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip
    file("adapter_config.json", json.dumps(config).encode())(folder)


def adapter_without_weights(folder):
    with_tokenizer(save(folder.parent / "base", base()))
    adapter(folder)


def adapter_on(name):
    def make(folder):
        adapter(folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        file("config.json", json.dumps(base().config.to_dict()).encode())(folder)  # as some trainers leave it

    return make


CASES = {
    "a sentence-transformer": (file("modules.json", b"[]"), ["sentence-transformers", "causal LM"]),
    "an older sentence-transformer": (
        only(("modules.json", b"[]"), ("0_Transformer/config.json", b"{}")), ["sentence-transformers"]),
    "a diffusion pipeline": (
        only(("model_index.json", b"{}"), ("text_encoder/config.json", b"{}")), ["diffusers", "causal LM"]),
    "a folder of checkpoints": (
        only(("checkpoint-100/config.json", b"{}"), ("checkpoint-50/config.json", b"{}")),
        ["no config.json", "checkpoint-", "2 have one"]),
    "a folder of the hub's cache": (
        only(("refs/main", b"abc"), ("snapshots/abc/config.json", b"{}")), ["hub's cache", "snapshots/abc"]),
    "weights of the maker": (
        only(("params.json", b"{}"), ("consolidated.00.pth", b"x")), ["own format", "convert"]),
    "weights that are a pointer": (file("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "a tokenizer that is a pointer": (file("tokenizer.json", POINTER), ["tokenizer.json", "git lfs pull"]),
    "empty weights": (file("model.safetensors"), ["model.safetensors is damaged", "fetch it again"]),
    "weights of garbage": (file("model.safetensors", b"\xff" * 99), ["model.safetensors is damaged"]),
    "a missing shard": (
        sharded(lambda parts, _index: parts[-1].unlink()), ["1 of the", "model-0000", "fetch it again"]),
    "two missing shards": (sharded(lambda parts, _i: [p.unlink() for p in parts[:2]]), ["2 of the", "..."]),
    "a cut shard": (
        sharded(lambda parts, _i: parts[1].write_bytes(parts[1].read_bytes()[:-9])), ["model-00002", "damaged"]),
    "a shard that is a pointer": (
        sharded(lambda parts, _i: parts[0].write_bytes(POINTER)), ["model-00001", "git lfs pull"]),
    "a damaged list of shards": (
        sharded(lambda _p, index: index.write_text("{")), ["model.safetensors.index.json is damaged"]),
    "a list of shards without shards": (
        sharded(lambda _p, index: index.write_text('{"weight_map": []}')), ["index.json is damaged"]),
    "a base model": (headless("LlamaModel"), ["saved as LlamaModel", "without a language model's head"]),
    "a classifier": (headless("LlamaForSequenceClassification"), ["saved as LlamaForSequenceClassification"]),
    "an adapter whose base is gone": (adapter, ["was trained on", "base", "adapter_path"]),
    "an adapter whose base was beside it": (adapter_on("../models/llama"), ["../models/llama", "adapter_path"]),
    "an adapter whose base was in a folder": (adapter_on("out/llama/final"), ["out/llama/final", "adapter_path"]),
    "an adapter without weights": (adapter_without_weights, ["no adapter_model.safetensors", "fetch it again"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(model, tmp_path, capsys, case):
    make, words = CASES[case]
    folder = shutil.copytree(model, tmp_path / "given")
    make(folder)
    run(folder, tmp_path, code=2)
    said = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(said) and all(word in said[-1] for word in words), said[-1]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("more", [{}, {"plan": "true"}])
def test_a_file_of_a_model_is_answered_with_its_folder(model, tmp_path, capsys, name, more):
    data = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    assert run_here(model / name, data, tmp_path / "out", **more) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"is a single file; give the folder that it lies in, {model}" in line


@pytest.mark.parametrize("case", ["a sentence-transformer", "a diffusion pipeline", "a folder of checkpoints"])
def test_a_plan_refuses_the_same_folders(model, tmp_path, capsys, case):
    make, words = CASES[case]
    folder = shutil.copytree(model, tmp_path / "given")
    make(folder)
    data = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    assert run_here(folder, data, tmp_path / "out", plan="true") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_a_base_model_whose_embeddings_are_its_unembedding_is_told(tmp_path, caplog):
    tied = tiny("llama", torch.float32, vocab_size=VOCABULARY, tie_word_embeddings=True)
    folder = with_tokenizer(tmp_path / "base")
    tied.model.save_pretrained(folder)
    loaded = load_model(str(folder), dtype="float32", device="cpu").model
    assert "was saved as LlamaModel" in caplog.text
    with torch.no_grad():
        ids = torch.arange(9)[None]
        torch.testing.assert_close(loaded(ids).logits, tied(ids).logits)


def test_a_folder_with_an_unused_list_of_pickled_shards_loads(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    agrees(run(folder, tmp_path), base(), 2e-4)


def test_pickled_weights_alone_are_read(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    os.unlink(folder / "model.safetensors")
    agrees(run(folder, tmp_path), base(), 2e-4)
    save_file({}, folder / "adapter_other.safetensors")
    with pytest.raises(UserError, match="pointer of Git LFS"):
        (folder / "pytorch_model.bin").write_bytes(POINTER)
        load_model(str(folder), device="cpu")
