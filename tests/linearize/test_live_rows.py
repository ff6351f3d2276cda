"""Products at the live rows of each prompt, against plain autograd one prompt at a time, in float64 throughout."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from models import BLOCKS, block, fresh, padded, prompts
from oracles import in_float64, plain_scores, relative
from torch import Tensor, nn

from fisher_vmap import fisher_scores
from fisher_vmap.kernels import hf_attention
from fisher_vmap.kernels.decoder_block import BlockRule
from fisher_vmap.linearize import block as block_module
from fisher_vmap.linearize.linear_map import KernelOptions, LinearMap, undisturbed
from fisher_vmap.linearize.model_info import Choice
from fisher_vmap.linearize.probe import known_of, probe
from fisher_vmap.linearize.scores import opened
from fisher_vmap.model.layout import Layout, lay_out
from fisher_vmap.model.recording import StructureChanged, hooks

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


def assert_right(
    model, form: str, case: str, targets: tuple | None, K: int, numbers=(0, 2, BLOCKS - 1), chunk=None, rules=True
):
    """Pull, its energy and push at several layers; returns how the layout was narrowed and what could not be."""
    rows = prompts(LENGTHS)
    layout = layout_of(rows, case, targets)
    family = next(name for name in ("model", "transformer", "gpt_neox", "backbone") if hasattr(model, name))
    layers = [f"{family}.{'h' if family == 'transformer' else 'layers'}.{n}" for n in numbers]
    with torch.no_grad(), undisturbed(model):
        known = probe(model, layout)
        if not rules:
            known.parts = replace(known.parts, rules={})
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


def rows_seen(model, module: str, **choices) -> list[int]:
    """How many rows a module is given, call by call, where no block has a rule and nothing is left to prove."""
    batch = padded(prompts((7, 4, 9)), "right")
    seen, watched = [], model.get_submodule(module)

    def look(called, args):
        if called is watched:
            seen.append(args[0].shape[0] * args[0].shape[1])

    for _ in range(3):
        if known_of(model) is not None:
            known_of(model).parts = replace(known_of(model).parts, rules={})
        seen.clear()
        with hooks(nn.modules.module.register_module_forward_pre_hook(look)):
            fisher_scores(model, *batch, top_k=4, audit="off", **choices)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_rows_that_pass_through_a_block(family):
    """Forward through all rows, pullback through one row of each prompt."""
    model = fresh(family)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for number in (1, 2):
        mlp = f"{block(family, number)}.mlp"
        assert rows_seen(model, mlp, layers=block(family, 0), positions="last") == [20, 3]
    assert rows_seen(model, f"{block(family, 3)}.mlp", layers=block(family, 0), positions="last") == [3]


@pytest.mark.parametrize(("positions", "rows"), [("last", 3), ("all", 20)])
def test_rows_that_pass_through_a_block_by_its_rule(monkeypatch, positions, rows):
    seen, right = [], BlockRule.pull

    def look(self, x, kept, cotangents, *args):
        seen.append((len(x), len(cotangents)))
        return right(self, x, kept, cotangents, *args)

    monkeypatch.setattr(BlockRule, "pull", look)
    model, batch = fresh("llama"), padded(prompts((7, 4, 9)), "right")
    fisher_scores(model, *batch, layers=block("llama", 0), top_k=4, audit="off", positions=positions)
    seen.clear()
    fisher_scores(model, *batch, layers=block("llama", 0), top_k=4, audit="off", positions=positions)
    blocks = 3 if positions == "last" else 2  # of the last block only the targets are read: here all its live rows
    assert seen == [(rows, rows)] * blocks


def test_rows_that_pass_through_a_block_of_padded_prompts():
    """One column after the other from the earliest last token on."""
    model, layer = fresh("llama"), block("llama", 0)
    model.model.layers[1].register_forward_hook(lambda _module, _args, output: output)  # a user's: no rule
    known = None
    with undisturbed(model):
        known = probe(model, lay_out(*padded(prompts((7, 4, 9)), "right")))
    known.forms[layer, "auto"] = Choice("layerwise", "ours", "together", "", 12, 36)
    assert rows_seen(model, "model.layers.2.mlp", layers=layer, positions="last") == [3 * 9, 3 * 6]


class Smeared(nn.Module):
    """An MLP that also sees the position before: at some rows alone it is another function."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(("case", "targets"), [("last", None), ("late", EARLY_TARGETS)])
def test_a_block_that_mixes_positions_keeps_all_rows(number, case, targets, caplog):
    model = fresh("llama")
    model.model.layers[number].mlp = Smeared(model.model.layers[number].mlp)
    with caplog.at_level(logging.INFO, logger="fisher_vmap"):
        live, known = assert_right(model, "layerwise", case, targets, K=3)
    assert live[1] < max(LENGTHS)
    whole = [name for name, why in known.parts.not_narrow.items() if why]
    assert whole == [f"model.layers.{number}"]
    said = known.ran("model.layers.0", "auto")["rows"]
    assert said.startswith(f"all in 1 of 3 blocks: model.layers.{number}: what it returns for these rows alone is ")
    assert caplog.text.count(f"model.layers.{number} is pulled back at all rows") == 1


@pytest.mark.parametrize("case", ["last", "late"])
def test_a_recurrent_model_keeps_all_rows(case):
    live, known = assert_right(fresh("mamba"), "layerwise", case, None, K=3)
    assert live[1] == max(LENGTHS)
    assert known.ran("backbone.layers.0", "auto")["rows"] == "all: the attention is not ours"


def test_a_bias_at_the_last_token_of_prompts_of_one_token_and_more():
    model, rows, layer = fresh("gpt2"), prompts((1, 7, 1, 2, 30, 27, 1)), block("gpt2", 1)
    for positions in ("last", "all"):
        scores = fisher_scores(model, *padded(rows, "left"), layers=layer, top_k=3, positions=positions, audit="off")
        for b, row in enumerate(rows):
            where = torch.arange(len(row)) >= (len(row) - 1 if positions == "last" else 0)
            right = plain_scores(model, row, layer, top_k=3, where_T=where)
            assert torch.equal(scores.token_ids[b], right.token_ids)
            assert relative(scores.gradients[layer][b], right.gradients) < TOLERANCE


def test_another_bias_in_the_same_model_needs_no_new_proof_and_none_is_carried_over():
    model, rows, layer = fresh("llama"), prompts((6, 4, 9)), block("llama", 0)
    for starts in ((5, 3, 8), (2, 3, 4), (0, 1, 2), (5, 0, 8)):
        where = [torch.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
        ids, mask = padded(rows, "right")
        positions = torch.zeros_like(mask)
        positions[mask == 1] = torch.cat(where).long()
        scores = fisher_scores(model, ids, mask, layers=layer, top_k=3, positions=positions)
        for b, row in enumerate(rows):
            right = plain_scores(model, row, layer, token_ids=scores.token_ids[b], where_T=where[b])
            assert relative(scores.gradients[layer][b], right.gradients) < TOLERANCE


def wrong_rows(monkeypatch, change) -> None:
    """From here on the first live row of each prompt is another one."""
    right = block_module.first_live
    monkeypatch.setattr(block_module, "first_live", lambda layout: change(right(layout)))


@pytest.mark.parametrize("form", ["packed", "layerwise"])
def test_a_live_row_too_few_would_show(monkeypatch, form):
    wrong_rows(monkeypatch, lambda first: [f + 1 for f in first])
    with pytest.raises(AssertionError):
        assert_right(fresh("gpt2"), form, "late", None, K=2)


def test_a_live_row_too_many_does_not_matter(monkeypatch):
    wrong_rows(monkeypatch, lambda first: [f - 1 for f in first])
    assert_right(fresh("gpt2"), "packed", "late", None, K=2)


@pytest.mark.parametrize("end", [-1, 1])
def test_a_key_too_few_or_too_many_is_noticed(monkeypatch, end):
    """The last query's own key, or that of a token after it or of a neighbour."""
    right = hf_attention.group_prompts

    def shifted(keys, device, live=None, queries=None, *more, **named):
        if live is not None:
            keys = [(start, stop + end) for start, stop in keys]
        return right(keys, device, live, queries, *more, **named)

    monkeypatch.setattr(hf_attention, "group_prompts", shifted)
    _, known = assert_right(fresh("gpt2"), "packed", "late", ((5,), (5,), (9, 10), (3,)), K=2, rules=False)
    assert all(known.parts.not_narrow[f"transformer.h.{n}"] for n in (1, 2, 3))  # all rows, and right


def test_keys_of_a_neighbour_are_noticed(monkeypatch):
    right = hf_attention._Replay.keys

    def rolled(self, module, key, value):
        live, every = right(self, module, key, value)
        return live, tuple(x.roll(3, 2) for x in every)

    monkeypatch.setattr(hf_attention._Replay, "keys", rolled)
    model = fresh("gpt2")
    _, known = assert_right(model, "packed", "late", None, K=2, rules=False)  # every block fell back to all rows
    assert all("these rows alone" in known.parts.not_narrow[f"transformer.h.{n}"] for n in (1, 2, 3))


def test_a_block_that_changes_after_its_proof_is_noticed():
    model, rows, layer = fresh("llama"), prompts((6, 4, 9)), block("llama", 0)
    batch = padded(rows, "right")
    fisher_scores(model, *batch, layers=layer, top_k=3, positions="last", audit="off")
    known = known_of(model)
    known.parts = replace(known.parts, rules={})
    fisher_scores(model, *batch, layers=layer, top_k=3, positions="last", audit="off")
    assert known.parts.not_narrow["model.layers.2"] == ""
    with undisturbed(model), torch.no_grad():
        layout = lay_out(*batch, "last")
        model.model.layers[2].mlp.down_proj.register_forward_hook(
            lambda _m, _a, out: out * (1 if out.shape[1] == sum(map(len, rows)) else 1.01)
        )
        options = KernelOptions(precision="model")
        with opened(Choice("packed", "ours", "together", ""), model, known, layout, [layer], options) as net:
            fields = torch.ones(3, 1, net.rows.shape[1], dtype=torch.float64)
            with pytest.raises(StructureChanged, match=r"the replay of model\.layers\.2"):
                net.pull(fields)


def test_the_forward_in_float32_keeps_keys_in_the_format_of_the_pullback():
    model, rows, layer = fresh("llama", torch.bfloat16), prompts((6, 4, 9)), block("llama", 0)
    batch, wide = padded(rows, "right"), fresh("llama", torch.float32).to(torch.bfloat16).float()
    scores = fisher_scores(model, *batch, layers=layer, top_k=3, positions="last", precision="mixed")
    for b, row in enumerate(rows):
        where = torch.arange(len(row)) == len(row) - 1
        right = plain_scores(wide, row, layer, token_ids=scores.token_ids[b], where_T=where)
        assert relative(scores.gradients[layer][b], right.gradients) < 0.05
