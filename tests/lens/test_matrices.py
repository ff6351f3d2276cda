"""A prompt's matrices for the lens against plain autograd, one dimension of the output and one prompt at a time."""

import pytest
import torch
from models import FAMILIES, MORE_FAMILIES, block, fresh, prompts, tiny
from oracles import first_of, plain_jacobians, relative

from fisher_vmap import FisherModel
from fisher_vmap.kernels.decoder_block import BlockRule
from fisher_vmap.kernels.mlp import matrices_pay
from fisher_vmap.lens import matrices
from fisher_vmap.lens.matrices import prompt_matrices

LENGTHS, SKIP = (9, 14, 6), 3
EXACT = ("gpt2", "gpt_neox", "opt")  # the others compute their norms in float32


def plain_metric(model, ids_T, top, valid):
    """The mean of C over positions, [D, D] float64, by plain autograd of every logit."""
    seen = []
    handle = model.get_submodule(top).register_forward_hook(lambda _m, _a, output: seen.append(first_of(output)))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    try:
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
    finally:
        handle.remove()
    C = 0
    for t in valid:
        p_V = logits_TV[t].detach().double().softmax(0)
        rows = [torch.autograd.grad(logit, seen[0], retain_graph=True)[0][0, t] for logit in logits_TV[t]]
        rows_VD = torch.stack(rows).double()
        C = C + rows_VD.T @ (torch.diag(p_V) - torch.outer(p_V, p_V)) @ rows_VD / len(valid)
    return C


def compare(model, family, tolerance, layers=(0, 2), **options):
    names = [block(family, n) for n in layers]
    fisher = FisherModel(model, layers=names, precision="model", **options)
    rows = prompts(LENGTHS)
    found = prompt_matrices(fisher, [row.tolist() for row in rows], SKIP)
    for one, ids_T in zip(found, rows, strict=True):
        expected = plain_jacobians(model, ids_T, names, block(family, 3), range(SKIP, len(ids_T) - 1))
        assert one.positions == len(ids_T) - 1 - SKIP
        for layer in names:
            assert relative(one.jacobians[layer], expected[layer]) < tolerance
    return fisher


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_against_plain_autograd(family):
    model = fresh(family)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    compare(model, family, 1e-10 if family in EXACT else 1e-5)


@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
def test_every_form(kernel):
    compare(fresh("gpt2"), "gpt2", 1e-10, kernel=kernel)


def test_the_loop_has_no_output_of_the_last_block():
    fisher = FisherModel(tiny("gpt2"), layers=[0], kernel="loop")
    with pytest.raises(ValueError, match="cannot be linearised"):
        prompt_matrices(fisher, [list(range(9))], SKIP)


def test_padded_prompts():
    """A model that returns attention weights runs under its own attention, with padding."""
    model = fresh("gpt2")
    model.config._attn_implementation = "eager"
    fisher = compare(model, "gpt2", 1e-10)
    assert fisher.forms[block("gpt2", 0)]["form"] in ("packed", "padded")


def test_tied_weights():
    compare(fresh("gpt2", tie_word_embeddings=True), "gpt2", 1e-10)


@pytest.mark.parametrize(("family", "width"), [("gpt2", {"n_inner": 144}), ("gpt_neox", {"intermediate_size": 144})])
def test_with_the_mlp_as_a_matrix_for_each_position(family, width, monkeypatch):
    """Wide MLPs are pulled back by their derivative at each position, in sequence and side by side with attention."""
    model, used, right = fresh(family, **width), [], BlockRule.pull

    def look(self, *args):
        used.append(any(branch.takes_all(36) for step in self.steps for branch in step))
        return right(self, *args)

    monkeypatch.setattr(BlockRule, "pull", look)
    compare(model, family, 1e-10)
    assert used and all(used)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_with_gated_mlps_as_matrices(family):
    model = fresh(family, torch.float32, intermediate_size=144)
    fisher = compare(model, family, 2e-4)
    assert "by rule" in next(iter(fisher.forms.values()))["rules"]


@pytest.mark.parametrize("together", [1, 7, 36])
def test_any_number_of_unit_vectors_at_a_time(together):
    model, rows = tiny("gpt2"), [row.tolist() for row in prompts(LENGTHS)]
    fisher = FisherModel(model, layers=[0, 1], precision="model")
    whole = prompt_matrices(fisher, rows, SKIP)
    for one, other in zip(whole, prompt_matrices(fisher, rows, SKIP, together), strict=True):
        assert all(relative(other.jacobians[name], J) < 1e-12 for name, J in one.jacobians.items())


def test_out_of_memory_halves_the_unit_vectors(monkeypatch, caplog):
    model, rows = tiny("gpt2"), [row.tolist() for row in prompts(LENGTHS)]
    fisher = FisherModel(model, layers=[0], precision="model")
    expected = prompt_matrices(fisher, rows, SKIP)
    right = matrices.LinearMap.pull_sums

    def small(self, cotangents_MKX, *args):
        if cotangents_MKX.shape[1] > 10:
            raise MemoryError
        return right(self, cotangents_MKX, *args)

    monkeypatch.setattr(matrices.LinearMap, "pull_sums", small)
    found = prompt_matrices(fisher, rows, SKIP)
    assert relative(found[1].jacobians[block("gpt2", 0)], expected[1].jacobians[block("gpt2", 0)]) < 1e-12
    assert "9 unit vectors are pulled back at a time" in caplog.text


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite"])
def test_metric(family, monkeypatch):
    """With all tokens taken exactly the metric is the mean of C; with fewer its mean over draws is."""
    model, (ids_T,) = fresh(family), prompts((12,))
    fisher = FisherModel(model, layers=[0], precision="model")
    expected = plain_metric(model, ids_T, block(family, 3), range(SKIP, 11))
    monkeypatch.setattr(matrices, "METRIC_TOP", 101)
    (found,) = prompt_matrices(fisher, [ids_T.tolist()], SKIP)
    assert relative(found.metric, expected) < (1e-10 if family in EXACT else 1e-5)
    monkeypatch.setattr(matrices, "METRIC_TOP", 20)
    monkeypatch.setattr(matrices, "METRIC_SAMPLES", 512)
    (found,) = prompt_matrices(fisher, [ids_T.tolist()], SKIP)
    assert 1e-9 < relative(found.metric, expected) < 0.05


def test_a_neighbour_does_not_matter():
    fisher = FisherModel(tiny("gpt2"), layers=[1], precision="model")
    one, other = (row.tolist() for row in prompts((9, 12)))
    alone, beside = prompt_matrices(fisher, [one], SKIP)[0], prompt_matrices(fisher, [other, one], SKIP)[1]
    assert relative(beside.jacobians[block("gpt2", 1)], alone.jacobians[block("gpt2", 1)]) < 1e-12
    assert torch.allclose(beside.metric, alone.metric, atol=1e-12)


def test_too_short_a_prompt():
    fisher = FisherModel(tiny("gpt2"), layers=[1])
    with pytest.raises(ValueError, match=r"prompt 1 has 4 tokens; expected at least 5"):
        prompt_matrices(fisher, [[1] * 5, [1] * 4], SKIP)


def test_when_matrices_pay():
    """They need many cotangents, and an MLP wider than the residual stream."""
    D, M = 64, 256
    gated = [torch.empty(M, D), torch.empty(M, D), torch.empty(D, M)]
    assert not matrices_pay(gated, 10) and matrices_pay(gated, D)
    narrow = [torch.empty(D // 2, D), torch.empty(D, D // 2)]
    assert not matrices_pay(narrow, D)
