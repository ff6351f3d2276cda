"""`model_kwargs`: what reaches the model, what is refused in one line, and what a folder keeps of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_cases import VOCABULARY
from models import tiny
from source_cases import agrees, base, run, save, stored, with_tokenizer

from fisher_vmap import UserError, load_model, open_results
from fisher_vmap.load.options import kwargs_of_results

ROPE = {"rope_type": "linear", "factor": 4.0}


def written(folder, **changes):
    """A copy of a model's folder with other values in its config.json; of its model, an ordinary one."""
    import transformers

    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("given", "in_the_file"),
    [
        ("{rope_theta: 300.0}", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("{rope_scaling: {type: linear, factor: 4.0}}", {"rope_parameters": ROPE | {"rope_theta": 10000.0}}),
        ("{rope_parameters: {rope_type: linear, factor: 4.0, rope_theta: 50.0}}",
         {"rope_parameters": ROPE | {"rope_theta": 50.0}}),
        ("{num_hidden_layers: 3}", {"num_hidden_layers": 3}),
        ("{rms_norm_eps: 5e-1}", {"rms_norm_eps": 0.5}),
        ("{rope_theta: 3e2}", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    ],
)  # fmt: skip
def test_a_value_of_the_configuration_is_that_value_in_its_file(model, tmp_path, capsys, given, in_the_file):
    other = shutil.copytree(model, tmp_path / "other")
    oracle = written(other, **in_the_file)
    out = run(model, tmp_path, model_kwargs=given)
    agrees(out, oracle, 2e-4)
    plain = stored(run(model, tmp_path, out=tmp_path / "plain"))
    assert max(abs(S - S_plain).max() / S_plain.max() for (S, _), (S_plain, _) in zip(stored(out), plain)) > 1e-3  # noqa: B905
    run(model, tmp_path, code=2)
    assert "model_kwargs" in capsys.readouterr().err
    run(model, tmp_path, model_kwargs=given)


def test_a_new_wavelength_keeps_the_scaling_and_the_other_way_round(tmp_path):
    folder = save(tmp_path / "model", base())
    written(folder, rope_parameters=ROPE | {"rope_theta": 777.0})
    for given, expected in (
        ({"rope_theta": 5.0}, ROPE | {"rope_theta": 5.0}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ROPE | {"factor": 2.0, "rope_theta": 777.0}),
    ):
        config = load_model(str(folder), dtype="float32", device="cpu", model_kwargs=given).model.config
        assert {name: config.rope_parameters[name] for name in expected} == expected


def test_a_window_and_the_kinds_of_layers_that_follow_from_it(tmp_path):
    folder = save(tmp_path / "mistral", tiny("mistral", torch.float32, vocab_size=VOCABULARY, sliding_window=None))
    loaded = load_model(str(folder), dtype="float32", device="cpu", model_kwargs={"sliding_window": 3}).model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        full = load_model(str(folder), dtype="float32", device="cpu").model(ids).logits
        assert (
            (loaded(ids).logits - full)[0, 2].abs().max() < 1e-5 < 1e-3 < (loaded(ids).logits - full)[0, 9].abs().max()
        )
    folder = save(tmp_path / "qwen3", tiny("qwen3", torch.float32, vocab_size=VOCABULARY))
    with pytest.raises(UserError, match="makes None of it"):
        load_model(str(folder), device="cpu", model_kwargs={"sliding_window": 3})
    with pytest.raises(UserError, match="give layer_types as well"):
        load_model(str(folder), device="cpu", model_kwargs={"sliding_window": 3, "use_sliding_window": True})
    few = load_model(str(folder), device="cpu", model_kwargs={"num_hidden_layers": 2}).model
    assert len(few.model.layers) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{dtype: float16}", ["'dtype'", "setting of its own", "give dtype"]),
        ("{torch_dtype: float16}", ["give dtype"]),
        ("{device_map: auto}", ["give device_map"]),
        ("{load_in_4bit: true}", ["give quantization"]),
        ("{quantization_config: {load_in_8bit: true}}", ["give quantization"]),
        ("{revision: main}", ["give model_revision"]),
        ("{trust_remote_code: true}", ["give trust_remote_code"]),
        ("{attn_implementation: eager}", ["give attn_implementation"]),
        ("{max_memory: {cpu: 1GB}}", ["give max_memory"]),
        ("{slidng_window: 3}", ["'slidng_window'", "LlamaConfig"]),
        ("{rope_thetta: 3}", ["did you mean 'rope_theta'"]),
        ("{local_file_only: true}", ["did you mean 'local_files_only'"]),
        ("{temperature: 0.5}", ["'temperature'", "LlamaConfig"]),
        ("{return_dict: false}", ["'return_dict'"]),
        ("{model_type: gpt2}", ["'model_type'"]),
        ("{use_safetensors: certainly}", ["use_safetensors", "str", "bool"]),
        ("{subfolder: 3}", ["subfolder", "int", "str"]),
        ("{subfolder: nowhere}", ["no folder nowhere"]),
        ("{hidden_size: wide}", ["check model_kwargs"]),
        ("{intermediate_size: 7}", ["check model_kwargs"]),
        ("{num_hidden_layers: 9}", ["lacks", "model.layers.4", "check model_kwargs"]),
        ("{rope_scaling: linear}", ["rope_scaling", "mapping"]),
        ("{rope_scaling: {rope_type: spiral, factor: 2.0}}", ["check model_kwargs"]),
        ("{variant: fp16}", ["cannot be loaded", "check model_kwargs"]),
        ("rope_theta=3", ["model_kwargs", "mapping"]),
    ],
)  # fmt: skip
def test_what_cannot_be_given_is_refused_in_one_line(model, tmp_path, capsys, given, words):
    run(model, tmp_path, code=2, model_kwargs=given)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words) and "Traceback" not in line, line


def test_a_subfolder_a_variant_and_pickled_weights(model, tmp_path, caplog):
    oracle = base()
    inside = shutil.copytree(model, tmp_path / "outer" / "inside").parent
    agrees(run(inside, tmp_path, out=tmp_path / "a", model_kwargs="{subfolder: inside}"), oracle, 2e-4)
    for path in (inside / "inside").glob("*token*"):
        path.rename(inside / path.name)
    (inside / "inside" / "chat_template.jinja").rename(inside / "chat_template.jinja")
    caplog.set_level("INFO")
    agrees(run(inside, tmp_path, out=tmp_path / "b", model_kwargs="{subfolder: inside}"), oracle, 2e-4)
    assert "the subfolder inside has no tokenizer" in caplog.text

    other = copied(tmp_path / "variant", model)
    (other / "model.safetensors").rename(other / "model.fp16.safetensors")
    agrees(run(other, tmp_path, out=tmp_path / "c", model_kwargs="{variant: fp16}"), oracle, 2e-4)

    pickled = copied(tmp_path / "pickled", model)
    torch.save(oracle.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").write_bytes(b"damaged")
    out = run(pickled, tmp_path, out=tmp_path / "d", model_kwargs="{use_safetensors: false}")
    agrees(out, oracle, 2e-4)
    torch.save({n: 1.1 * t for n, t in oracle.state_dict().items()}, pickled / "pytorch_model.bin")
    run(pickled, tmp_path, out=tmp_path / "d", code=2, model_kwargs="{use_safetensors: false}")


def copied(folder, model):
    return shutil.copytree(model, folder)


@pytest.mark.parametrize("given", ["{token: hf_aSecret}", "{cache_dir: /the/cache}", "{local_files_only: true}"])
def test_what_changes_no_result_is_no_other_run_and_no_secret_is_kept(model, tmp_path, capsys, caplog, given):
    caplog.set_level("DEBUG")
    out = run(model, tmp_path, model_kwargs=given)
    run(model, tmp_path)  # the same run without it
    run(model, tmp_path, model_kwargs=given)
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    said = capsys.readouterr().err.encode() + caplog.text.encode()
    for secret in (b"hf_aSecret", b"/the/cache"):
        assert secret not in everything and secret not in said
    assert open_results(out).index.fingerprint.get("model_kwargs") is None


def test_an_error_of_the_hub_does_not_tell_the_token(monkeypatch):
    def refused(*_args, **options):
        raise ValueError(f"Illegal header value b'Bearer {options['token']}'")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refused)
    monkeypatch.setattr("fisher_vmap.load.model.find_adapter", lambda *_a, **_k: None)
    with pytest.raises(UserError) as raised:
        load_model("owner/name", device="cpu", model_kwargs={"token": "hf_aSecret"})
    assert "hf_aSecret" not in str(raised.value) and "the token" in str(raised.value)


def test_the_arguments_of_a_download_reach_every_download(monkeypatch):
    seen = {}

    def note(name, result):
        def call(*_args, **options):
            seen[name] = options
            return result

        return call

    config = base().config
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", note("adapter", None))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", note("config", config))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", note("tokenizer", None))
    stop = note("model", None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", stop)
    given = {"token": "hf_x", "cache_dir": "/c", "local_files_only": True, "force_download": False}
    with pytest.raises(TypeError):  # the model is None
        load_model("owner/name", device="cpu", revision="v2", model_kwargs=given)
    for name in ("adapter", "config", "tokenizer", "model"):
        assert given.items() <= seen[name].items() and seen[name]["revision"] == "v2", name


def test_what_results_depend_on():
    given = {"token": "x", "cache_dir": "c", "subfolder": "s", "rope_theta": 3.0, "disable_mmap": True}
    assert kwargs_of_results(given) == {"subfolder": "s", "rope_theta": 3.0}
    assert kwargs_of_results({"token": "x"}) is kwargs_of_results(None) is None


def test_a_folder_of_an_earlier_version_carries_on(model, tmp_path):
    from fisher_vmap.results.index import read_index, write_index

    out = run(model, tmp_path)
    index = read_index(out)
    new = ("model_kwargs", "attn_implementation", "quantization")
    assert not set(new) & set(index.fingerprint)  # as they were before these settings
    write_index(out, index)
    before = stored(out)
    run(model, tmp_path)
    for (S, _), (S_before, _) in zip(stored(out), before, strict=True):
        np.testing.assert_array_equal(S, S_before)


def test_a_plan_counts_the_changed_model(model, tmp_path, capsys):
    from command_cases import write_prompts
    from source_cases import PROMPTS

    from fisher_vmap.run.plan_model import skeleton_of
    from fisher_vmap.run.settings import Settings

    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    settings = {"model_path": str(model), "hook_layer_name": 1, "dtype": "float32"}
    assert len(skeleton_of(Settings(**settings)).blocks) == 4
    assert len(skeleton_of(Settings(**settings, model_kwargs={"num_hidden_layers": 2})).blocks) == 2
    with pytest.raises(UserError, match="did you mean 'rope_theta'"):
        skeleton_of(Settings(**settings, model_kwargs={"rope_tetta": 2}))


def test_a_tokenizer_in_the_folder_is_needed_once(tmp_path):
    folder = with_tokenizer(save(tmp_path / "model", base()))
    assert load_model(str(folder), device="cpu", model_kwargs={"low_cpu_mem_usage": True}).tokenizer is not None
