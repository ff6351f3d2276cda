"""`Blockwise`: the linear map one decoder block at a time, from a recorded forward.

It drives the products of `block`, uses the rules of `kernels` for blocks and modules that have one, and takes a
shortcut for packed prompts: the last block is run and pulled back at the last rows only, if it allows that.
"""

from collections.abc import Generator

from torch import Tensor, nn

from fisher_vmap.kernels.decoder_block import run_by_rules
from fisher_vmap.linearize.block import (
    Arrived,
    LastBlock,
    NotPositionwise,
    cotangents_at_a_time,
    open_last,
    places_of,
    pullback_blocks,
    pushforward_blocks,
    pushforward_last,
)
from fisher_vmap.linearize.linear_map import LinearMap
from fisher_vmap.linearize.model_info import Parts, Places
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.offload import is_offloaded, model_dtype
from fisher_vmap.model.recording import Recording, StructureChanged, forwards_set, record
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.model.widening import forward_in_float32


class Blockwise(LinearMap):
    """The linear map one block at a time, for padded or packed prompts."""

    def _open(self) -> None:
        parts, layout = self._parts, self.layout
        assert parts.head is not None
        self._last: LastBlock | None = None
        self._cut_in_forward, self._cannot_be_cut = False, not layout.packed or layout.targets is not None
        self._recording = self._record()
        recording = self._recording
        self.rows = layout.targets_of(recording.top) if self._last is None else self._last.rows
        self.head, self.dtype = parts.head, recording.dtype
        names = [recording.below, *(call.name for call in recording.calls)]
        outputs = dict(zip(names, [*(call.hidden for call in recording.calls), recording.top], strict=True))
        self._describe({layer: outputs[layer] for layer in self.layers})

    def _record(self) -> Recording:
        """Record the forward. If only the last rows of the last block are needed, open that block apart from it."""
        model, parts, layout = self._model, self._parts, self.layout
        first = min(parts.call_order.index(layer) for layer in self.layers) + 1
        needless = self._precision != "mixed" and parts.call_order[-1] not in self.layers and not is_offloaded(model)
        if needless and not self._cannot_be_cut and parts.top_places is not None:
            recording = record_forward(model, parts, layout, first, self._precision, stop_before_last=True)
            call = recording.calls[-1]
            try:
                if places_of(call, layout) == parts.top_places:
                    with forwards_set(parts.fused):
                        self._last = open_last(call, layout)
                    recording.cut(call.hidden)
                    self._cut_in_forward = True
                    return recording
            except NotPositionwise as reason:
                self.note("forward cut", f"the last block's forward runs at all positions: {reason}")
        return record_forward(model, parts, layout, first, self._precision)

    def _last_block(self, recording: Recording) -> LastBlock | None:
        """The last block at the last rows; None if it has to be run at all positions."""
        if self._last is None and not self._cannot_be_cut and recording.calls:
            try:
                self._last = open_last(recording.calls[-1], self.layout, recording.top)
            except (NotPositionwise, StructureChanged) as reason:
                self.note("cut", f"the last block is pulled back at all positions: {reason}")
                self._cannot_be_cut = True
        return self._last

    def _pull(self, unit_KMX: Tensor) -> Generator[Arrived, None, None]:
        parts, layout = self._parts, self.layout
        recording = self._recording if self._once else self._recording.copy()
        rows_KMD = unit_KMX.to(recording.dtype)
        chunk_size = self._at_a_time(len(rows_KMD))
        with forwards_set(parts.fused):
            last = self._last_block(recording)
            if last is None:
                cotangents = layout.at_targets(rows_KMD)
            else:
                cotangents = last.pull(rows_KMD, chunk_size)
                if not self._cut_in_forward:
                    recording.cut(last.call.hidden)
                    if parts.call_order[-1] in self.layers:
                        yield Arrived(parts.call_order[-1], layout.at_targets(rows_KMD))
            if self._once:
                del last
                self._last = None
            yield from pullback_blocks(recording, cotangents, set(self.layers), chunk_size, parts.rules)

    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        recording, layout = self._recording, self.layout
        chunk_size = self._at_a_time(tangents.shape[2])
        with forwards_set(self._parts.fused):
            last = self._last_block(recording)
            stop = len(recording.calls) - (last is not None and not self._cut_in_forward)
            if last is None or not recording.below_has(layer, stop):
                return layout.fields_of(pushforward_blocks(recording, layer, tangents, chunk_size))
            moved = pushforward_blocks(recording, layer, tangents, chunk_size, stop=stop)
            rows_KMD = pushforward_last(last, layout, moved, chunk_size)
            called_again = last.call.name == layer  # then the bias is added at the top as well
            return rows_KMD + layout.fields_of(tangents).to(rows_KMD.device) if called_again else rows_KMD

    def _at_a_time(self, vectors: int) -> int | None:
        N = self.layout.input_ids.numel()
        return self._chunk_size or cotangents_at_a_time(vectors, N, self._recording.top.device)


def record_forward(
    model: nn.Module, parts: Parts, layout: Layout, first: int, precision: str, stop_before_last: bool = False
) -> Recording:
    """Record the calls from number `first` on; with precision "mixed" the forward alone is in float32."""
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
    if is_offloaded(model):
        raise ValueError("precision mixed needs all weights in memory, and some are offloaded; use precision model")
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


def prove_top(model: nn.Module, parts: Parts, layout: Layout) -> Places:
    """Prove on packed prompts that the last block may be run at the last rows alone; raises as `open_last`."""
    recording = record_forward(model, parts, layout, len(parts.call_order) - 1, "model")
    open_last(recording.calls[-1], layout, recording.top)
    return places_of(recording.calls[-1], layout)
