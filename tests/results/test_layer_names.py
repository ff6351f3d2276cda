"""Layers by number, in the order of numbers, and many of them in a few words."""

from pathlib import Path

import pytest

from fisher_vmap.errors import UserError
from fisher_vmap.results.record import layer_named, natural, several

LAYERS = [f"model.layers.{i}" for i in (2, 15, 20)]
HERE = Path("out")


def test_a_layer_by_name_and_by_number():
    for name in ("model.layers.15", "15", 15):
        assert layer_named(name, LAYERS, HERE) == "model.layers.15"
    assert layer_named("2", ["model.layers.2", "model.layers.2.mlp"], HERE) == "model.layers.2"


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("5", LAYERS, "layer 5 was not hooked in out; there is model.layers.2, model.layers.15, model.layers.20"),
        ("model.layers.5", LAYERS, "'model.layers.5' was not hooked in out; there is "),
        (-1, LAYERS, "layer -1 counts from the model's top, which a results folder does not know; there is "),
        ("0", ["enc.0", "dec.0"], "layer 0 may be enc.0 or dec.0; give the name"),
        ("mlp", ["h.1.mlp"], "'mlp' was not hooked"),
        ("99", [f"h.{i}" for i in range(40)], "there is h.0 ... h.39, 40 in all"),
    ],
)
def test_layers_that_are_not_there(name, layers, message):
    with pytest.raises(UserError) as error:
        layer_named(name, layers, HERE)
    assert message in str(error.value)


def test_many_names_in_a_few_words():
    assert several(["a", "b"]) == "a, b"
    assert several(["h.1", "h.2", "h.3"]) == "h.1, h.2, h.3"
    assert several(f"h.{i}" for i in range(8, 12)) == "h.8 ... h.11, 4 in all"
    assert several([*(f"h.{i}.mlp" for i in range(5)), "norm"]) == "h.0.mlp ... h.4.mlp, norm, 6 in all"
    assert several(f"x.{i}" for i in range(0, 40, 2)) == ", ".join(f"x.{i}" for i in range(0, 20, 2)) + " and 10 more"
    assert several(["h.3", "h.5", "h.4"]) == "h.3, h.5, h.4"


def test_names_in_the_order_of_their_numbers():
    names = [f"a.{i}.npz" for i in (0, 1, 2, 10, 11)]
    assert sorted(sorted(names), key=natural) == names
