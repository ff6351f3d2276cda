"""What is known of a model outlives hooks as far as they cannot change it, and says what ran."""

import logging

import pytest
import torch
from models import block, fresh, padded, prompts
from oracles import plain_scores, relative

from fisher_vmap import FisherModel, fisher_full, fisher_scores, steer
from fisher_vmap.linearize import probe as probe_module
from fisher_vmap.linearize import scores as scores_module
from fisher_vmap.linearize.probe import known_of

LENGTHS, LAYER = (9, 4, 7), block("llama", 1)


@pytest.fixture
def looks(monkeypatch):
    """What was looked at anew: the model, and its blocks' rules."""
    found = []
    for name in ("_look", "_proven_packed"):
        right = getattr(probe_module, name)
        monkeypatch.setattr(probe_module, name, lambda *a, _r=right, _n=name: found.append(_n) or _r(*a))
    return found


def assert_right(model, rows, **more):
    scores = fisher_scores(model, *padded(rows, "left"), layers=LAYER, top_k=4, **more)
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, LAYER, token_ids=scores.token_ids[b])
        assert relative(scores.gradients[LAYER][b], expected.gradients) < 1e-6
        assert relative(scores.log_probs[b].exp(), expected.log_probs.exp()) < 1e-6


@pytest.mark.parametrize("where", ["model.layers.0", LAYER, "model.layers.2", "model.layers.2.mlp", "model.layers.3"])
@pytest.mark.parametrize("norm", [1.0, None])
def test_a_step_is_right_and_nothing_is_looked_at_again(looks, where, norm):
    model, rows = fresh("llama"), prompts(LENGTHS)
    assert_right(model, rows)
    plain = fisher_scores(model, *padded(rows, "left"), layers=LAYER, top_k=4)
    looks.clear()
    for scale in (0.5, -1.0):
        with steer(model, where, torch.linspace(-1, 1, 36), scale, residual_norm=norm):
            assert_right(model, rows)
            steered = fisher_scores(model, *padded(rows, "left"), layers=LAYER, top_k=4, token_ids=plain.token_ids)
            assert relative(steered.gradients[LAYER], plain.gradients[LAYER]) > 1e-3
    assert_right(model, rows)
    assert looks == []


def test_a_step_above_the_blocks_is_looked_at():
    model, rows = fresh("llama"), prompts(LENGTHS)
    assert_right(model, rows)
    for where in ("model.norm", "model.embed_tokens"):
        with steer(model, where, torch.linspace(-1, 1, 36), 0.5, residual_norm=1.0):
            assert_right(model, rows)


def test_a_users_hook_leaves_the_rules_of_other_blocks_and_what_was_known_comes_back(looks):
    model, rows = fresh("llama"), prompts(LENGTHS)
    assert_right(model, rows)
    before = known_of(model)
    looks.clear()
    with model.model.layers[2].register_forward_hook(lambda _m, _a, out: 1.1 * out):
        assert_right(model, rows)
        assert known_of(model) is not before
        assert known_of(model).parts.rules == before.parts.rules
    assert looks == ["_look"]
    assert_right(model, rows)
    assert known_of(model) is before and looks == ["_look"]
    with model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: out * out.abs().sqrt()):
        assert_right(model, rows)
    model.model.layers[2] = fresh("llama", seed=5).model.layers[2]  # another block: what was known holds no longer
    looks.clear()
    assert_right(model, rows)
    assert looks == ["_look", "_proven_packed"]


def test_forms_say_what_ran():
    model, rows = fresh("llama", torch.float32), prompts(LENGTHS)
    opened = FisherModel(model, layers=[0, 3, "model.layers.1.mlp"], top_k=3)
    opened.scores(*padded(rows, "left"))
    ran = opened.forms
    assert ran["model.layers.0"] | {"why": ""} == {
        "form": "packed",
        "why": "",
        "attention": "fisher_vmap",
        "prompts": "together",
        "rules": "2 of 2 blocks by rule",
        "last_block": "at the last row, in forward and pullback",
        "rows": "live rows only",
        "audit": "1 of 1 batches compared, and they agreed",
        "precision": "model",
        "audit_attention": "sdpa",
    }
    assert ran["model.layers.3"]["last_block"] == "not needed"
    assert ran["model.layers.1.mlp"]["form"] == "whole" and ran["model.layers.1.mlp"]["rules"].startswith("none")
    with model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, out: 1.1 * out):
        assert opened.forms == {}  # nothing has been computed with this hook
        opened.scores(*padded(rows, "left"))
        assert opened.forms["model.layers.0"]["rules"] == "1 of 2 blocks by rule; not model.layers.2: it has a hook"
    other = FisherModel(fresh("opt"), layers=0, top_k=3)
    other.scores(*padded(rows, "left"))
    why = "what it adds to the residual stream is more than its branches"
    assert other.forms["model.decoder.layers.0"]["rules"] == (
        f"0 of 2 blocks by rule; not model.decoder.layers.1: {why}; not model.decoder.layers.2: {why}"
    )


@pytest.mark.parametrize("fault", [AttributeError, TypeError, AssertionError, NameError])
def test_a_fault_of_ours_is_not_taken_for_a_reason_for_a_slower_form(monkeypatch, fault):
    def wrong(*_args, **_more):
        raise fault("ours")

    wrong = type(wrong)(wrong.__code__, {**vars(scores_module), "fault": fault}, closure=wrong.__closure__)
    monkeypatch.setattr(scores_module, "outcomes_of", wrong)
    with pytest.raises(fault, match="ours"):
        fisher_scores(fresh("llama"), *padded(prompts(LENGTHS), "left"), layers=LAYER, top_k=3)


def test_a_way_that_is_not_taken_is_told_once(caplog):
    """The last block of this model cannot be cut, since its MLP looks at the row before."""
    model = fresh("llama")
    inner = model.model.layers[3].mlp

    class Smeared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    model.model.layers[3].mlp = Smeared()
    with caplog.at_level(logging.INFO, logger="fisher_vmap"):
        for _ in range(3):
            fisher_scores(model, *padded(prompts(LENGTHS), "left"), layers=LAYER, top_k=3)
            fisher_full(model, *padded(prompts(LENGTHS), "left"), layers=LAYER, rank=3)
    told = [r.getMessage() for r in caplog.records if "at all positions" in r.getMessage()]
    assert told and len(told) == len(set(told))
