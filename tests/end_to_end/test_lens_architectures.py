"""The lens's matrices of every class of transformers' causal-LM mapping against plain autograd, tiny and random."""

import architectures
import pytest
import torch
from architecture_check import TOLERANCE, one_line, wide_reference
from oracles import plain_jacobians, relative
from test_architectures import WELL_USED

from fisher_vmap import FisherModel
from fisher_vmap.lens.matrices import prompt_matrices
from fisher_vmap.model.layers import decoder_blocks

LENGTHS, SKIP = (9, 14), 3


def examine(kind):
    """The largest relative distance over prompts and layers, or in words why there is none."""
    try:
        model = architectures.build(kind)
    except Exception as error:  # anything that a config or a constructor may say
        return f"not built: {one_line(error)}"
    try:
        blocks = list(decoder_blocks(model))
        names = [blocks[i] for i in sorted({0, len(blocks) // 2} - {len(blocks) - 1})]
        fisher = FisherModel(model, layers=names, precision="model")
        rows = architectures.prompts(LENGTHS)
        found = prompt_matrices(fisher, [row.tolist() for row in rows], SKIP)
    except ValueError as refusal:
        return f"refused: {one_line(refusal)}"
    reference, _ = wide_reference(kind, model, rows)
    distance = 0.0
    for one, row in zip(found, rows, strict=True):
        expected = plain_jacobians(reference, row, names, blocks[-1], range(SKIP, len(row) - 1))
        distance = max(distance, *(relative(one.jacobians[name], expected[name]) for name in names))
    return distance


@pytest.mark.parametrize("kind", WELL_USED)
def test_a_well_used_family(kind):
    found = examine(kind)
    assert isinstance(found, float) and found <= TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", architectures.kinds())
def test_every_class_of_the_mapping(kind):
    """It agrees, or says in one line why it has no lens."""
    found = examine(kind)
    assert isinstance(found, str) or found <= TOLERANCE, found


def test_the_oracle_sees_a_wrong_position():
    """Another set of positions, or another layer, is further away than the tolerance."""
    model, (row,) = architectures.build("llama"), architectures.prompts((9,))
    blocks = list(decoder_blocks(model))
    right = plain_jacobians(model, row, blocks[:2], blocks[-1], range(SKIP, 8))
    for wrong in (range(SKIP, 9), range(SKIP - 1, 8)):
        other = plain_jacobians(model, row, blocks[:1], blocks[-1], wrong)
        assert relative(other[blocks[0]], right[blocks[0]]) > 100 * TOLERANCE
    assert relative(right[blocks[1]], right[blocks[0]]) > 100 * TOLERANCE
    assert torch.isfinite(right[blocks[0]]).all()
