"""Autograd functions of the old form, which torch.func cannot transform as they are."""

import pytest
from forms import LENGTHS, assert_layerwise, right_form
from models import padded, prompts
from toys import ToyBlock, ToyLM
from toys.functions import ManyKindsBlock, OldForm, OldFormBlock

from fisher_vmap import FisherModel


def test_an_autograd_function_of_the_old_form():
    """Its forward and its context are taken apart for the time of a computation."""
    apply = OldForm.apply
    model = ToyLM([ToyBlock(), ToyBlock(), OldFormBlock(), ToyBlock()])
    for number in range(4):
        assert_layerwise(right_form(model, f"blocks.{number}"))
    assert right_form(model, "blocks.0", kernel="whole")["form"] == "whole"
    with (
        pytest.raises(ValueError, match="no forward derivatives"),
        FisherModel(model, layers="blocks.0", top_k=3).linearize(*padded(prompts(LENGTHS), "right")),
    ):
        pass
    assert "apply" not in vars(OldForm) and OldForm.apply == apply


@pytest.mark.parametrize("number", range(3))
def test_an_autograd_function_of_the_old_form_that_keeps_many_kinds_of_things(number):
    assert_layerwise(right_form(ToyLM([ManyKindsBlock() for _ in range(3)]), f"blocks.{number}"))
