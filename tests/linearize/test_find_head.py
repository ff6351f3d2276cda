"""Heads of every kind: taken apart where the values prove it, and plain autograd's all the same where they do not."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from forms import (
    LENGTHS,
    assert_layerwise,
    right_form,
)
from models import padded, prompts
from toys import ToyLM
from toys.heads import (
    BatchedHead,
    CopyingHead,
    LogitsOfTwoPositions,
    MixingHead,
    NarrowedHead,
    NoOutputEmbeddings,
    PositionalHead,
    ScaledInside,
    SteppedLogits,
    SubclassHead,
    TanhHead,
    TransformedHead,
    TwoReadings,
    VanishingHead,
)

from fisher_vmap import fisher_scores


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (TanhHead, "not a scale or a soft-cap"),
        (CopyingHead, "not a scale or a soft-cap"),
        (MixingHead, "needs more than one position"),
        (PositionalHead, "needs more than one position"),
        (VanishingHead, "the input of the output embedding is zero"),
        (LogitsOfTwoPositions, "not a scale or a soft-cap"),
        (SubclassHead, "LowRankHead, not a plain Linear"),
        (NoOutputEmbeddings, "NoneType, not a plain Linear"),
        (TwoReadings, "called 2 times"),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_head_that_is_not_of_the_common_kind(kind, why, number):
    form = right_form(kind(), f"blocks.{number}")
    assert form["form"] in ("whole", "loop") and why in form["why"] and form["why"]


@pytest.mark.parametrize("kind", [ScaledInside, TransformedHead, NarrowedHead])
@pytest.mark.parametrize("number", [0, 3])
def test_code_between_the_last_block_and_the_unembedding(kind, number):
    """No chain of modules, but a function of one row all the same: the model's own code, run again on the rows."""
    assert_layerwise(right_form(kind(), f"blocks.{number}"))


def test_a_model_whose_own_code_is_run_again_is_not_kept_alive():
    model = TransformedHead()
    assert_layerwise(right_form(model, "blocks.1"))
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_code_between_the_last_block_and_the_unembedding_runs_in_float32(caplog):
    rows, layer = prompts(LENGTHS), "blocks.2"
    narrow = TransformedHead().bfloat16()
    wide = copy.deepcopy(narrow).float()
    scores = fisher_scores(narrow, *padded(rows, "left"), layers=layer, top_k=4, precision="model")
    with torch.no_grad():
        for b, row in enumerate(rows):
            top = narrow.walk(narrow.embed(row[None])).float()
            expected = wide.read(top)[0, -1].log_softmax(0)[scores.token_ids[b]]
            torch.testing.assert_close(scores.log_probs[b], expected, atol=1e-5, rtol=0)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]  # no form was given up


@pytest.mark.parametrize("number", [1, 3])
def test_a_norm_that_wants_three_dimensions(number):
    assert_layerwise(right_form(BatchedHead(), f"blocks.{number}"))


@pytest.mark.parametrize("kernel", ["whole", "loop"])
def test_heads_of_other_kinds_in_the_forms_asked_for(kernel):
    for kind in (TanhHead, MixingHead, TwoReadings):
        assert right_form(kind(), "blocks.1", kernel)["form"] == kernel
    with pytest.raises(ValueError, match=r"layerwise cannot be trusted with blocks\.1"):
        right_form(TanhHead(), "blocks.1", "layerwise")


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"])
@pytest.mark.parametrize("size", [0.05, 1.0, 40.0])
def test_a_soft_cap_by_whatever_name_the_config_has_for_it(name, size):
    model = SteppedLogits()
    setattr(model.config, name, model.cap)
    with torch.no_grad():
        model.unembed.weight.mul_(size)
    assert_layerwise(right_form(model, "blocks.1"))


def test_a_model_without_a_config():
    model = ToyLM()
    del model.config
    assert_layerwise(right_form(model, "blocks.1"))


@pytest.mark.parametrize("size", [0.05, 1.0, 40.0])
def test_a_soft_cap_that_the_config_does_not_tell(size):
    model = SteppedLogits()
    with torch.no_grad():
        model.unembed.weight.mul_(size)
    form = right_form(model, "blocks.1")
    assert form["form"] == "whole" and "not a scale or a soft-cap" in form["why"]
