"""The forward pass of the layerwise form: recorded, in the precision asked for, and as far as it is needed."""

import logging
from collections.abc import Sequence

from torch import nn

from fisher_vmap.anatomy.layout import Layout
from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.placement import model_dtype, put_aside
from fisher_vmap.anatomy.recording import Recording, forwards_set, record
from fisher_vmap.anatomy.widening import forward_in_float32
from fisher_vmap.pullbacks.fused_block import run_by_rules
from fisher_vmap.upper_network.model_parts import Parts
from fisher_vmap.upper_network.top_block import NotPositionwise, Places, TopRows, open_top, places_of, proven_places

log = logging.getLogger(__name__)


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
