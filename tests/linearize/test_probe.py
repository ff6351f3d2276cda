"""Planted faults: models whose chain of blocks is not whole. Each must be caught by the check that is meant for it, and
the scores must be plain autograd's all the same."""

import logging

import pytest
from forms import (
    LENGTHS,
    assert_caught_by_numbers,
    assert_caught_by_primal,
    assert_caught_by_structure,
    assert_layerwise,
    assert_right,
    right_form,
)
from models import padded, prompts
from oracles import relative
from toys import ToyBlock, ToyLM
from toys.chains import Alternating, Between, Recurrent, SharedKeys, SkipBetween, SkipInside, SkipToTheHead
from toys.state import ChangingMask, LateStateful, NamedMask, SelfMasking, Stateful, WritingBlock

from fisher_vmap import FisherModel, fisher_scores


@pytest.mark.parametrize("number", range(4))
def test_a_sound_model_passes(number):
    assert_layerwise(right_form(ToyLM(), f"blocks.{number}"))


# Structure: another way from the bias to the top than through the chain of blocks.


@pytest.mark.parametrize("number", range(5))
def test_keys_and_values_shared_across_blocks(number):
    form = right_form(SharedKeys(), f"blocks.{number}")
    if number < 2:  # the shared keys depend on the bias: block 3 reaches back to what block 1 returned
        assert_caught_by_structure(form)
    elif number == 4:
        assert_layerwise(form)
    else:  # they do not depend on it, and a replay of blocks 3 and 4 finds them as they were
        assert_layerwise(form)


@pytest.mark.parametrize("kind", [SkipBetween, SkipInside])
@pytest.mark.parametrize("number", range(4))
def test_a_residual_that_skips_a_block(kind, number):
    form = right_form(kind(), f"blocks.{number}")
    if number == 0:
        assert_caught_by_structure(form)
    elif number == 3 or kind is SkipInside:
        assert_layerwise(form)  # above block 0 the skip is a constant
    elif number == 1:
        assert_caught_by_primal(form)  # a constant, but block 3 receives something else than block 2 returned


@pytest.mark.parametrize("number", range(4))
def test_a_residual_that_skips_to_the_head(number):
    form = right_form(SkipToTheHead(), f"blocks.{number}")
    assert form["form"] == "whole" and "needs more than one position" in form["why"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_something_between_two_blocks(number):
    form = right_form(Between(1, lambda x: 1.3 * x), f"blocks.{number}")
    if number == 2:
        assert_layerwise(form)
    else:
        assert form["form"] == "whole"


@pytest.mark.parametrize("number", [0, 1])
def test_something_between_two_blocks_that_leaves_the_values_alone(number):
    """No value gives it away: only the comparison with plain autograd can."""
    assert_caught_by_numbers(right_form(Between(1, lambda x: x + (x - x.detach())), f"blocks.{number}"))


@pytest.mark.parametrize("number", [0, 1])
def test_something_between_two_blocks_in_longer_batches_only(number, caplog):
    """The probe has not seen it: the check in every batch must."""
    model, layer = Between(1, lambda x: 1.3 * x, from_length=70), f"blocks.{number}"
    short, long = prompts(LENGTHS), prompts((80, 4))
    first = fisher_scores(model, *padded(short, "right"), layers=layer, top_k=4)
    assert_right(first, model, short, layer)
    with caplog.at_level(logging.WARNING):
        scores = fisher_scores(model, *padded(long[:1], "right"), layers=layer, top_k=4)
    assert_right(scores, model, long[:1], layer)
    assert "given up from here on: it broke off: " in caplog.text


# A block called more than once.


@pytest.mark.parametrize("order", [(0, 1, 1, 2, 3), (0, 1, 2, 1, 3), (0, 1, 2, 3, 3), (0, 1, 2, 3, 0, 1, 2, 3)])
@pytest.mark.parametrize("number", range(4))
def test_a_block_called_twice(order, number):
    assert_layerwise(right_form(Recurrent(order), f"blocks.{number}"))


def test_what_a_block_called_twice_reports_is_the_same_in_every_form():
    model, layer = Recurrent((0, 1, 2, 1, 3)), "blocks.1"
    ids, mask = padded(prompts(LENGTHS), "right")
    forms = [fisher_scores(model, ids, mask, layers=layer, top_k=4, kernel=k) for k in ("layerwise", "whole", "loop")]
    for other in forms[1:]:
        assert relative(forms[0].gradients[layer], other.gradients[layer]) < 1e-10
        assert relative(forms[0].position_energy[layer], other.position_energy[layer]) < 1e-10
        assert relative(forms[0].residual_norm[layer], other.residual_norm[layer]) < 1e-10


def test_an_order_of_blocks_that_depends_on_the_batch(caplog):
    model, layer = Alternating((0, 1, 2, 3)), "blocks.0"
    for lengths in ((6, 2, 9), (13, 15)):
        rows = prompts(lengths)
        assert_right(fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=4), model, rows, layer)
    assert "out of the order that the probe saw" in caplog.text


# State, and arguments that change.


@pytest.mark.parametrize("number", range(4))
def test_a_block_that_keeps_state_between_calls(number):
    form = right_form(Stateful(), f"blocks.{number}")
    (assert_caught_by_primal if number < 2 else assert_layerwise)(form)


def test_state_that_begins_after_the_probe_is_caught_in_its_batch(caplog):
    model, layer, rows = LateStateful(), "blocks.0", prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    opened = FisherModel(model, layers=layer, top_k=4)
    assert_right(opened.scores(ids, mask), model, rows, layer)
    assert_layerwise(opened.forms[layer])
    model.blocks[2].faulty = True
    scores = opened.scores(ids, mask)
    assert "given up from here on: it broke off: the replay of blocks.2" in caplog.text
    assert_right(scores, model, rows, layer)
    assert_caught_by_primal(opened.forms[layer])
    with pytest.raises(ValueError, match=r"disagrees|broke off|cannot be trusted"):
        fisher_scores(model, ids, mask, layers=layer, top_k=4, kernel="layerwise")


@pytest.mark.parametrize("number", range(4))
def test_a_mask_that_differs_between_recording_and_replay(number):
    form = right_form(ChangingMask(), f"blocks.{number}")
    # Above block 2 there is one block, and nothing has changed its mask yet when it is replayed.
    (assert_caught_by_primal if number < 2 else assert_layerwise)(form)


def test_a_mask_means_the_same_in_recording_and_replay():
    model = NamedMask()
    assert_layerwise(right_form(model, "blocks.0"))
    assert model.config._attn_implementation == "fused"


@pytest.mark.parametrize("number", range(4))
def test_a_block_that_writes_into_its_input(number):
    model = ToyLM([ToyBlock(), ToyBlock(), WritingBlock(), ToyBlock()])
    assert right_form(model, f"blocks.{number}")["form"] in ("layerwise", "whole")


@pytest.mark.parametrize("number", range(4))
def test_a_block_that_masks_by_what_it_reads(number):
    assert_layerwise(right_form(ToyLM([SelfMasking() for _ in range(4)]), f"blocks.{number}"))


def test_keys_and_values_shared_across_blocks_of_a_real_model():
    from models import draw
    from transformers import AutoModelForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=101, vocab_size_per_layer_input=101, hidden_size=36, intermediate_size=58, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=6, hidden_size_per_layer_input=5, laurel_rank=3,
        num_kv_shared_layers=2, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4, max_position_embeddings=128,
    )  # fmt: skip
    model = draw(AutoModelForCausalLM.from_config(config).eval(), 0)
    scores_of = FisherModel(model, layers="model.layers.1.mlp", top_k=4)
    rows = prompts(LENGTHS)
    scores = scores_of.scores(*padded(rows, "right"))
    assert scores_of.forms["model.layers.1.mlp"]["form"] == "whole"
    assert_right(scores, model, rows, "model.layers.1.mlp", 1e-4)
