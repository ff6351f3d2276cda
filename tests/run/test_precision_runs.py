"""A run's precision: chosen by the processor, stored, repeated by whoever carries on, and refused where it differs."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml
from command_cases import LAYER, VOCABULARY, numbers_of, run_here, save_model, texts, tiny_tokenizer, write_prompts
from models import tiny
from oracles import plain_scores, relative
from precision_cases import FAST, SLOW, NarrowProducts
from transformers import AutoModelForCausalLM

from fisher_vmap import open_results
from fisher_vmap.model import precision, widening
from fisher_vmap.results.index import read_index
from fisher_vmap.verify.__main__ import main as verify

PROMPTS = texts(10)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tiny("llama", torch.bfloat16, vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl", PROMPTS)


@pytest.fixture
def run(model, data, monkeypatch):
    """The command with the default precision and a bfloat16 model, on a processor of some kind."""

    def command(out, rates, **settings):
        monkeypatch.setattr(precision, "product_rates", lambda *_: rates)
        return run_here(model, data, out, **{"dtype": "bfloat16", **settings})

    return command


def test_the_default_is_float32_where_that_is_faster_and_nothing_is_multiplied_in_bfloat16(run, model, tmp_path):
    with NarrowProducts() as seen:
        assert run(tmp_path / "auto", SLOW, num_singular_values=6) == 0
    assert seen.all > 100 and not seen.narrow
    assert run(tmp_path / "wide", FAST, dtype="float32", num_singular_values=6) == 0
    assert [*numbers_of(tmp_path / "auto").values()] == [*numbers_of(tmp_path / "wide").values()]
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).double()
    for record in open_results(tmp_path / "auto"):
        chat = [{"role": "user", "content": record.text}]
        ids = torch.tensor(tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        expected = plain_scores(truth, ids, LAYER, token_ids=torch.tensor(record.token_ids))
        assert relative(torch.tensor(record.matrix().astype(np.float64)), expected.fisher) < 1e-4


def test_the_folder_says_what_was_chosen_and_why(run, tmp_path):
    for rates, name in ((SLOW, "float32"), (FAST, "model")):
        out = tmp_path / name
        assert run(out, rates) == 0
        stored = read_index(out).resolved["precision"]
        assert stored == yaml.safe_load((out / "metadata.yaml").read_text())["resolved"]["precision"]
        assert stored["chosen"] == name and stored["gflops"]["narrow"] == list(rates.narrow)
        assert "GFLOP/s" in stored["why"] and read_index(out).fingerprint["precision"] == name
        assert verify([str(out)]) == 0


@pytest.mark.parametrize(("first", "then"), [(SLOW, FAST), (FAST, SLOW)])
def test_a_resumed_run_repeats_the_choice_to_the_bit_on_another_processor(run, tmp_path, caplog, first, then):
    assert run(tmp_path / "whole", first) == 0
    assert run(tmp_path / "parts", first, num_prompts=4) == 0
    caplog.set_level(logging.INFO, "fisher_vmap")
    caplog.clear()
    assert run(tmp_path / "parts", then) == 0
    name = "float32" if first is SLOW else "model"
    assert f"precision: {name}, as in {tmp_path / 'parts'}" in caplog.text
    assert numbers_of(tmp_path / "parts") == numbers_of(tmp_path / "whole")
    other = "model" if first is SLOW else "float32"
    assert run(tmp_path / "parts", then, precision=other) == 2
    assert run(tmp_path / "parts", then, precision=other, overwrite=True) == 0


def test_another_precision_in_the_same_folder_is_refused_by_name(run, tmp_path, capsys):
    assert run(tmp_path / "out", SLOW) == 0
    assert run(tmp_path / "out", SLOW, precision="model") == 2
    assert f"precision is model here but float32 in {tmp_path / 'out'}" in capsys.readouterr().err
    assert run(tmp_path / "out", FAST, precision="float32") == 0  # the same by another name


def test_a_folder_of_before_there_was_a_choice_is_carried_on_as_it_was(run, tmp_path):
    """Its fingerprint says model, and its settings that nothing else was to be had."""
    assert run(tmp_path / "whole", SLOW, precision="model") == 0
    assert run(tmp_path / "out", SLOW, precision="model", num_prompts=4) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["fingerprint"]["precision"] == "model"
    assert run(tmp_path / "out", SLOW) == 0
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "whole")


def test_without_room_for_wide_weights_the_numbers_are_the_same(run, tmp_path, monkeypatch):
    assert run(tmp_path / "room", SLOW) == 0
    monkeypatch.setattr(widening, "has_room", lambda *_: False)
    with NarrowProducts() as seen:
        assert run(tmp_path / "none", SLOW) == 0
    assert not seen.narrow and numbers_of(tmp_path / "none") == numbers_of(tmp_path / "room")


def test_kl_is_measured_in_float32(run, tmp_path):
    assert run(tmp_path / "out", SLOW, top_k_tokens=200, num_singular_values=20) == 0
    with NarrowProducts() as seen:
        verify([str(tmp_path / "out"), "--kl", "--prompts", "2"])
    assert seen.all > 10 and not seen.narrow
