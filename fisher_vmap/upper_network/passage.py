"""Through the recorded blocks, down with cotangents and up with tangents; through the last one at the last rows alone.

`network` goes through one block after the other. Here that is done with the derivatives of our own in place, and with a
shortcut for packed prompts: of their last block only the last rows are asked for. Where that block turns out not to
allow it, it is passed through whole.
"""

import logging
from collections.abc import Generator, Sequence

from torch import Tensor

from fisher_vmap.anatomy.layout import Layout
from fisher_vmap.anatomy.recording import Recording, StructureChanged, forwards_set
from fisher_vmap.network import (
    Arrived,
    cotangents_at_a_time,
    pullback_blocks,
    pushforward_block,
    pushforward_blocks,
)
from fisher_vmap.upper_network.model_parts import Parts
from fisher_vmap.upper_network.top_block import NotPositionwise, TopRows, pullback_top, pushforward_top

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
