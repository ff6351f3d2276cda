"""Exports, read back with the libraries that they are for."""

import json
import logging

import numpy as np
import pytest
from report_cases import planted, write_factors
from results_cases import make_layout, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file

from fisher_vmap.direction_files import Direction, save_control_vector, save_directions, save_neuronpedia
from fisher_vmap.errors import UserError
from fisher_vmap.export import main
from fisher_vmap.results.reader import open_results

pytestmark = [pytest.mark.usefixtures("no_power_cuts"), pytest.mark.needs("gguf")]

LAYERS = ("model.layers.2", "model.layers.5")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    factors = {layer: planted("common", i, count=40, width=20 + i)[0] for i, layer in enumerate(LAYERS)}
    return write_factors(tmp_path_factory.mktemp("results") / "out", factors, keep_columns=("kind",))


def control_vector(path):
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: reader.get_field(name).contents() for name in
              ("general.architecture", "controlvector.model_hint", "controlvector.layer_count")}  # fmt: skip
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def run(results, out, *arguments):
    assert main([str(results.folder), str(out), *map(str, arguments)]) == 0


def test_a_control_vector_is_what_llama_cpp_and_repeng_read(tmp_path):
    vectors = {"model.layers.3": np.arange(8.0), "model.layers.12": np.ones(8, np.float64)}
    save_control_vector(tmp_path / "v.gguf", vectors, "llama")
    fields, tensors = control_vector(tmp_path / "v.gguf")
    assert fields == {
        "general.architecture": "controlvector", "controlvector.model_hint": "llama", "controlvector.layer_count": 2,
    }  # fmt: skip
    assert set(tensors) == {"direction.3", "direction.12"}
    assert tensors["direction.3"].dtype == np.float32 and tensors["direction.3"].shape == (8,)
    np.testing.assert_array_equal(tensors["direction.3"], np.arange(8.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.gguf"]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"model.layers.0": np.ones(4)}, "block 0, which llama.cpp cannot steer"),
        ({"model.layers.3.mlp": np.ones(4)}, "is not a block of the model"),
        ({"model.layers.3": np.ones((2, 4))}, "one direction a layer"),
        ({"model.layers.3": np.full(4, np.nan)}, "not finite"),
    ],
)
def test_what_is_no_control_vector(tmp_path, vectors, message):
    with pytest.raises(UserError, match=message):
        save_control_vector(tmp_path / "v.gguf", vectors, "llama")
    with pytest.raises(UserError, match="cannot write"):
        save_directions(tmp_path / "none" / "v.safetensors", {"a": np.ones(3)})


def test_directions_of_the_mean(results, tmp_path):
    run(results, tmp_path / "m.safetensors", "--directions", 3)
    found = load_file(tmp_path / "m.safetensors")
    for layer in LAYERS:
        np.testing.assert_allclose(found[layer], results.directions(3, layer=layer).V, atol=1e-6)
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        assert file.metadata()["source"] == "all prompts" and file.metadata()["model"] == "tiny"  # of /models/tiny


def test_directions_of_a_prompt_at_one_layer_in_residual_norms(results, tmp_path):
    run(results, tmp_path / "p.safetensors", "--prompt", 4, "--layer", LAYERS[1], "--first", 1, "--directions", 2,
        "--scale", -0.5)  # fmt: skip
    found = load_file(tmp_path / "p.safetensors")
    assert list(found) == [LAYERS[1]]
    np.testing.assert_allclose(found[LAYERS[1]], -0.5 * 5.0 * results.at(LAYERS[1])[4].V[1:3], rtol=1e-5)


def test_a_group_against_the_rest_as_a_control_vector(results, tmp_path):
    run(
        results,
        tmp_path / "c.gguf",
        "--where",
        "kind=kind 1",
        "--against",
        "rest",
        "--scale",
        0.1,
        "--model-type",
        "llama",
    )
    _, tensors = control_vector(tmp_path / "c.gguf")
    assert set(tensors) == {"direction.2", "direction.5"}
    expected = results.contrast({"kind": "kind 1"}, layer=LAYERS[0]).directions[0]
    np.testing.assert_allclose(tensors["direction.2"], 0.1 * 5.0 * expected, rtol=1e-4, atol=1e-7)


def test_a_group_against_another(results, tmp_path):
    run(results, tmp_path / "c.safetensors", "--where", "kind=kind 1", "--against", "kind=kind 0", "--ridge", 0.1)
    expected = results.contrast({"kind": "kind 1"}, {"kind": "kind 0"}, ridge=0.1).directions[:1]
    np.testing.assert_allclose(load_file(tmp_path / "c.safetensors")[LAYERS[0]], expected, atol=1e-6)


def test_the_npz_of_a_folder_that_has_none(results, tmp_path):
    run(results, tmp_path / "all.npz", "--layer", LAYERS[0])
    with np.load(tmp_path / "all.npz") as archive:
        assert len(archive.files) == 3 * 40
        np.testing.assert_array_equal(archive["V_7"], results[7].V)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.gguf"], "does not say what kind of model"),
        (["x.npz"], "an npz is of one layer; name it with --layer"),
        (["x.txt"], "ends in .txt; expected .safetensors"),
        (["x.safetensors", "--layer", "model.layers.9"], "'model.layers.9' was not hooked"),
        (["x.safetensors", "--prompt", "40"], "there is no prompt 40; there are 0 to 39"),
        (["x.safetensors", "--prompt", "4", "--first", "7", "--directions", "2"], "directions 7 to 8 were asked for"),
        (["x.safetensors", "--where", "kind"], "expected COLUMN=VALUE, of kind, prompt_index"),
        (["x.safetensors", "--layer", "9"], "layer 9 was not hooked"),
        (["x.gguf", "--directions", "3"], "a control vector holds one direction a layer"),
        (["x.safetensors", "--directions", "0"], "--directions is 0; expected at least 1"),
        (["x.safetensors", "--first", "-1"], "--first is -1; expected 0"),
        (["x.gguf", "--scale", "0"], "--scale is 0; expected a length"),
        (["x.gguf", "--kl", "0"], "--kl is 0; expected nats above zero, such as 0.1"),
        (["x.json", "--kl", "inf"], "--kl is inf; expected nats above zero"),
        (["x.npz", "--layer", "2", "--kl", "1"], "every prompt's U, S and V as they are; leave --kl out"),
        (["x.json", "--scale", "0.1"], "the vectors of a .json have length 1, and strengths by --kl"),
        (["x.gguf", "--model-id", "gpt2-small"], "--model-id is Neuronpedia's name of the model, in a .json"),
        (["x.safetensors", "--scale", "nan"], "--scale is nan; expected a length"),
        (["x.npz", "--layer", "2", "--prompt", "3"], "every prompt's U, S and V as they are; leave --prompt out"),
        (["x.safetensors", "--where", "kind=9"], "no prompt has kind '9'; there is kind 0, kind 1, kind 2"),
    ],
)
def test_mistakes_are_one_line(results, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(results.folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and list(tmp_path.iterdir()) == []


def test_a_layer_by_its_number(results, tmp_path):
    run(results, tmp_path / "n.safetensors", "--layer", 5)
    assert list(load_file(tmp_path / "n.safetensors")) == ["model.layers.5"]


def test_block_0_is_left_out_of_a_control_vector_unless_it_is_named(tmp_path, capsys):
    layers = {f"model.layers.{i}": planted("common", i, count=6, width=14)[0] for i in range(12)}
    results, out = write_factors(tmp_path / "out", layers), tmp_path / "all.gguf"
    run(results, out, "--model-type", "llama")
    assert set(control_vector(out)[1]) == {f"direction.{i}" for i in range(1, 12)}
    said = capsys.readouterr()
    assert said.err == "fisher_vmap: model.layers.0 is left out: llama.cpp cannot steer block 0\n"
    assert said.out.endswith(" at model.layers.1 ... model.layers.11, 11 in all\n")
    for arguments in (["--layer", "0"], ["--layer", "0", "--layer", "3"]):
        assert main([str(results.folder), str(out), "--model-type", "llama", *arguments]) == 2
        assert "is block 0, which llama.cpp cannot steer; take a higher layer" in capsys.readouterr().err
    run(results, tmp_path / "all.safetensors")
    assert "model.layers.0" in load_file(tmp_path / "all.safetensors")


def test_a_prompt_that_failed(tmp_path, capsys):
    write_folder(tmp_path / "out", 10, make_layout())
    assert main([str(tmp_path / "out"), str(tmp_path / "x.safetensors"), "--prompt", "2"]) == 2
    assert "prompt 2 has no directions: it failed (not finite)" in capsys.readouterr().err
    assert main([str(tmp_path / "out"), str(tmp_path / "x.safetensors"), "--prompt", "3"]) == 2
    assert "prompt 3 has no directions: it was skipped (empty prompt)" in capsys.readouterr().err


def test_a_folder_that_kept_the_mean_alone(tmp_path):
    factors = planted("common", 0, count=40, width=20)[0]
    keeping = write_factors(tmp_path / "all", {"model.layers.2": factors})
    alone = write_factors(tmp_path / "mean", {"model.layers.2": factors}, means_only=True)
    for folder in (keeping, alone):
        run(folder, folder.folder.with_suffix(".safetensors"), "--scale", 1)
    found = [load_file(tmp_path / f"{name}.safetensors")["model.layers.2"] for name in ("all", "mean")]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found[0]), open_results(tmp_path / "mean").residual_norm(), rtol=1e-6)


def neuronpedia(results, out, *arguments):
    run(results, out, *arguments)
    return json.loads(out.read_text())


@pytest.mark.parametrize("prompt", [0, 4, 39])
def test_neuronpedia_vectors_of_a_prompt(results, tmp_path, prompt):
    vectors = neuronpedia(results, tmp_path / "n.json", "--prompt", prompt, "--directions", 2, "--kl", 0.02)
    assert [(v["layerNumber"], v["hookType"]) for v in vectors] == [(n, "hook_resid_post") for n in (2, 2, 5, 5)]
    for vector, layer, number in zip(vectors, np.repeat(LAYERS, 2), (0, 1, 0, 1), strict=True):
        assert set(vector) == {
            *("modelId", "layerNumber", "hookType", "vector", "vectorDefaultSteerStrength", "vectorLabel")
        }
        record = results.at(layer)[prompt]
        np.testing.assert_array_equal(np.float32(vector["vector"]), record.V[number] / np.linalg.norm(record.V[number]))
        step = vector["vectorDefaultSteerStrength"] * np.array(vector["vector"])
        assert 0.5 * step @ record.matrix().astype(np.float64) @ step == pytest.approx(0.02, rel=1e-4)
        assert vector["vectorLabel"] == f"direction {number} of prompt {prompt}, {layer}"


@pytest.mark.parametrize(
    "group", [[], ["--where", "kind=kind 1"], ["--where", "kind=kind 1", "--against", "rest"], ["--first", 3]]
)
def test_neuronpedia_strengths_are_of_the_matrix_that_the_direction_is_of(results, tmp_path, group):
    vectors = neuronpedia(results, tmp_path / "n.json", *group, "--layer", 5)
    mean = results.mean(5, where={"kind": "kind 1"} if "--where" in group else None).astype(np.float64)
    (vector,) = vectors
    unit = np.array(vector["vector"])
    assert vector["vectorDefaultSteerStrength"] == pytest.approx(np.sqrt(2 * 0.1 / (unit @ mean @ unit)), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("google/gemma-2-2b", [], "gemma-2-2b"),
        ("/home/zuse/models/GPT2-small", [], "gpt2-small"),
        ("meta-llama/Llama-3.1-8B", ["--model-id", "llama3.1-8b"], "llama3.1-8b"),
    ],
)
def test_the_model_of_neuronpedia_vectors(tmp_path, caplog, model, given, expected):
    write_folder(tmp_path / "out", 6, make_layout({"h.0": 7}), settings={"model_path": model})
    with caplog.at_level(logging.INFO, "fisher_vmap"):
        vectors = neuronpedia(open_results(tmp_path / "out"), tmp_path / "n.json", *given)
    assert [v["modelId"] for v in vectors] == [expected] and vectors[0]["layerNumber"] == 0
    said = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert any(f"modelId: {expected}, by the model's name" in line for line in said) == (not given)
    assert any("predicted KL of 0.1 nats" in line and "--kl" in line for line in said)


@pytest.mark.parametrize(
    ("layer", "direction", "message"),
    [
        ("model.layers.3.mlp", Direction(np.ones(4), 1.0, "d"), "is not a block of the model"),
        ("lm_head", Direction(np.ones(4), 1.0, "d"), "is not a block of the model"),
        ("model.layers.3", Direction(np.full(4, np.nan), 1.0, "d"), "not finite"),
        ("model.layers.3", Direction(np.ones(4), 0.0, "direction 7"), "direction 7 changes nothing"),
        ("model.layers.3", Direction(np.ones(4), np.nan, "d"), "d changes nothing: no length of it has a KL of 0.1"),
    ],
)
def test_what_is_no_vector_for_neuronpedia(tmp_path, layer, direction, message):
    with pytest.raises(UserError, match=message):
        save_neuronpedia(tmp_path / "n.json", {layer: [direction]}, "gpt2-small")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kl", [0.01, 0.1, 2.0])
def test_lengths_by_the_kl_that_they_are_predicted_to_have(results, tmp_path, kl):
    run(results, tmp_path / "k.safetensors", "--prompt", 7, "--kl", kl)
    run(results, tmp_path / "k.gguf", "--prompt", 7, "--kl", kl, "--model-type", "llama")
    found, tensors = load_file(tmp_path / "k.safetensors"), control_vector(tmp_path / "k.gguf")[1]
    for layer in LAYERS:
        step = found[layer][0]
        assert 0.5 * results.at(layer)[7].quadratic(step) == pytest.approx(kl, rel=1e-4)
        np.testing.assert_array_equal(tensors[f"direction.{layer.rpartition('.')[2]}"], step)
    with safe_open(tmp_path / "k.safetensors", "np") as file:
        assert file.metadata()["kl"] == str(kl)


@pytest.mark.parametrize("name", ["mean.safetensors", "mean.gguf", "mean.json", "all.npz"])
@pytest.mark.parametrize("model", ["/home/zuse/models/tiny", "C:\\Users\\zuse\\tiny", "~/zuse/tiny", "../zuse/tiny/"])
def test_no_path_of_this_machine_is_in_a_file(tmp_path, monkeypatch, name, model):
    monkeypatch.chdir(tmp_path)
    settings = {"model_path": model, "dataset_name": f"{model}/p.jsonl", "output_dir": "/scratch/zuse/out"}
    write_folder(tmp_path / "out", 6, make_layout({"model.layers.1": 7}), settings=settings)
    assert main(["out", name, *(["--model-type", "llama"] if name.endswith("gguf") else [])]) == 0
    data = (tmp_path / name).read_bytes()
    assert b"zuse" not in data.lower() and str(tmp_path).encode() not in data
    assert b"tiny" in data or not name.endswith(("safetensors", "json"))


@pytest.mark.parametrize("resolved", [{"local_paths": []}, {"local_paths": ["model_path"]}, None])
def test_the_id_of_a_model_on_the_hub_stays_whole(tmp_path, monkeypatch, resolved):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    settings = {"model_path": "owner/name"}
    write_folder(tmp_path / "out", 6, make_layout({"model.layers.1": 7}), settings=settings, resolved=resolved)
    assert main(["out", "mean.safetensors"]) == 0
    with safe_open("mean.safetensors", "np") as file:
        assert file.metadata()["model"] == ("name" if (resolved or {}).get("local_paths") else "owner/name")
