"""Which form of the kernel a layer got, and why; and whether its scores are those of plain autograd."""

import torch
from models import padded, prompts
from oracles import plain_scores, relative
from torch import nn

from fisher_vmap import FisherModel

LENGTHS = (6, 2, 9)


def assert_right(scores, model: nn.Module, rows, layer: str, tolerance: float = 1e-10) -> None:
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, top_k=scores.token_ids.shape[1])
        assert torch.equal(scores.token_ids[b], expected.token_ids)
        torch.testing.assert_close(scores.log_probs[b], expected.log_probs, atol=tolerance, rtol=0)
        assert relative(scores.gradients[layer][b], expected.gradients) < tolerance


def right_form(model: nn.Module, layer: str, kernel: str = "auto") -> dict[str, str]:
    """Compute twice, compare both with the oracle; the form that ran, and why."""
    opened = FisherModel(model, layers=layer, top_k=4, kernel=kernel)
    for seed in (0, 1):
        rows = prompts(LENGTHS, seed=seed)
        assert_right(opened.scores(*padded(rows, "left")), model, rows, layer)
    return opened.forms[layer]


def assert_layerwise(form: dict[str, str]) -> None:
    assert form["form"] == "layerwise" and form["why"].startswith("the chain of blocks is whole")


def assert_caught_by_structure(form: dict[str, str]) -> None:
    assert (form["form"], form["why"]) == ("whole", "above the hook a block reaches back past its own input")


def assert_caught_by_primal(form: dict[str, str]) -> None:
    assert form["form"] == "whole" and "the replay of" in form["why"]


def assert_caught_by_numbers(form: dict[str, str], lower: str = "whole") -> None:
    assert form["form"] == lower and "scores at" in form["why"] and "away" in form["why"]
