"""Checks of replayed values: raised where they are made, or together at the end of a context."""

import pytest
import torch

from fisher_vmap.model.recording import StructureChanged, check_primal, primals_checked_together

RIGHT = torch.arange(6.0).view(1, 3, 2)
WRONG = RIGHT + torch.tensor([0.0, 1e-3])


def test_a_value_that_differs_is_told_by_name():
    check_primal("block 3", RIGHT * (1 + 1e-7), RIGHT)  # rounding
    with pytest.raises(StructureChanged, match=r"block 4 is 2\.3e-04 away"):
        check_primal("block 4", WRONG, RIGHT)


def test_together_they_wait_for_the_end_and_the_first_is_told():
    reached = []
    with pytest.raises(StructureChanged, match="block 2 is"), primals_checked_together():
        check_primal("block 1", RIGHT, RIGHT)
        check_primal("block 2", WRONG, RIGHT)
        check_primal("block 3", 2 * RIGHT, RIGHT)
        reached.append("the end")
    assert reached == ["the end"]
    with pytest.raises(StructureChanged):  # nothing is left behind: outside, a check is raised at once
        check_primal("block 5", WRONG, RIGHT)


def test_a_value_that_should_be_zero_is_told_as_well():
    with pytest.raises(StructureChanged, match="block 1 is inf away"):
        check_primal("block 1", RIGHT, 0 * RIGHT)


def test_an_inner_context_decides_by_itself():
    with primals_checked_together():
        with pytest.raises(StructureChanged), primals_checked_together():
            check_primal("the last block", WRONG, RIGHT)
        check_primal("block 1", RIGHT, RIGHT)


def test_another_error_is_not_hidden_by_a_check():
    with pytest.raises(KeyError), primals_checked_together():
        check_primal("block 1", WRONG, RIGHT)
        raise KeyError


def test_values_that_are_not_finite_prove_nothing():
    with primals_checked_together():
        check_primal("block 1", RIGHT * torch.nan, RIGHT)
        check_primal("block 2", RIGHT, RIGHT * torch.inf)
