"""The three forms of the kernel: layerwise, whole and loop. Each gives a batch's scores; they agree to rounding."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from torch import Tensor, nn

from fisher_vmap.anatomy.blocks import output_embedding
from fisher_vmap.anatomy.layers import hooked
from fisher_vmap.anatomy.layout import Layout
from fisher_vmap.anatomy.streams import Hooked
from fisher_vmap.head import Head, LogitsHead
from fisher_vmap.outcomes import Wanted, read_outcomes
from fisher_vmap.scores import Scores
from fisher_vmap.upper_network.arrivals import Collected, unit_rows
from fisher_vmap.upper_network.forward import record_needed
from fisher_vmap.upper_network.model_parts import Parts
from fisher_vmap.upper_network.passage import pullback_layers
from fisher_vmap.upper_network.whole import (
    hooked_outputs,
    pullback_loop,
    pullback_whole,
    rows_from_blocks,
    rows_from_logits,
    with_biases,
    zero_biases,
)


def layerwise(model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted) -> Scores:
    """Record one forward, read the head, and pull its cotangents through one block at a time."""
    assert parts.head is not None
    recording, top_rows = record_needed(model, parts, layout, layers, wanted.precision)
    outcomes = read_outcomes(parts.head, layout.last(recording.top) if top_rows is None else top_rows.rows, wanted)
    unit_KBD, norm_KB = unit_rows(outcomes.cotangents)
    often = {name for name in layers if parts.call_order.count(name) > 1}
    collected = Collected(layout, outcomes, norm_KB, wanted.positions, often)
    pulled = pullback_layers(parts, recording, layout, layers, unit_KBD, wanted.chunk_size, top_rows)
    with closing(pulled) as arrivals:
        for layer, hidden, arrived in arrivals:
            collected.add(layer, hidden, arrived)
    return collected.scores(layers)


def whole(
    model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted, *, loop: bool = False
) -> Scores:
    """One batched call of the pullback of the whole upper network; with `loop`, K backward passes of plain autograd."""
    if wanted.precision == "mixed":
        raise ValueError(
            f"precision mixed needs the layerwise kernel, which {layers[0]} cannot have; use precision float32"
        )
    modules = hooked(model, layers)
    head: Head
    if loop:  # the last resort: the model's own forward to the end
        run, head = rows_from_logits(model, layout, gather=False), LogitsHead()
    else:
        run, head = rows_and_head(model, parts, layout, modules)
    outputs = hooked_outputs(run, modules, layout)
    zeros = zero_biases(outputs)
    rows, pullback = (pullback_loop if loop else pullback_whole)(with_biases(run, modules), zeros)
    outcomes = read_outcomes(head, rows.detach(), wanted)
    unit_KBX, norm_KB = unit_rows(outcomes.cotangents)
    arrived = pullback(unit_KBX.to(rows.dtype), wanted.chunk_size)
    collected = Collected(layout, outcomes, norm_KB, wanted.positions)
    for layer in layers:
        collected.add(layer, outputs[layer], arrived.pop(layer))
    return collected.scores(layers)


def rows_and_head(
    model: nn.Module, parts: Parts, layout: Layout, modules: Mapping[str, Hooked]
) -> tuple[Callable[[], Tensor], Head]:
    """The upper network and the head that reads its rows: up to the blocks' end, or to the logits if need be."""
    if parts.head is None or any(id(hook.module) in parts.above for hook in modules.values()):
        unembedding = output_embedding(model)  # where that is hooked, it must see all positions
        gather = parts.gather and all(hook.module is not unembedding for hook in modules.values())
        return rows_from_logits(model, layout, gather=gather), LogitsHead()
    return rows_from_blocks(model, parts.blocks, parts.call_order, layout), parts.head
