"""Products at the live rows of each prompt, against plain autograd one prompt at a time, in float64 throughout."""

from collections.abc import Iterator

import pytest
import torch
from models import BLOCKS, fresh, padded, prompts
from oracles import in_float64
from torch import Tensor

from fisher_vmap.linearize.linear_map import KernelOptions, LinearMap, undisturbed
from fisher_vmap.linearize.model_info import Choice
from fisher_vmap.linearize.probe import probe
from fisher_vmap.linearize.scores import opened
from fisher_vmap.model.layout import Layout, lay_out

LENGTHS = (7, 6, 12, 5)
LATE = (4, 5, 9, 3)  # the first position of the bias
EARLY_TARGETS = ((5,), (2, 4), (9, 10), (2, 3))  # none at the end of its prompt
ATTENTION = [
    "llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt_oss", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "olmo2",
    "phi3",
]  # fmt: skip
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with in_float64():
        yield


def masks(case: str) -> list[Tensor]:
    """Where the bias is added, [T] bool for each prompt."""
    if case == "all":
        return [torch.ones(n, dtype=torch.bool) for n in LENGTHS]
    if case == "last":
        return [torch.arange(n) == n - 1 for n in LENGTHS]
    late = [torch.arange(n) >= start for n, start in zip(LENGTHS, LATE, strict=True)]
    if case == "late":
        return late
    return [mask & (torch.arange(len(mask)) % 2 == len(mask) % 2) | (mask.cumsum(0) == 1) for mask in late]  # gaps


def layout_of(rows: list[Tensor], case: str, targets: tuple | None) -> Layout:
    ids, mask = padded(rows, "left", extra=2)
    positions: str | Tensor = case
    if case not in ("all", "last"):
        positions = torch.ones_like(mask)  # what it says of padding must not matter
        positions[mask == 1] = torch.cat(masks(case)).long()
    return lay_out(ids, mask, positions)._replace(targets=targets)


def expected(model, row, layer, where, targets, fields_MKX) -> Tensor:
    """J^T u at each position, [K, T, D], by autograd's backward passes."""
    theta_TD = torch.zeros(len(row), fields_MKX.shape[2], dtype=torch.float64, requires_grad=True)
    kept = []
    first = lambda output: output if isinstance(output, Tensor) else output[0]  # noqa: E731

    def add(_module, _args, output):
        moved = first(output) + where.double()[:, None] * theta_TD
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    top = model.get_submodule(layer.rpartition(".")[0] + f".{BLOCKS - 1}")
    hooks = [
        model.get_submodule(layer).register_forward_hook(add),
        top.register_forward_hook(lambda _m, _a, output: kept.append(first(output))),
    ]
    model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    h_MX = kept[0][0, list(targets)]
    every = range(fields_MKX.shape[1])
    return torch.stack([torch.autograd.grad(h_MX, theta_TD, fields_MKX[:, k], retain_graph=True)[0] for k in every])


def products(net: LinearMap, layers: list[str], K: int) -> tuple[Tensor, Tensor, dict, dict]:
    M, X = net.rows.shape
    fields = torch.randn(M, K, X, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = torch.randn(len(LENGTHS), K, X, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pulled = net.pull(fields)
    return fields, directions, pulled, {layer: net.push(directions, layer) for layer in layers}


def assert_right(model, form: str, case: str, targets: tuple | None, K: int, numbers=(0, 2, BLOCKS - 1), chunk=None):
    """Pull, its energy and push at several layers; returns how the layout was narrowed and what could not be."""
    rows = prompts(LENGTHS)
    layout = layout_of(rows, case, targets)
    family = next(name for name in ("model", "transformer", "gpt_neox", "backbone") if hasattr(model, name))
    layers = [f"{family}.{'h' if family == 'transformer' else 'layers'}.{n}" for n in numbers]
    with torch.no_grad(), undisturbed(model):
        known = probe(model, layout)
        choice, options = Choice(form, "ours", "together", ""), KernelOptions(precision="model", chunk_size=chunk)
        for layer in layers:
            known.forms[layer, "auto"] = choice
        with opened(choice, model, known, layout, layers, options) as net:
            assert net.layout.packed == (form == "packed")
            live = net.live.input_ids.shape
            fields, directions, pulled, moved = products(net, layers, K)
    start = 0
    where = masks(case)
    for b, row in enumerate(rows):
        places = (len(row) - 1,) if targets is None else targets[b]
        stop = start + len(places)
        for layer in layers:
            by_position = expected(model, row, layer, where[b], places, fields[start:stop])
            assert_close(pulled[layer].gradients[b], by_position.sum(1))
            # u . (J v) = (J^T u) . v
            ours = torch.einsum("mix,mjx->ij", fields[start:stop], moved[layer][start:stop])
            assert_close(ours, by_position.sum(1) @ directions[b].T)
            begin = layout.start[b]
            energy = torch.zeros(layout.width, dtype=torch.float64)
            energy[begin : begin + len(row)] = by_position.square().sum((0, 2))
            assert_close(pulled[layer].energy[b], energy)
        start = stop
    return live, known


def assert_close(found: Tensor, right: Tensor) -> None:
    """Zero must be zero, where the bias comes after the target."""
    assert (found - right).norm() <= TOLERANCE * right.norm()


CASES = [
    ("last", None), ("late", None), ("gaps", None), ("late", EARLY_TARGETS), ("all", EARLY_TARGETS),
    ("last", EARLY_TARGETS), ("all", None),
]  # fmt: skip


@pytest.mark.parametrize(("case", "targets"), CASES)
@pytest.mark.parametrize("form", ["packed", "layerwise"])
@pytest.mark.parametrize("family", ATTENTION)
def test_products_at_live_rows(family, form, case, targets):
    model = fresh(family)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    live, known = assert_right(model, form, case, targets, K=3)
    assert not any(known.parts.not_narrow.values())
    assert all(known.ran(layer, "auto")["rows"] == "live rows only" for layer, _ in known.forms)
    if case != "all":
        assert live[1] < (sum(LENGTHS) if form == "packed" else max(LENGTHS))


@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("form", ["packed", "layerwise"])
def test_one_vector_and_several_in_chunks(form, K, chunk):
    assert_right(fresh("gpt2"), form, "late", None, K, chunk=chunk)
    assert_right(fresh("llama"), form, "last", None, K, numbers=(2,), chunk=chunk)
