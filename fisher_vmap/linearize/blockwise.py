"""A batch's scores by the form of a name: its prompts together, one at a time, or as the caller's tensor has them.

Through the recorded blocks, down with cotangents and up with tangents; through the last one at the last rows alone.

`network` goes through one block after the other. Here that is done with the derivatives of our own in place, and with a
shortcut for packed prompts: of their last block only the last rows are asked for. Where that block turns out not to
allow it, it is passed through whole.

The forward pass of the layerwise form: recorded, in the precision asked for, and as far as it is needed.

The three forms of the kernel: layerwise, whole and loop. Each gives a batch's scores; they agree to rounding.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from torch import Tensor, nn

from fisher_vmap.kernels.decoder_block import run_by_rules
from fisher_vmap.kernels.hf_attention import UnsupportedAttention, prompts_packed
from fisher_vmap.linearize.block import (
    Arrived,
    NotPositionwise,
    Parts,
    Places,
    TopRows,
    cotangents_at_a_time,
    open_top,
    places_of,
    proven_places,
    pullback_blocks,
    pullback_top,
    pushforward_block,
    pushforward_blocks,
    pushforward_top,
)
from fisher_vmap.linearize.output import Scores, Wanted, read_outcomes
from fisher_vmap.linearize.positions import Collected, unit_rows
from fisher_vmap.linearize.whole import (
    hooked_outputs,
    pullback_loop,
    pullback_whole,
    rows_from_blocks,
    rows_from_logits,
    with_biases,
    zero_biases,
)
from fisher_vmap.model.head import Head, LogitsHead
from fisher_vmap.model.layers import Hooked, hooked
from fisher_vmap.model.layout import Layout, as_given, batches_apart, forget_lengths, join_prompts, pack_rows, select
from fisher_vmap.model.offload import model_dtype, put_aside, weights_ready
from fisher_vmap.model.patches import modernised
from fisher_vmap.model.recording import Recording, StructureChanged, forwards_set, output_embedding, record
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.model.widening import forward_in_float32

log = logging.getLogger(__name__)


def pullback_layers(
    parts: Parts,
    recording: Recording,
    layout: Layout,
    layers: Sequence[str],
    unit_KBD: Tensor,
    chunk_size: int | None,
    top_rows: TopRows | None = None,
) -> Generator[Arrived, None, None]:
    """Pull cotangents of the last rows back to every hooked block; the recording is used up on the way.

    Args:
        parts: of the model.
        recording: the calls above the lowest hooked block.
        layout: of the batch.
        layers: the names of the hooked blocks.
        unit_KBD: [K, B, D], the cotangents.
        chunk_size: how many of them at a time; None: as many as the device does well with.
        top_rows: the last block at the last rows, where it has been taken off the recording.
    """
    rows_KBD = unit_KBD.to(recording.dtype)
    chunk_size = chunk_size or cotangents_at_a_time(len(rows_KBD), layout.input_ids.numel(), recording.top.device)
    with forwards_set(parts.fused):
        top_layer, top, cotangents = parts.call_order[-1], recording.top, None
        if top_rows is not None:
            cotangents = top_rows.pull(rows_KBD, chunk_size)
        elif layout.packed and recording.calls:
            cotangents = _through_top(recording, layout, rows_KBD, chunk_size)
            if cotangents is not None and top_layer in layers:
                yield Arrived(top_layer, top, layout.at_last(rows_KBD))
        if cotangents is None:
            cotangents = layout.at_last(rows_KBD)
        yield from pullback_blocks(recording, cotangents, set(layers), chunk_size, parts.rules)


def _through_top(recording: Recording, layout: Layout, rows_KBD: Tensor, chunk_size: int | None) -> Tensor | None:
    """Take the last call off the recording and pull back through it at the last rows; None where it cannot be cut."""
    call = recording.calls[-1]
    try:
        cotangents = pullback_top(call, layout, recording.top, rows_KBD, chunk_size)
    except (NotPositionwise, StructureChanged) as reason:
        log.debug("the last block is pulled back whole: %s", reason)
        return None
    recording.cut(call.hidden)
    return cotangents


def pushforward_layer(
    parts: Parts, recording: Recording, layout: Layout, layer: str, tangents: Tensor, chunk_size: int | None
) -> Tensor:
    """Push tangents of a bias at a hooked block, [b, T, K, D], to the last rows of the top, [K, B, D]."""
    K, N = tangents.shape[2], layout.input_ids.numel()
    chunk_size = chunk_size or cotangents_at_a_time(K, N, recording.top.device)
    below_top = len(recording.calls) - 1
    with forwards_set(parts.fused):
        if not (layout.packed and below_top >= 0 and recording.below_has(layer, below_top)):
            return layout.last_of(pushforward_blocks(recording, layer, tangents, chunk_size))
        moved = pushforward_blocks(recording, layer, tangents, chunk_size, stop=below_top)
        call = recording.calls[-1]
        try:
            rows_KBD = pushforward_top(call, layout, recording.top, moved, chunk_size)
        except (NotPositionwise, StructureChanged) as reason:
            log.debug("the last block is pushed through whole: %s", reason)
            rows_KBD = layout.last_of(pushforward_block(call, recording.top, moved, chunk_size))
        # Where the hooked block is called again at the top, the bias is added there as well.
        return rows_KBD if call.name != layer else rows_KBD + layout.last_of(tangents).to(rows_KBD.device)


def record_forward(
    model: nn.Module, parts: Parts, layout: Layout, first: int, precision: str, stop_before_last: bool = False
) -> Recording:
    """Record the calls from number `first` on; with mixed precision the forward is in float32, but not the replays.

    Raises:
        ValueError: the model does not run with widened weights.
    """
    if precision != "mixed":
        return record(
            model,
            parts.blocks,
            parts.call_order,
            first,
            layout,
            around=lambda calls: run_by_rules(parts.rules, calls, most=len(parts.call_order) - first - 1),
            stop_before_last=stop_before_last,
        )
    if put_aside(model):
        raise ValueError("precision mixed needs all weights in memory, and some are put aside; use precision model")
    dtype = model_dtype(model)
    try:
        with forward_in_float32(model):
            return record(model, parts.blocks, parts.call_order, first, layout, narrow_to=dtype)
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"this model does not run in float32 on weights widened one block at a time ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:160]}); use precision model or float32"
        ) from error


def record_needed(
    model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], precision: str
) -> tuple[Recording, TopRows | None]:
    """Record the forward; where only the last rows of the last block are needed, these, and it is off the recording."""
    first = min(parts.call_order.index(layer) for layer in layers) + 1
    needless = layout.packed and precision != "mixed" and parts.call_order[-1] not in layers and not put_aside(model)
    if needless and parts.top_places is not None:
        recording = record_forward(model, parts, layout, first, precision, stop_before_last=True)
        call = recording.calls[-1]
        try:
            if places_of(call, layout) == parts.top_places:
                with forwards_set(parts.fused):
                    top = open_top(call, layout)
                recording.cut(call.hidden)
                return recording, top
        except NotPositionwise as reason:
            log.debug("the last block is run whole: %s", reason)
    return record_forward(model, parts, layout, first, precision), None


def prove_top(model: nn.Module, parts: Parts, layout: Layout) -> Places | None:
    """Whether the last block's forward may be cut at the last rows: on these packed prompts, from its whole forward."""
    recording = record_forward(model, parts, layout, len(parts.call_order) - 1, "model")
    return proven_places(recording.calls[-1], layout, recording.top)


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


def run_form(
    form: str, prompts: str, model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted
) -> Scores:
    """The scores by a form.

    A batch that cannot be packed (a prompt longer than an attention window) is padded instead, to the same result.

    Args:
        form: "packed", "layerwise", "whole" or "loop".
        prompts: "together", "alone" (one at a time) or "given" (as the caller's tensor has them).
        model: a causal LM.
        parts: of it.
        layout: the batch, padded.
        layers: names of hooked modules.
        wanted: what is asked of the batch.
    """
    if prompts == "given":
        forget_lengths(model)
        with modernised(() if form == "loop" else parts.old_functions):
            return _run_together(form, model, parts, as_given(layout), layers, wanted)
    groups = [[b] for b in range(len(layout.lengths))] if prompts == "alone" else batches_apart(model, layout.lengths)
    parts_of = []
    for group in groups:
        forget_lengths(model)
        together = select(layout, group)
        with modernised(() if form == "loop" else parts.old_functions):
            parts_of.append(_run_together(form, model, parts, together, layers, _of_prompts(wanted, group)))
    return join_prompts(parts_of, groups)


def _run_together(
    form: str, model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted
) -> Scores:
    if form == "packed":
        try:
            packed = pack_rows(layout)
            with prompts_packed(packed):
                return layerwise(model, parts, packed, layers, wanted)
        except UnsupportedAttention as reason:
            log.debug("a batch is padded, not packed: %s", reason)
    if form in ("packed", "layerwise"):
        return layerwise(model, parts, layout, layers, wanted)
    with weights_ready(model):
        return whole(model, parts, layout, layers, wanted, loop=form == "loop")


def _of_prompts(wanted: Wanted, prompts: list[int]) -> Wanted:
    token_ids = None if wanted.token_ids is None else wanted.token_ids[prompts]
    positions = wanted.positions[prompts] if isinstance(wanted.positions, Tensor) else wanted.positions
    probes = wanted.probes and wanted.probes._replace(seeds=[wanted.probes.seeds[b] for b in prompts])
    return replace(wanted, token_ids=token_ids, positions=positions, probes=probes)
