"""Which form a layer gets once it has been compared with plain autograd, and what is not to decide it."""

import pytest
import torch
from forms import LENGTHS, assert_caught_by_numbers, assert_layerwise, assert_right, right_form
from models import fresh, padded, prompts
from toys import ToyBlock, ToyLM
from toys.functions import OldFormByValueBlock, ReversibleLM, WrongBlock

from fisher_vmap import FisherModel, fisher_scores


def test_an_autograd_function_that_torch_func_cannot_transform():
    model = ToyLM([ToyBlock(), ToyBlock(), OldFormByValueBlock(), ToyBlock()])
    for number in (0, 1):
        form = right_form(model, f"blocks.{number}")
        assert form["form"] == "loop" and "disagreed with plain autograd" in form["why"]
    for number in (2, 3):
        assert_layerwise(right_form(model, f"blocks.{number}"))
    with pytest.raises(ValueError, match="whole kernel disagrees"):
        right_form(model, "blocks.0", kernel="whole")


def test_a_batching_rule_that_is_wrong_is_caught_by_numbers(caplog):
    model = ToyLM([ToyBlock(), ToyBlock(), WrongBlock(), ToyBlock()])
    assert_caught_by_numbers(right_form(model, "blocks.1"), "loop")
    assert "layerwise kernel disagrees" in caplog.text and "whole kernel disagrees" in caplog.text


def test_a_kernel_asked_for_by_name_is_checked_however_often_it_is_asked_for():
    model = ToyLM([ToyBlock(), ToyBlock(), WrongBlock(), ToyBlock()])
    ids, mask = padded(prompts(LENGTHS), "right")
    for kernel, layers in (("layerwise", ["blocks.1", "blocks.1.norm1"]), ("whole", ["blocks.1"])):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"disagrees|cannot be trusted"):
                fisher_scores(model, ids, mask, layers=layers, top_k=4, kernel=kernel)
        with pytest.raises(ValueError, match="disagrees"):
            fisher_scores(model, ids, mask, layers="blocks.1", top_k=4, kernel=kernel)


def test_numbers_that_are_not_finite_decide_nothing(caplog):
    """A first batch that holds a prompt of NaN must not cost the later ones the fast form."""
    model, layer = fresh("llama"), "model.layers.1"
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = torch.nan
    spoilt, rows = [torch.tensor([5, 95, 3]), torch.tensor([1, 2, 3, 4])], prompts(LENGTHS, vocabulary=90)
    fisher_scores(model, *padded(spoilt, "right"), layers=layer, top_k=4)
    assert_right(fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=4), model, rows, layer, 1e-6)
    assert FisherModel(model, layers=layer).forms[layer]["form"] in ("packed", "layerwise")


def assert_under_eager(opened: FisherModel, layer: str) -> None:
    form = opened.forms[layer]
    assert form["form"] == "layerwise" and "under eager attention" in form["why"]


def test_an_attention_of_ours_that_is_not_the_models_gives_way_to_the_plain_one(monkeypatch):
    """Caught by numbers: the blocks are whole, so layerwise is tried again, under transformers' own attention."""
    from fisher_vmap.kernels import hf_attention

    right = hf_attention._attention_forward
    monkeypatch.setattr(
        hf_attention,
        "_attention_forward",
        lambda module, q, k, v, mask, **kwargs: right(module, q, k, v, mask, **{**kwargs, "scaling": 0.5}),
    )
    for first in ("model.layers.1", "model.layers.1.mlp"):
        model, rows = fresh("llama"), prompts(LENGTHS)
        opened = FisherModel(model, layers=[first, "model.layers.2"], top_k=4)
        scores = opened.scores(*padded(rows, "left"))
        for layer in opened.layers:
            assert_right(scores, model, rows, layer, 1e-6)
        assert_under_eager(opened, "model.layers.2")
    monkeypatch.undo()
    hf_attention.register()  # transformers has the wrong one by that name


def test_a_model_without_gradients_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"ReversibleLM cannot be differentiated .* blocks\.1") as caught:
        fisher_scores(ReversibleLM(), *padded(prompts(LENGTHS), "right"), layers=1, top_k=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_real_models_blocks_are_whole_and_the_form_is_told(family):
    opened = FisherModel(fresh(family), layers=[0, -1], top_k=3)
    assert opened.forms == {}
    opened.scores(*padded(prompts(LENGTHS), "right"))
    for form in opened.forms.values():
        assert form["form"] in ("packed", "layerwise") and form["why"].startswith("the chain of blocks is whole")
