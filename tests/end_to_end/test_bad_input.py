"""What a user can get wrong: one line that names it and says what to do, exit code 2, and nothing half-written.

Each case changes one thing of a run that works. Most run in this process, a dozen as the real command.
"""

import json
import os
import shutil

import pytest
import torch
import transformers
from command_cases import (
    VOCABULARY,
    arguments,
    real_command,
    run_here,
    save_model,
    texts,
    tiny_tokenizer,
    write_prompts,
)
from models import FAMILIES, tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fisher_vmap import open_results
from fisher_vmap.run.__main__ import main

EMBEDDING = {"vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6}


class Case:
    """The parts of a run that works, for a case to spoil: a model folder and a data file of its own, and settings."""

    def __init__(self, tmp_path, model):
        self.tmp_path, self.shared_model = tmp_path, model
        self.data = write_prompts(tmp_path / "prompts.jsonl", texts(5))
        self.out = tmp_path / "out"

    def model(self):
        """A copy of the model that may be damaged."""
        return shutil.copytree(self.shared_model, self.tmp_path / "mine")

    def write(self, name, content):
        path = self.tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def run(self, changes):
        """Exit code of the run with the settings changed; one that is named "argv" is put after them."""
        return main(self.argv(changes))

    def argv(self, changes):
        rest = [str(part) for part in changes.pop("argv", ())]
        values = {"model": self.shared_model, "data": self.data, "out": self.out, **changes}
        return arguments(values.pop("model"), values.pop("data"), values.pop("out"), **values) + rest


def settings_file(text):
    return lambda case: {"argv": ["--config", case.write("settings.yaml", text)]}


def setting(**values):
    return lambda case: dict(values)


def data_file(name, content, **values):
    return lambda case: {"data": case.write(name, content), **values}


def model_file(name, content, **values):
    def spoil(case):
        path = case.model() / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
        return {"model": path.parent, **values}

    return spoil


def other_model(make, tokenizer=True):
    return lambda case: {"model": save_model(case.tmp_path / "other", make(), tokenizer)}


def config_json(**changes):
    return model_file("config.json", lambda old: json.dumps(json.loads(old) | changes).encode())


def without(*patterns):
    def spoil(case):
        folder = case.model()
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()
        return {"model": folder}

    return spoil


class RunsCode:
    """What a malicious pickle holds: unpickling it makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def pickle_that_runs_code(case):
    folder = case.model()
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": RunsCode(case.tmp_path / "code was run")}, folder / "pytorch_model.bin")
    return {"model": folder}


def model_with_code(case):
    folder = case.model()
    mark = case.tmp_path / "code was run"
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    return {"model": folder}


def data_set_script(case):
    mark = case.tmp_path / "code was run"
    case.write("scripted/scripted.py", f"import os\nos.mkdir({str(mark)!r})\n")
    return {"data": case.tmp_path / "scripted"}


def shard_missing(case):
    folder = case.tmp_path / "sharded"
    tiny("llama", torch.float32, vocab_size=VOCABULARY).save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()
    return {"model": folder}


def weight_missing(case):
    path = case.model() / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    return {"model": path.parent}


def folder_with(name, content=b"x"):
    def spoil(case):
        return {"model": case.write(f"folder/{name}", content).parent}

    return spoil


def output(name, content=None):
    def spoil(case):
        if content is not None:
            case.write(name.split("//")[0], content)
        return {"out": case.tmp_path / name.replace("//", "/")}

    return spoil


def index_damaged(case):
    assert run_here(case.shared_model, case.data, case.out) == 0
    index = case.out / "index.json"
    index.write_bytes(index.read_bytes().replace(b'"rank": 4', b'"rank": 5'))
    return {}


def folder_link_to_nowhere(case):
    case.out.symlink_to(case.tmp_path / "nowhere")
    return {}


def bert(kind, **changes):
    config = transformers.BertConfig(**EMBEDDING, intermediate_size=50, **changes)
    return lambda: getattr(transformers, kind)(config)


def t5():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=36, d_kv=6, d_ff=50, num_layers=1, num_heads=6)
    return transformers.T5ForConditionalGeneration(config)


def gpt2():
    return tiny("gpt2", torch.float32, vocab_size=VOCABULARY)


def gemma2():
    return tiny("gemma2", torch.float32, vocab_size=VOCABULARY)


def another_tokenizer(alphabet):
    """One that knows these letters and drops every other."""

    def spoil(case):
        core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        folder = case.model()
        PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
        return {"model": folder, "chat_template": "false"}

    return spoil


def vision():
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=36, num_hidden_layers=1, num_attention_heads=6, intermediate_size=50, image_size=32
        )
    )


def parquet(keep):
    def spoil(case):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = case.tmp_path / "a.parquet"
        pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
        path.write_bytes(path.read_bytes()[:keep])
        return {"data": path}

    return spoil


GARBAGE = bytes(range(256)) * 40
GGUF = b"GGUF" + (3).to_bytes(4, "little")

# What is given, and words of the line that is said about it.
CASES = {
    # the settings
    "settings that are no YAML": (settings_file("batch_size: ["), ["settings.yaml", "not YAML"]),
    "a list of settings": (settings_file("- batch_size"), ["settings.yaml", "list"]),
    "settings that are one word": (settings_file("batch_size"), ["settings.yaml", "str"]),
    "settings in another encoding": (settings_file(b"\xff\xfeb"), ["settings.yaml", "UTF-8"]),
    "an unknown setting": (settings_file("batchsize: 3"), ["batchsize", "did you mean 'batch_size'"]),
    "a setting given twice": (settings_file("strict: true\nstrict: false"), ["line 2", "strict"]),
    "a setting of the wrong type": (settings_file("batch_size: [8]"), ["batch_size", "whole number"]),
    "an object in YAML": (settings_file("seed: !!python/object/apply:os.getcwd []"), ["not YAML"]),
    "settings of another program": (
        settings_file("learning_rate: 0.1"),
        ["'learning_rate'; --help lists every setting"],
    ),
    "no settings file": (lambda case: {"argv": ["--config", case.tmp_path / "no.yaml"]}, ["no.yaml", "--config"]),
    "an unknown flag": (lambda case: {"argv": ["--hook_layr", "3"]}, ["--hook_layr", "hook_layer_name"]),
    "a word that is no flag": (lambda case: {"argv": ["prompts.jsonl"]}, ["prompts.jsonl", "--NAME VALUE"]),
    "a negative number": (setting(batch_size=-3), ["batch_size", "'-3'", "from 1"]),
    "zero": (setting(num_prompts=0), ["num_prompts", "'0'", "from 1"]),
    "a huge number": (setting(shard_size=10**30), ["shard_size", "1,000,000,000"]),
    "no number": (setting(top_k_tokens="ten"), ["top_k_tokens", "'ten'"]),
    "an unknown dtype": (setting(dtype="int8"), ["int8", "bfloat16"]),
    "an unknown device": (setting(device="gpu"), ["gpu", "cuda"]),
    "a device that is not there": (setting(device="cuda:9"), ["cuda:9", "cpu"]),
    # the model
    "no such model": (lambda case: {"model": case.tmp_path / "no"}, ["model_path", "is not there", "folder"]),
    "no such hub model": (setting(model="nobody/nothing"), ["nobody/nothing", "check the name"]),
    "a model of another kind of file": (lambda case: {"model": case.write("a.txt", "x")}, ["a.txt", ".gguf"]),
    "an empty model folder": (folder_with("readme"), ["config.json", "save_pretrained"]),
    "a folder with a gguf file": (folder_with("a.gguf"), ["config.json", "a.gguf"]),
    "an adapter without its model": (
        folder_with("adapter_config.json", b"{}"),
        ["names no base", "adapter_path"],
    ),
    "a config that is no JSON": (model_file("config.json", b"{"), ["config", "cannot be loaded"]),
    "a config that is a list": (model_file("config.json", b"[]"), ["config", "cannot be loaded"]),
    "a config without a kind": (model_file("config.json", b"{}"), ["config", "cannot be loaded"]),
    "a kind that is not known": (config_json(model_type="nothing"), ["config", "nothing"]),
    "weights of another size": (config_json(hidden_size=48), ["model", "cannot be loaded"]),
    "more layers than weights": (config_json(num_hidden_layers=5), ["lacks", "model.layers.4"]),
    "weights that are missing": (without("*.safetensors"), ["model.safetensors"]),
    "weights that are empty": (model_file("model.safetensors", b""), ["cannot be loaded", "fetch it again"]),
    "weights cut short": (model_file("model.safetensors", lambda x: x[:-9]), ["cannot be loaded", "fetch it again"]),
    "weights that are none": (model_file("model.safetensors", GARBAGE), ["cannot be loaded", "fetch it again"]),
    "a file of the weights missing": (shard_missing, ["model-", "cannot be loaded"]),
    "one weight missing": (weight_missing, ["lacks 1 weight", "model.layers.2.mlp.up_proj.weight"]),
    "a pickle that runs code": (pickle_that_runs_code, ["cannot be loaded"]),
    "a model with code of its own": (model_with_code, ["code of its own", "trust_remote_code"]),
    "no tokenizer": (without("tokenizer*", "special*", "chat*"), ["tokenizer"]),
    "a tokenizer that is damaged": (model_file("tokenizer.json", b"{"), ["tokenizer", "cannot be loaded"]),
    "an encoder-decoder": (other_model(t5), ["encoder-decoder", "causal LM"]),
    "an encoder": (other_model(bert("BertModel")), ["causal LM"]),
    "a masked LM": (other_model(bert("BertForMaskedLM")), ["masked LM", "causal LM"]),
    "an LM that looks ahead": (other_model(bert("BertLMHeadModel")), ["later tokens", "causal LM"]),
    "a vision model": (other_model(vision), ["vit", "causal LM"]),
    "no such gguf file": (setting(model="no.gguf"), ["no.gguf", "not a file"]),
    "an empty gguf file": (lambda case: {"model": case.write("a.gguf", b"")}, ["a.gguf", "fetch the file again"]),
    "a gguf file that is none": (lambda case: {"model": case.write("a.gguf", GARBAGE)}, ["a.gguf", "again"]),
    "a gguf file cut short": (lambda case: {"model": case.write("a.gguf", GGUF)}, ["a.gguf", "again"]),
    "a gguf header of nonsense": (lambda case: {"model": case.write("a.gguf", GGUF + GARBAGE)}, ["a.gguf", "again"]),
    "a file of weights": (
        lambda case: {"model": case.model() / "model.safetensors"},
        ["model.safetensors is a single file", "give the folder that it lies in"],
    ),
    "a model saved without its tokenizer": (
        other_model(gpt2, tokenizer=False),
        ["the tokenizer of ", "no tokens for any text", "save its tokenizer into the folder"],
    ),
    "a model saved without its tokenizer, whose class knows an unknown token": (
        other_model(gemma2, tokenizer=False),
        ["the tokenizer of ", "no tokens for any text"],
    ),
    "a tokenizer without any letter": (another_tokenizer("~"), ["no tokens for any text"]),
    "a tokenizer of a larger model": (
        other_model(lambda: tiny("llama", torch.float32, vocab_size=20)),
        ["the tokenizer of ", "does not fit the model", "knows 20 tokens"],
    ),
    # the data
    "no such file": (lambda case: {"data": case.tmp_path / "no.jsonl"}, ["no.jsonl", "no such file"]),
    "no such hub data set": (setting(data="nobody/nothing"), ["nobody/nothing"]),
    "no name of a data set": (setting(data="a b c"), ["a b c", "hub id"]),
    "an empty file": (data_file("a.jsonl", ""), ["a.jsonl", "no rows"]),
    "no usable column": (data_file("a.jsonl", '{"promt": "x"}'), ["promt", "prompt_column"]),
    "a column that is not there": (setting(prompt_column="promt"), ["'promt'", "did you mean 'prompt'"]),
    "a kept column that is not there": (setting(keep_columns="kind"), ["'kind'", "its columns are: prompt"]),
    "a kept column with our name": (data_file("a.jsonl", '{"prompt": "x", "mass": 1}', keep_columns="mass"), ["mass"]),
    "a broken line": (data_file("a.jsonl", '{"prompt": "x"}\n{"pro'), ["line 2", "not JSON"]),
    "rows that are no objects": (data_file("a.json", '["a"]'), ["no named columns"]),
    "invalid UTF-8": (data_file("a.jsonl", b'{"prompt": "\xff"}'), ["line 1", "UTF-8"]),
    "zero bytes": (data_file("a.jsonl", b"\x00" * 100), ["line 1", "not JSON"]),
    "an unknown kind of file": (data_file("a.xlsx", "prompt\nx\n"), [".xlsx", ".jsonl"]),
    "a table with ragged lines": (data_file("a.csv", "prompt\na,b\n"), ["line 2", "2 fields"]),
    "a parquet file cut short": (parquet(-20), ["a.parquet", "parquet"]),
    "a parquet file that is none": (data_file("a.parquet", GARBAGE), ["a.parquet", "parquet"]),
    "an empty data folder": (lambda case: {"data": case.write("d/readme", "x").parent}, ["data files"]),
    "a data set script": (data_set_script, ["scripted"]),
    "an offset beyond the end": (setting(offset=50), ["offset 50", "5 rows"]),
    "a split of one file": (setting(dataset_split="test"), ["no splits", "dataset_split"]),
    "a revision of a local file": (setting(dataset_revision="main"), ["no revisions", "dataset_revision"]),
    # how the prompts are put
    "no room for a prompt": (setting(max_length=2), ["max_length 2", "raise max_length"]),
    "a template that is not there": (
        lambda case: {**without("chat*", "tokenizer_config.json")(case), "chat_template": "true"},
        ["no chat template"],
    ),
    "a prefill without a template": (setting(chat_template="false", prefill="Yes"), ["prefill", "chat template"]),
    # the layers and the sizes
    "a layer that is not there": (setting(hook_layer_name="model.layer.1"), ["model.layer.1", "nearest"]),
    "a layer's number too high": (setting(hook_layer_name=4), ["layer 4", "0 to 3"]),
    "a layer given twice": (setting(hook_layer_name="1,model.layers.1"), ["model.layers.1", "twice"]),
    "a module that is never called": (setting(hook_layer_name="model.layers"), ["model.layers", "never called"]),
    "a module with another output": (setting(hook_layer_name="model.rotary_emb"), ["model.rotary_emb"]),
    "the whole model": (setting(hook_layer_name="model"), ["model", "expected"]),
    "more tokens than the vocabulary": (setting(top_k_tokens=300), ["top_k", "300", "263"]),
    "more singular values than there are": (setting(num_singular_values=10**9), ["num_singular_values", "36"]),
    "a kernel that cannot be trusted": (
        setting(kernel="layerwise", hook_layer_name="model.layers.1.mlp"),
        ["kernel layerwise", "model.layers.1.mlp", "auto"],
    ),
    # the folder
    "a file in the way": (output("file", "mine"), ["file", "not a folder"]),
    "a file as a parent": (output("file//out", "mine"), ["file/out", "--output_dir"]),
    "a path that is too long": (output("x" * 300), ["name too long", "--output_dir"]),
    "a folder of something else": (output("full//", None), ["notes.txt", "another --output_dir"]),
    "an index that was changed": (index_damaged, ["index.json", "--overwrite"]),
    "a link to nowhere": (folder_link_to_nowhere, ["out"]),
}
REAL = (
    "settings that are no YAML", "no settings file", "an unknown flag", "a negative number", "no such file",
    "no usable column", "invalid UTF-8", "a parquet file cut short", "a file in the way", "a folder of something else",
    "weights cut short", "a pickle that runs code", "a layer that is not there",
)  # fmt: skip


@pytest.fixture
def case(tmp_path, model, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # in this process; it is read at import
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    return Case(tmp_path, model)


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check_refusal(case, before, line, words):
    for word in words:
        assert word in line, line
    assert len(line) < 700
    after = contents(case.tmp_path)
    assert {path: data for path, data in after.items() if "cache" not in path.parts} == before
    assert not [path for path in after if "converting" in path.name or path.suffix == ".tmp"]


NEED_GGUF = {"an empty gguf file", "a gguf file that is none", "a gguf file cut short", "a gguf header of nonsense"}


def test_the_table_is_long_enough():
    assert len(CASES) >= 60 and len(REAL) >= 12
    assert set(CASES) > NEED_GGUF


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs("gguf")) if name in NEED_GGUF else name for name in CASES]
)
def test_bad_input_is_one_line(case, name, capfd):
    spoil, words = CASES[name]
    changes = spoil(case)
    before = contents(case.tmp_path)
    capfd.readouterr()
    assert case.run(changes) == 2
    found = capfd.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1 and found.err.startswith("fisher_vmap: "), found.err
    check_refusal(case, before, found.err, words)


@pytest.mark.parametrize("name", REAL)
def test_bad_input_to_the_real_command(case, name):
    spoil, words = CASES[name]
    changes = spoil(case)
    before = contents(case.tmp_path)
    done = real_command(case.argv(changes), cwd=case.tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    told = ("prompts are ", "settings read ", str(case.shared_model), "converting ")  # what went well before
    told += ("loading ", "opening ", "finding ", "reading ")  # on a slow machine
    lines = [line for line in done.stderr.splitlines() if not line.startswith(told)]
    assert len(lines) == 1 and lines[0].startswith("fisher_vmap: "), done.stderr
    check_refusal(case, before, lines[0], words)


def test_a_read_only_folder_is_one_line(case, monkeypatch, capsys):
    def refused(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refused)
    assert case.run({}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "read-only" in error and "--output_dir" in error


ODD_ROWS = [
    ({"prompt": "fine"}, "ok", None),
    ({"prompt": None}, "skipped", "null"),
    ({"prompt": 3}, "skipped", "int"),
    ({"prompt": ["a"]}, "skipped", "user turn"),
    ({"other": "x"}, "skipped", "null"),
    ({"prompt": ""}, "skipped", "empty"),
    ({"prompt": " \n\t "}, "skipped", "white space"),
    ({"prompt": [{"role": "assistant", "content": "x"}]}, "skipped", "user turn"),
    ({"prompt": [{"role": "user", "content": None}]}, "skipped", "no text"),
    ({"prompt": [{"role": "user", "content": "hi"}]}, "ok", None),
    ({"prompt": "\ud800"}, "skipped", "Unicode"),
    ({"prompt": "\x00\x00"}, "ok", None),
    ({"prompt": "x" * 10_000_000}, "ok", None),
    ({"prompt": "<|end|><|user|><s>"}, "ok", None),
]


def test_odd_rows_keep_their_index_and_say_why(case):
    data = case.write("odd.jsonl", "".join(json.dumps(row) + "\n" for row, _, _ in ODD_ROWS))
    assert case.run({"data": data}) == 0
    for record, (_, status, words) in zip(open_results(case.out), ODD_ROWS, strict=True):
        assert record.status == status and (record.reason is None) == (status == "ok"), record.reason
        assert words is None or words in record.reason


def test_a_run_of_skipped_prompts_alone(case, caplog):
    caplog.set_level("INFO", "fisher_vmap")
    assert case.run({"data": write_prompts(case.tmp_path / "blank.jsonl", ["", " ", None]), "strict": "true"}) == 0
    assert [record.status for record in open_results(case.out)] == ["skipped"] * 3
    last = caplog.records[-1]
    assert last.levelname == "WARNING"
    assert last.getMessage() == "none of 3 prompts has results: prompt 0 was skipped: empty text"


def test_settings_that_are_empty_leave_the_rest(case):
    assert case.run({"argv": ["--config", case.write("settings.yaml", "")]}) == 0


def test_a_tokenizer_with_more_tokens_than_the_model(case):
    small = save_model(case.tmp_path / "small", tiny("llama", torch.float32, vocab_size=80))
    data = write_prompts(case.tmp_path / "p.jsonl", ["abc", "ABC", "~~~"])
    settings = {"model": small, "data": data, "chat_template": "false"}
    assert case.run({**settings, "strict": "true"}) == 3
    found = {record.text: record for record in open_results(case.out)}
    assert found["ABC"].status == "ok"
    assert found["~~~"].status == "failed" and "the model knows 80" in found["~~~"].reason


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_prompt_longer_than_the_models_positions_is_cut(case, family):
    folder = save_model(case.tmp_path / family, tiny(family, torch.float32, vocab_size=VOCABULARY))
    data = write_prompts(case.tmp_path / "p.jsonl", ["x" * 500, "short"])
    assert case.run({"model": folder, "data": data, "hook_layer_name": FAMILIES[family][2].format(1)}) == 0
    assert open_results(case.out).to_pandas()["tokens"][0] == 128
    assert [record.status for record in open_results(case.out)] == ["ok", "ok"]


def test_a_folder_that_is_not_there_beside_others_is_looked_for_on_the_hub(case, caplog, monkeypatch):
    monkeypatch.chdir(case.tmp_path)
    caplog.set_level("INFO", "fisher_vmap")
    said = "there is no folder full/nope (but there is full); looking on the hub"
    assert case.run({"model": "full/nope"}) == 2 and said in caplog.text
    caplog.clear()
    assert case.run({"model": "nobody/nope"}) == 2 and "looking on the hub" not in caplog.text


def test_a_checkpoint_of_tensors_in_a_pickle_is_read(case):
    folder = case.model()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert case.run({"model": folder}) == 0


def test_a_user_who_trusts_the_code_gets_it_run(case):
    changes = model_with_code(case)
    assert case.run({**changes, "trust_remote_code": "true"}) == 2  # it is no model after all
    assert (case.tmp_path / "code was run").exists()
