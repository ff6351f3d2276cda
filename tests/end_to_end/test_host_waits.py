"""A batch waits for a GPU a fixed number of times, and its launches grow with the blocks and not with the prompts."""

import pytest
import torch

from benchmarks.host_waits import batch_waits, waits_of


def test_the_count_sees_what_waits():
    x = torch.arange(4.0)

    def reads():
        if (x > 2).any():
            x[x > 2].sum().item()

    assert waits_of(reads).places == {}  # not in the package
    from fisher_vmap.model.head import likeliest

    assert waits_of(lambda: likeliest(x[None], 2)).total == 1
    made_here = torch.tensor([[3.0, 1.0]], device="cpu")
    made_here.made_for_the_host = True
    assert waits_of(lambda: likeliest(made_here, 1)).total == 0


@pytest.mark.parametrize(("estimator", "rest", "most"), [("topk", False, 9), ("topk", True, 11), ("full", False, 16)])
def test_waits_and_launches_of_a_batch(estimator, rest, most):
    few, deep, wide = (batch_waits(*size, estimator, rest) for size in ((4, 8), (8, 8), (8, 24)))
    assert few.places == deep.places == wide.places, wide.places - few.places
    assert 0 < few.total <= most
    assert wide.operations < 1.25 * deep.operations
