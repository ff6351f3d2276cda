"""The linear map at targets of the caller's choice, against plain autograd one prompt at a time; residual norms."""

import pytest
import torch
from devices import placed
from models import block, fresh, padded, prompts
from oracles import relative

from fisher_vmap import fisher_scores
from fisher_vmap.linearize import block as block_module
from fisher_vmap.linearize.linear_map import KernelOptions, undisturbed
from fisher_vmap.linearize.model_info import Choice
from fisher_vmap.linearize.probe import probe
from fisher_vmap.linearize.residual_norms import mean_norms, residual_norm
from fisher_vmap.linearize.scores import opened
from fisher_vmap.model.layout import Layout, lay_out, pack_rows

LENGTHS, TARGETS = (6, 3, 8), ((1, 4, 5), (2,), (0, 7))
K = 3


def expected(model, row, layer, targets, fields_MKX, positions):
    """J^T u of one prompt, [K, D], by a bias leaf and autograd's backward."""
    where = torch.ones(len(row), 1, dtype=torch.float64)
    if positions == "last":
        where[:-1] = 0
    theta = torch.zeros(fields_MKX.shape[-1], dtype=torch.float64, requires_grad=True)
    kept = []
    hooks = [
        model.get_submodule(layer).register_forward_hook(lambda _m, _a, out: out + where * theta),
        model.get_submodule(block("llama", -1)).register_forward_hook(lambda _m, _a, out: kept.append(out)),
    ]
    model(row[None])
    for hook in hooks:
        hook.remove()
    h_MX = kept[0][0, list(targets)]
    return torch.stack([torch.autograd.grad(h_MX, theta, fields_MKX[:, k], retain_graph=True)[0] for k in range(K)])


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("form", ["packed", "layerwise", "whole"])
def test_products_at_several_targets(form, positions, device):
    model, layer, rows = fresh("llama"), block("llama", 1), prompts(LENGTHS)
    there, batch = placed((model, padded(rows, "left")), device)
    layout = lay_out(*batch, positions)
    with torch.no_grad(), undisturbed(there):
        known = probe(there, layout)
        choice, options = Choice(form, "ours", "together", ""), KernelOptions(precision="model")
        with opened(choice, there, known, layout._replace(targets=TARGETS), [layer], options) as net:
            M, X = net.rows.shape
            assert sum(map(len, TARGETS)) == M
            fields = torch.randn(M, K, X, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            directions = torch.randn(3, K, X, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            pulled = net.pull(fields.to(device))[layer].gradients.cpu()
            moved = net.push(directions.to(device), layer).cpu()
    start = 0
    for b, row in enumerate(rows):
        stop = start + len(TARGETS[b])
        gradients = expected(model, row, layer, TARGETS[b], fields[start:stop], positions)
        assert relative(pulled[b], gradients) < 1e-6
        products = torch.einsum("mix,mjx->ij", fields[start:stop], moved[start:stop])
        assert relative(products, gradients @ directions[b].T) < 1e-6
        start = stop


@pytest.mark.parametrize("kernel", ["layerwise", "without rules", "whole", "loop"])
def test_the_layout_of_what_is_summed_is_always_the_same(kernel, monkeypatch):
    """The order of a sum, and its last digit, follow the strides, which autograd may choose anew for each call."""
    summed = []
    right = Layout.sum_prompts

    def watched(layout, x, dtype):
        summed.append(x)
        return right(layout, x, dtype)

    monkeypatch.setattr(Layout, "sum_prompts", watched)
    if kernel == "without rules":
        monkeypatch.setattr(block_module, "_pull_by_rule", lambda *_: False)
        kernel = "layerwise"
    layers = [block("llama", i) for i in (0, 1, 2)]
    fisher_scores(fresh("llama"), *padded(prompts((6, 2, 9)), "right"), layers=layers, top_k=3, kernel=kernel)
    assert summed and all(x.is_contiguous() for x in summed)


def outputs_of(lengths, how, dtype, streams=()):
    """A layout, and the outputs of a layer in it: the first token of each prompt is massive, padding is NaN."""
    ids, mask = padded(prompts(lengths), "left", extra=1)
    layout = lay_out(ids, mask)
    layout = pack_rows(layout) if how == "packed" else layout
    shape = (*layout.input_ids.shape, *streams, 5)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [list(range(first, stop)) for first, stop in layout.ranges()]
    flat = hidden.flatten(0, 1)
    flat[[own[0] for own in rows]] *= 1000
    flat[[row for row in range(len(flat)) if not any(row in own for own in rows)]] = torch.nan
    hidden = hidden.to(dtype)
    return layout, hidden, [hidden.flatten(0, 1)[own].double() for own in rows]


def norms_of(tokens):
    """The norm of each token, the mean of its streams."""
    return tokens.norm(dim=-1).view(len(tokens), -1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["padded", "packed"])
@pytest.mark.parametrize("streams", [(), (3,)])
def test_a_residual_norm_is_the_median_and_not_moved_by_one_massive_token(how, streams, dtype, device):
    layout, hidden, tokens = outputs_of((6, 1, 2, 9), how, dtype, streams)
    there = layout._replace(input_ids=layout.input_ids.to(device)), hidden.to(device)
    found = residual_norm(there[1], there[0]).cpu()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.stack([norms_of(each).quantile(0.5) for each in tokens])
    torch.testing.assert_close(found.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    with mean_norms():
        means = residual_norm(there[1], there[0]).cpu()
    assert means[0] > 50 * found[0] and torch.equal(residual_norm(there[1], there[0]).cpu(), found)
    expected = torch.stack([norms_of(each).mean() for each in tokens])
    torch.testing.assert_close(means.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    with mean_norms(False):
        assert torch.equal(residual_norm(there[1], there[0]).cpu(), found)


@pytest.mark.parametrize("how", ["padded", "packed"])
@pytest.mark.parametrize("token", [0, 2, 5])
def test_a_token_that_is_not_finite_makes_its_own_prompts_norm_nan(how, token, device):
    layout, hidden, tokens = outputs_of((6, 1, 2, 9), how, torch.float32)
    hidden.flatten(0, 1)[layout.ranges()[0][0] + token, 1] = torch.nan
    found = residual_norm(hidden.to(device), layout._replace(input_ids=layout.input_ids.to(device))).cpu()
    assert found.isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(found[3].double(), norms_of(tokens[3]).quantile(0.5), rtol=1e-6, atol=0)
