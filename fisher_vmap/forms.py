"""The three forms of the kernel: layerwise, whole and loop. Each gives a batch's scores; they agree to rounding."""

import logging
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisher_vmap.blocks import output_embedding
from fisher_vmap.fused import Forward, fused_pullbacks
from fisher_vmap.fused_block import Rules, run_by_rules
from fisher_vmap.head import Head, LogitsHead, UnembeddingHead
from fisher_vmap.layers import hooked
from fisher_vmap.layout import Layout
from fisher_vmap.memory import is_out_of_memory
from fisher_vmap.mixed import float32_forward
from fisher_vmap.network import (
    Arrived,
    cotangents_at_a_time,
    pullback_blocks,
    pushforward_block,
    pushforward_blocks,
)
from fisher_vmap.old_functions import OldFunction
from fisher_vmap.outcomes import Outcomes, Wanted, read_outcomes
from fisher_vmap.placement import model_dtype, put_aside
from fisher_vmap.positions import energy_of_one, position_mask, sum_positions
from fisher_vmap.recording import Recording, StructureChanged, record
from fisher_vmap.scores import Scores
from fisher_vmap.streams import Hooked
from fisher_vmap.top_block import (
    NotPositionwise,
    Places,
    TopRows,
    open_top,
    places_of,
    proven_places,
    pullback_top,
    pushforward_top,
)
from fisher_vmap.whole import (
    hooked_outputs,
    pullback_loop,
    pullback_whole,
    rows_from_blocks,
    rows_from_logits,
    with_biases,
    zero_biases,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the probe found in a model.

    Attributes:
        blocks: the decoder blocks by name.
        call_order: the names of the blocks in the order of their calls.
        head: the head taken apart; None where only the model itself can make its logits.
        vocabulary: V, the number of logits.
        why_not_packed: why prompts cannot be packed end to end; empty where nothing is known to speak against it.
        gather: whether what follows the output embedding looks at each position alone.
        above: the ids of the modules that return after the last block has: the final norm, the model itself.
        fused: modules inside the blocks that have a fused pullback, with the forward that has it.
        rules: blocks that are pulled back as a whole by hand, where prompts are packed.
        old_functions: the model's autograd functions that torch.func cannot transform as they are.
        top_places: where the last block's arguments have a row for each position; None: it is not known to be right
            if its forward is cut at the last rows.
    """

    blocks: Mapping[str, nn.Module]
    call_order: Sequence[str]
    head: UnembeddingHead | None
    vocabulary: int
    why_not_packed: str
    gather: bool
    above: frozenset[int]
    fused: Sequence[tuple[nn.Module, Forward]]
    rules: Rules
    old_functions: Sequence[OldFunction]
    top_places: Places | None = None


def layerwise(model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted) -> Scores:
    """Record one forward, read the head, and pull its cotangents through one block at a time."""
    assert parts.head is not None
    recording, top = _recorded(model, parts, layout, layers, wanted.precision)
    outcomes = read_outcomes(parts.head, layout.last(recording.top) if top is None else top.rows, wanted)
    unit_KBD, norm_KB = unit_rows(outcomes.cotangents)
    often = {name for name in layers if parts.call_order.count(name) > 1}
    collected = Collected(layout, outcomes, norm_KB, wanted.positions, often)
    with closing(pullback_layers(parts, recording, layout, layers, unit_KBD, wanted.chunk_size, top)) as arrivals:
        for layer, hidden, arrived in arrivals:
            collected.add(layer, hidden, arrived)
    return collected.scores(layers)


def _recorded(
    model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], precision: str
) -> tuple[Recording, TopRows | None]:
    """The forward; where nobody needs more of the last block than its last rows, these, and it is off the recording."""
    first = min(parts.call_order.index(layer) for layer in layers) + 1
    needless = layout.packed and precision == "model" and parts.call_order[-1] not in layers and not put_aside(model)
    if needless and parts.top_places is not None:
        recording = record_forward(model, parts, layout, first, precision, stop_before_last=True)
        call = recording.calls[-1]
        try:
            if places_of(call, layout) == parts.top_places:
                with fused_pullbacks(parts.fused):
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


def record_forward(
    model: nn.Module, parts: Parts, layout: Layout, first: int, precision: str, stop_before_last: bool = False
) -> Recording:
    """Record the calls from number `first` on; with mixed precision the forward is in float32, but not the replays.

    Raises:
        ValueError: the model does not run with widened weights.
    """
    if precision == "model":
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
        with float32_forward(model, parts.blocks):
            return record(model, parts.blocks, parts.call_order, first, layout, narrow_to=dtype)
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"this model does not run in float32 on weights widened one block at a time ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:160]}); use precision model, or dtype float32"
        ) from error


def pullback_layers(
    parts: Parts,
    recording: Recording,
    layout: Layout,
    layers: Sequence[str],
    unit_KBD: Tensor,
    chunk_size: int | None,
    cut: TopRows | None = None,
) -> Generator[Arrived, None, None]:
    """Pull cotangents of the last rows back to every hooked block; the recording is used up on the way.

    The rows are those of `cut`, the last block, where that has been taken off the recording.
    """
    rows_KBD = unit_KBD.to(recording.dtype)
    chunk_size = chunk_size or cotangents_at_a_time(len(rows_KBD), layout.input_ids.numel(), recording.top.device)
    with fused_pullbacks(parts.fused):
        top_layer, top, cotangents = parts.call_order[-1], recording.top, None
        if cut is not None:
            cotangents = cut.pull(rows_KBD, chunk_size)
        elif layout.packed and recording.calls:
            cotangents = _through_top(recording, layout, rows_KBD, chunk_size)
            if cotangents is not None and top_layer in layers:
                yield Arrived(top_layer, top, layout.at_last(rows_KBD))
        if cotangents is None:
            cotangents = layout.at_last(rows_KBD)
        yield from pullback_blocks(recording, cotangents, set(layers), chunk_size, parts.rules)


def pushforward_layer(
    parts: Parts, recording: Recording, layout: Layout, layer: str, tangents: Tensor, chunk_size: int | None
) -> Tensor:
    """Push tangents of a bias at a hooked block, [b, T, K, D], to the last rows of the top, [K, B, D]."""
    K, N = tangents.shape[2], layout.input_ids.numel()
    chunk_size = chunk_size or cotangents_at_a_time(K, N, recording.top.device)
    below_top = len(recording.calls) - 1
    with fused_pullbacks(parts.fused):
        if layout.packed and below_top >= 0 and recording.below_has(layer, below_top):
            moved = pushforward_blocks(recording, layer, tangents, chunk_size, stop=below_top)
            call = recording.calls[-1]
            try:
                rows_KBD = pushforward_top(call, layout, recording.top, moved, chunk_size)
            except (NotPositionwise, StructureChanged) as reason:
                log.debug("the last block is pushed through whole: %s", reason)
                moved = pushforward_block(call, recording.top, moved, chunk_size)
            else:
                return rows_KBD if call.name != layer else rows_KBD + layout.last_of(tangents).to(rows_KBD.device)
            if call.name == layer:
                moved = moved + tangents.to(moved.device)
        else:
            moved = pushforward_blocks(recording, layer, tangents, chunk_size)
    return layout.last_of(moved)


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


def whole(
    model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted, *, loop: bool = False
) -> Scores:
    """One batched call of the pullback of the whole upper network; with `loop`, K backward passes of plain autograd."""
    if wanted.precision != "model":
        raise ValueError(
            f"precision {wanted.precision} needs the layerwise kernel, which {layers[0]} cannot have; use dtype float32"
        )
    modules = hooked(model, layers)
    run, head = upper(model, parts, layout, modules)
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


def upper(
    model: nn.Module, parts: Parts, layout: Layout, modules: Mapping[str, Hooked]
) -> tuple[Callable[[], Tensor], Head]:
    """The upper network and the head that reads its rows: up to the blocks' end, or to the logits if need be."""
    if parts.head is None or any(id(hook.module) in parts.above for hook in modules.values()):
        unembedding = output_embedding(model)  # where that is hooked, it must see all positions
        gather = parts.gather and all(hook.module is not unembedding for hook in modules.values())
        return rows_from_logits(model, layout, gather=gather), LogitsHead()
    return rows_from_blocks(model, parts.blocks, parts.call_order, layout), parts.head


def unit_rows(cotangents_KBX: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents scaled to unit norm, and their norms [K, B]: low precision keeps its digits, linearity undoes it."""
    norm_KB = torch.linalg.vector_norm(cotangents_KBX, dim=-1)
    return cotangents_KBX / norm_KB.clamp(min=torch.finfo(norm_KB.dtype).tiny)[..., None], norm_KB


def residual_norm(hidden: Tensor, layout: Layout) -> Tensor:
    """The mean norm of a residual stream, [b, T, D], over each prompt's tokens, [B]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    length_N = torch.linalg.vector_norm(hidden.flatten(0, 1), dim=-1, dtype=wide)
    length_N = length_N.view(len(length_N), -1).mean(1)  # of several streams their mean
    return torch.stack([length_N[a:z].mean() for a, z in layout.ranges()]).to(layout.device)


class Collected:
    """Gathers what arrives at each hooked layer; what arrives at several calls of one block is added up first."""

    def __init__(
        self,
        layout: Layout,
        outcomes: Outcomes,
        norm_KB: Tensor,
        positions: str | Tensor,
        called_often: Collection[str] = (),
    ) -> None:
        self.layout, self.outcomes, self.norm_KB = layout, outcomes, norm_KB
        self.pending: dict[str, Tensor | float] = dict.fromkeys(called_often, 0.0)
        self.mask_N = position_mask(positions, layout)
        self.gradients: dict[str, Tensor] = {}
        self.remainder: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self.residual_norm: dict[str, Tensor] = {}

    def add(self, layer: str, hidden: Tensor, cotangents: Tensor) -> None:
        """Take one arrival; the last call of a block comes first."""
        if layer not in self.residual_norm:
            self.residual_norm[layer] = residual_norm(hidden, self.layout)
        if layer in self.pending:
            self.pending[layer] = cotangents + self.pending[layer]
        else:
            self._sum(layer, cotangents)

    def _sum(self, layer: str, cotangents: Tensor) -> None:
        layout, outcomes = self.layout, self.outcomes
        pulled, energy = sum_positions(cotangents, layout, self.norm_KB, outcomes.weights(), self.mask_N)
        if (derivation := outcomes.derivation()) is not None:
            combination_BC, p_B = derivation
            energy += energy_of_one(cotangents, layout, self.norm_KB, combination_BC, p_B, self.mask_N)
        self.gradients[layer], self.remainder[layer] = outcomes.scores(pulled.to(layout.device))
        self.energy[layer] = layout.to_caller(energy.to(layout.device))

    def scores(self, layers: Sequence[str]) -> Scores:
        """The record, with the layers in the order given."""
        for layer, cotangents in self.pending.items():
            assert isinstance(cotangents, Tensor)
            self._sum(layer, cotangents)
        device = self.layout.device
        return Scores(
            self.outcomes.log_probs.to(device),
            self.outcomes.token_ids.to(device),
            {layer: self.gradients[layer] for layer in layers},
            {layer: self.energy[layer] for layer in layers},
            {layer: self.residual_norm[layer] for layer in layers},
            {layer: self.remainder[layer] for layer in layers},
        )
