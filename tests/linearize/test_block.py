"""Only what the last position needs, at the top: the last block cut at the last rows, forward and backward."""

import logging
from dataclasses import replace

import pytest
import torch
from models import block, fresh, padded, prompts
from oracles import plain_scores, relative
from torch import Tensor, nn

from fisher_vmap import fisher_scores
from fisher_vmap.linearize import block as block_module
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model.recording import hooks

LENGTHS = (6, 2, 9)


def assert_right(scores, model: nn.Module, rows, layer: str, tolerance: float) -> None:
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, top_k=scores.token_ids.shape[1])
        assert torch.equal(scores.token_ids[b], expected.token_ids)
        torch.testing.assert_close(scores.log_probs[b], expected.log_probs, atol=tolerance, rtol=0)
        assert relative(scores.gradients[layer][b], expected.gradients) < tolerance


def test_a_last_block_cut_at_the_wrong_rows_is_noticed(monkeypatch, caplog):
    """The last block is replayed on each prompt's last row; here with the position of another prompt's."""
    right = block_module.at_rows

    def wrong(inputs, rows, count):
        monkeypatch.setattr(block_module, "at_rows", right)  # it calls itself
        found = right(inputs, rows.flip(0), count)
        monkeypatch.setattr(block_module, "at_rows", wrong)
        return found

    monkeypatch.setattr(block_module, "at_rows", wrong)
    model, layer, rows = fresh("llama"), "model.layers.1", prompts(LENGTHS)
    with caplog.at_level(logging.DEBUG, logger="fisher_vmap"):
        scores = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=4)
    assert "at the last positions" in caplog.text and known_of(model).parts.top_places is None
    assert_right(scores, model, rows, layer, 1e-6)


def rows_seen(model, module, change=lambda model: None, **choices):
    """How many rows a module is given in a call of `fisher_scores` that has nothing left to prove, and the scores.

    `change` is called between the proof and that call.
    """
    rows = prompts(LENGTHS)
    batch = padded(rows, "right")
    seen, watched = [], model.get_submodule(module)

    def look(called, args):
        if called is watched:
            seen.append(args[0].shape[1])

    # Of all modules: a hook of a user's on this one would have the model looked at more closely.
    with hooks(torch.nn.modules.module.register_module_forward_pre_hook(look)):
        fisher_scores(model, *batch, top_k=4, audit="off", **choices)
        change(model)
        seen.clear()
        scores = fisher_scores(model, *batch, top_k=4, audit="off", **choices)
    return seen, scores, rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "granite"])
def test_above_the_last_attention_the_forward_goes_through_the_last_rows_alone(family):
    model, last = fresh(family), block(family, 3)
    for layer in (block(family, 0), block(family, 2)):
        seen, scores, rows = rows_seen(model, f"{last}.mlp", layers=layer)
        assert seen == [len(LENGTHS)]
        assert_right(scores, model, rows, layer, 1e-5)


def test_the_forward_is_not_cut_where_the_last_block_is_hooked():
    model = fresh("llama")
    seen, scores, rows = rows_seen(model, "model.layers.3.mlp", layers=["model.layers.1", "model.layers.3"])
    assert max(seen) == sum(LENGTHS)
    expected = [hidden_norm(model, row, 3) for row in rows]
    assert scores.residual_norm["model.layers.3"].tolist() == pytest.approx(expected, rel=1e-5)
    for layer in scores.gradients:
        assert_right(scores, model, rows, layer, 1e-6)


def hidden_norm(model, row, number):
    """The median norm of what a block of a Llama returns for one prompt."""
    kept = []
    with hooks(model.model.layers[number].register_forward_hook(lambda _m, _i, output: kept.append(output))):
        model(row[None])
    return float(kept[0][0].double().norm(dim=-1).quantile(0.5))


def test_the_forward_is_not_cut_where_other_arguments_have_rows_than_when_it_was_proven():
    model, layer = fresh("llama"), "model.layers.1"

    def change(model):
        known = known_of(model)
        assert known.parts.top_places
        known.parts = replace(known.parts, top_places=known.parts.top_places | {(1, "a table", 0)})

    seen, scores, rows = rows_seen(model, "model.layers.3.mlp", change, layers=layer)
    assert max(seen) == sum(LENGTHS)
    assert_right(scores, model, rows, layer, 1e-6)


class Smeared(nn.Module):
    """An MLP that also sees the position before: at the last rows alone it is another function."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def test_the_forward_is_not_cut_where_the_last_block_mixes_positions_above_its_attention():
    model, layer = fresh("llama"), "model.layers.1"
    model.model.layers[3].mlp = Smeared(model.model.layers[3].mlp)
    rows = prompts(LENGTHS)
    scores = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=4)
    assert known_of(model).parts.top_places is None
    assert_right(scores, model, rows, layer, 1e-6)
