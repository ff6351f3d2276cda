"""The linear map at targets of the caller's choice, against plain autograd one prompt at a time."""

import pytest
import torch
from devices import placed
from models import block, fresh, padded, prompts
from oracles import relative

from fisher_vmap.linearize.linear_map import KernelOptions, undisturbed
from fisher_vmap.linearize.model_info import Choice
from fisher_vmap.linearize.probe import probe
from fisher_vmap.linearize.scores import opened
from fisher_vmap.model.layout import lay_out

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
