"""Models spread by `device_map`, over memory and disk: the scores are those of the model in one place."""

import json
import shutil

import numpy as np
import pytest
import torch
from oracles import plain_scores, relative
from source_cases import PLACES, PROMPTS, agrees, base, run, stored

from fisher_vmap import FisherModel, load_model


def test_a_device_map_on_the_cpu_is_the_model_on_the_cpu(model, tmp_path):
    out = run(model, tmp_path, device="auto", device_map="auto")
    agrees(out, base(), 2e-4)


def test_blocks_on_disk_are_fetched_as_they_are_needed(model, tmp_path):
    out = run(model, tmp_path, device="auto", device_map=json.dumps(PLACES))
    agrees(out, base(), 2e-4)


@pytest.mark.parametrize("kernel", ["auto", "whole", "loop"])
def test_every_form_and_both_products_with_blocks_on_disk(model, kernel):
    loaded = load_model(str(model), dtype="float32", device_map=PLACES).model
    offloaded = {name for name, parameter in loaded.named_parameters() if parameter.is_meta}
    opened = FisherModel(loaded, layers=[0, 2], top_k=3, kernel=kernel)
    ids = torch.arange(9)[None]
    scores = opened.scores(ids)
    for layer in opened.layers:
        plain = plain_scores(base(), ids[0], layer, token_ids=scores.token_ids[0])
        assert relative(scores.gradients[layer][0], plain.gradients) < 2e-4
    if kernel == "auto":
        with pytest.raises(ValueError, match=r"precision mixed .* are offloaded"):
            opened.scores(ids, precision="mixed")
        with opened.linearize(ids) as net, FisherModel(base(), layers=[0, 2]).linearize(ids) as other:
            v = torch.randn(1, 2, 64)
            torch.testing.assert_close(
                net.pushforward(v, opened.layers[0]), other.pushforward(v, opened.layers[0]), rtol=1e-3, atol=1e-4
            )
            assert relative(net.metric(opened.layers[0]).product(v), other.metric(opened.layers[0]).product(v)) < 1e-4
    assert offloaded == {name for name, parameter in loaded.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cpu", "device_map": "auto"}, ["device", "device_map", "one of the two"]),
        ({"device": "auto", "max_memory": "{cpu: 1GiB}"}, ["max_memory", "device_map"]),
        ({"device": "auto", "device_map": '{"": cuda:7}'}, ["cannot be loaded"]),
        ({"device": "auto", "device_map": "everywhere"}, ["device_map", "balanced"]),
        ({"device": "auto", "device_map": "auto", "max_memory": "{cpu: much}"}, ["max_memory", "20GiB"]),
    ],
)
def test_what_is_wrong_with_a_device_map_is_said(model, tmp_path, capsys, settings, words):
    run(model, tmp_path, code=2, **settings)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_where_a_model_stands_is_not_part_of_its_identity(model, tmp_path):
    out = run(model, tmp_path)
    before = stored(out)
    shutil.rmtree(out / "shards")
    run(model, tmp_path, device="auto", device_map="auto")
    for (S, _), (S_before, _) in zip(stored(out), before, strict=True):
        np.testing.assert_allclose(S, S_before, rtol=1e-4)
    assert len(before) == len(PROMPTS)
