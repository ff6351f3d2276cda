"""Prompts laid end to end: where a model does not keep them apart, they are padded, and the scores are right."""

import pytest
import torch
from forms import LENGTHS, assert_right
from models import fresh, padded, prompts
from torch import Tensor, nn

from fisher_vmap import FisherModel, fisher_scores


def look_back(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    """Adds to each position something of the one before, as convolutions and token shifts do."""
    return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


def forget_positions(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "position_ids": None}


@pytest.mark.parametrize("fault", ["positions meet outside attention", "position ids are not heeded"])
def test_prompts_that_cannot_be_laid_end_to_end(fault):
    model, layer = fresh("gpt2"), "transformer.h.1"
    if fault.startswith("position ids"):
        model.transformer.register_forward_pre_hook(forget_positions, with_kwargs=True)
    else:
        model.get_submodule("transformer.h.2.mlp").register_forward_hook(look_back)
    opened = FisherModel(model, layers=layer, top_k=4)
    for lengths in ((1, 1, 1), LENGTHS):
        rows = prompts(lengths)
        assert_right(opened.scores(*padded(rows, "right")), model, rows, layer)
    assert opened.forms[layer]["form"] == "layerwise" and "disagreed" in opened.forms[layer]["why"]


def test_a_window_that_only_earlier_prompts_outgrow():
    """Prompts that are padded, since a window is short, prove nothing of those that are packed later."""
    model, layer = fresh("mistral"), "model.layers.1"
    model.get_submodule("model.layers.2.mlp").register_forward_hook(look_back)
    opened = FisherModel(model, layers=layer, top_k=4)
    for lengths in ((9, 12, 5), (2, 3, 1), (4, 4)):
        rows = prompts(lengths)
        assert_right(opened.scores(*padded(rows, "left")), model, rows, layer, 1e-6)
    assert opened.forms[layer]["form"] == "layerwise" and "packed disagreed" in opened.forms[layer]["why"]


def test_a_window_that_only_later_prompts_outgrow():
    model, layer = fresh("mistral"), "model.layers.1"
    for lengths in ((2, 3, 1), (3, 12, 5), (4, 4)):
        rows = prompts(lengths)
        assert_right(fisher_scores(model, *padded(rows, "left"), layers=layer, top_k=4), model, rows, layer, 1e-6)
