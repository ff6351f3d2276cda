"""`Blockwise`: the linear map one decoder block at a time, from a recorded forward.

It drives the products of `block` at the live rows, uses the rules of `kernels` for blocks and modules that have one,
and takes a shortcut for packed prompts: the last block's forward runs at the targets only, if it allows that.

`pull_memory` says how many bytes that takes, from shapes alone.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.attention import query_blocks
from fisher_vmap.kernels.autograd import stretches
from fisher_vmap.kernels.decoder_block import WORTH_KEEPING, keeping, kept_room
from fisher_vmap.kernels.hf_attention import NAME, UnsupportedAttention, keeping_keys
from fisher_vmap.linearize.block import (
    Arrived,
    cotangents_at_a_time,
    live_rows,
    pullback_blocks,
    pushforward_blocks,
)
from fisher_vmap.linearize.last_block import LastBlock, open_last, pushforward_last
from fisher_vmap.linearize.linear_map import LinearMap
from fisher_vmap.linearize.model_info import Parts, Places
from fisher_vmap.model.head import MIN_ROWS, VOCABULARY_CHUNK_ELEMENTS
from fisher_vmap.model.layout import Layout, NotPositionwise, grouped, row_dimension
from fisher_vmap.model.offload import is_offloaded, model_dtype
from fisher_vmap.model.recording import BlockCall, Recording, StructureChanged, forwards_set, record
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.model.widening import forward_in_float32


class Blockwise(LinearMap):
    """The linear map one block at a time, for padded or packed prompts."""

    def _open(self) -> None:
        parts, layout = self._parts, self.layout
        assert parts.head is not None
        self._last: LastBlock | None = None
        self._rows = live_rows(
            layout, self._attention == NAME, parts.not_narrow, lambda *told: self.note(*told), self._vectors
        )
        self.live = self._rows.live
        self._cut_in_forward, self._cannot_be_cut = False, self._rows.at is None
        self._recording = self._record()
        recording = self._recording
        self.rows = layout.targets_of(recording.top) if self._last is None else self._last.rows
        self.head, self.dtype = parts.head, recording.dtype
        names = [recording.below, *(call.name for call in recording.calls)]
        outputs = dict(zip(names, [*(call.hidden for call in recording.calls), recording.top], strict=True))
        self._describe({layer: outputs[layer] for layer in self.layers})

    def _record(self) -> Recording:
        """Record the forward. If only the targets of the last block are needed, open that block apart from it."""
        model, parts, layout, live = self._model, self._parts, self.layout, self._rows.columns
        first = min(parts.call_order.index(layer) for layer in self.layers) + 1
        needless = self._precision != "mixed" and parts.call_order[-1] not in self.layers and not is_offloaded(model)
        if needless and layout.packed and parts.top_places is not None:
            recording = record_forward(
                model, parts, layout, first, self._precision, live, self._vectors, stop_before_last=True
            )
            call = recording.calls[-1]
            try:
                if places_of(call, layout) == parts.top_places:
                    with forwards_set(parts.fused):
                        self._last = open_last(call, self._rows, rule=parts.rules.get(call.block))
                    recording.cut(call.hidden)
                    self._cut_in_forward = True
                    return recording
            except (NotPositionwise, UnsupportedAttention) as reason:
                self.note("forward cut", f"the last block's forward runs at all positions: {reason}")
        return record_forward(model, parts, layout, first, self._precision, live, self._vectors)

    def _last_block(self, recording: Recording) -> LastBlock | None:
        """The last block at the targets; None if it is run like any other."""
        if self._last is None and not self._cannot_be_cut and recording.calls:
            try:
                call = recording.calls[-1]
                self._last = open_last(call, self._rows, recording.top, self._parts.rules.get(call.block))
            except (NotPositionwise, StructureChanged, UnsupportedAttention) as reason:
                self.note("cut", f"the last block is pulled back at all positions: {reason}")
                self._cannot_be_cut = True
        return self._last

    def _pull(self, unit_KMX: Tensor) -> Generator[Arrived, None, None]:
        parts, live = self._parts, self.live
        recording = self._recording.copy() if self._vectors is None else self._recording
        rows_KMD = unit_KMX.to(recording.dtype)
        chunk_size = self._at_a_time(len(rows_KMD))
        with forwards_set(parts.fused):
            last = self._last_block(recording)
            if last is None:
                cotangents = live.at_targets(rows_KMD)
            else:
                cotangents = last.pull(rows_KMD, chunk_size)
                if not self._cut_in_forward:
                    recording.cut(last.call.hidden)
                    if parts.call_order[-1] in self.layers:
                        yield Arrived(parts.call_order[-1], live.at_targets(rows_KMD))
            if self._vectors is not None:
                del last
                self._last = None
            yield from pullback_blocks(recording, cotangents, set(self.layers), chunk_size, parts.rules, self._rows)

    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        recording, rows = self._recording, self._rows
        chunk_size = self._at_a_time(tangents.shape[2])
        with forwards_set(self._parts.fused):
            last = self._last_block(recording)
            stop = len(recording.calls) - (last is not None and not self._cut_in_forward)
            if last is None or not recording.below_has(layer, stop):
                return self.live.fields_of(pushforward_blocks(recording, layer, tangents, chunk_size, rows))
            moved = pushforward_blocks(recording, layer, tangents, chunk_size, rows, stop=stop)
            rows_KMD = pushforward_last(last, rows, moved, chunk_size)
            called_again = last.call.name == layer  # then the bias is added at the top as well
            return rows_KMD + self.live.fields_of(tangents).to(rows_KMD.device) if called_again else rows_KMD

    def _at_a_time(self, vectors: int) -> int | None:
        N = self.live.input_ids.numel()
        return self._chunk_size or cotangents_at_a_time(vectors, N, self._recording.top.device)


def record_forward(
    model: nn.Module,
    parts: Parts,
    layout: Layout,
    first: int,
    precision: str,
    live: Tensor | None = None,
    vectors: int | None = None,
    stop_before_last: bool = False,
) -> Recording:
    """Record the calls from number `first` on; with precision "mixed" the forward alone is in float32.

    With the columns of the `live` rows, the keys and values of all rows are kept with each call, for replays at these.
    `vectors` is how many will be pulled back; None: unknown.
    """

    @contextmanager
    def around(calls: list[BlockCall]) -> Iterator[None]:
        keys = keeping_keys(lambda kept: calls[-1].keys.append(kept) if calls else None)
        rules, most = parts.rules if precision != "mixed" else {}, len(parts.call_order) - first - 1
        with nullcontext() if live is None else keys, keeping(rules, calls, most, live, vectors):
            yield

    if precision != "mixed":
        return record(
            model,
            parts.blocks,
            parts.call_order,
            first,
            layout,
            around=around,
            stop_before_last=stop_before_last,
        )
    if is_offloaded(model):
        raise ValueError("precision mixed needs all weights in memory, and some are offloaded; use precision model")
    dtype = model_dtype(model)
    try:
        with forward_in_float32(model):
            return record(model, parts.blocks, parts.call_order, first, layout, narrow_to=dtype, around=around)
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"this model does not run in float32 on weights widened one block at a time ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:160]}); use precision model or float32"
        ) from error


def places_of(call: BlockCall, layout: Layout) -> Places:
    """Which arguments of a call have a row for each position.

    Raises:
        NotPositionwise: this is unclear for an argument.
    """
    found = set()

    def look(inputs: Any, path: tuple[Any, ...]) -> None:
        if isinstance(inputs, Tensor):
            if row_dimension(inputs, layout.input_ids.shape) is not None:
                found.add(path)
        elif isinstance(inputs, dict):
            for name, value in inputs.items():
                look(value, (*path, name))
        elif type(inputs) in (tuple, list):
            for i, value in enumerate(inputs):
                look(value, (*path, i))

    look((call.args, dict(call.kwargs)), ())
    return frozenset(found)


def prove_top(model: nn.Module, parts: Parts, layout: Layout) -> Places:
    """Prove on packed prompts that the last block may be run at the last rows alone; raises as `open_last`."""
    if len(parts.call_order) < 2:
        raise NotPositionwise("the model has one block")
    recording = record_forward(model, parts, layout, len(parts.call_order) - 1, "model")
    rows = live_rows(layout._replace(positions="all"), True, {}, lambda _what, _line: None)
    open_last(recording.calls[-1], rows, recording.top)
    return places_of(recording.calls[-1], layout)


RULED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layers of a block with a rule


class Widths(NamedTuple):
    """The sizes of a model that decide what a pull takes.

    Attributes:
        D: the width of the residual stream.
        V: the vocabulary's size.
        mlp: the width inside the MLP; 0 if no rule fits the block.
        queries: H E, the width of all heads' queries; 0 likewise.
        keys: G E, the width of the keys, and of the values; 0 likewise.
        heads: H.
        linear: the width of all outputs of a block's linear layers together.
        above: the number of blocks above the lowest hooked one.
        layers: the number of hooked layers.
    """

    D: int
    V: int
    mlp: int
    queries: int
    keys: int
    heads: int
    linear: int
    above: int
    layers: int

    @property
    def kept(self) -> int:
        """The numbers a position that a block's forward leaves for its pullback by a rule: y, q, k, v, a and b."""
        return self.D + self.queries + 2 * self.keys + 2 * self.mlp


def widths_of(model: Any, blocks: Iterable[nn.Module], D: int, V: int, above: int, layers: int) -> Widths:
    """The sizes of a model, with or without its weights (on the meta device)."""
    block = next(iter(blocks))
    linear = {name.rpartition(".")[2]: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    out = {name: module.out_features for name, module in linear.items()}
    config: Any = getattr(model, "config", None)
    heads = getattr(
        config.get_text_config() if hasattr(config, "get_text_config") else config, "num_attention_heads", 0
    )
    mlp, queries, keys = (
        (out[name] for name in ("gate_proj", "q_proj", "k_proj")) if set(out) == set(RULED) else [0] * 3
    )
    every = sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))
    return Widths(D, V, mlp, queries, keys, heads if isinstance(heads, int) and heads else 1, every, above, layers)


def pull_memory(
    widths: Widths,
    lengths: Sequence[int],
    cotangents: int,
    itemsize: int,
    device: torch.device,
    chunk_size: int | None = None,
    targets: int | None = None,
) -> dict[str, int]:
    """The bytes at the peak of a batch's scores by packed prompts, by use, besides the weights.

    Args:
        widths: of the model.
        lengths: tokens of each prompt.
        cotangents: K, the vectors that are pulled back together.
        itemsize: bytes of a number of the pullback.
        device: that it runs on; its constants decide what passes through a block at a time.
        chunk_size: how many vectors pass through a block at a time; None: as a pull chooses.
        targets: how many distributions are computed together; None: one a prompt.
    """
    B, N, K, (D, V, M, _, G, _, linear, above, layers) = len(lengths), sum(lengths), cotangents, widths
    chunk = min(K, chunk_size or cotangents_at_a_time(K, N, device) or K)
    kept, blocks = N * widths.kept * itemsize, max(0, above - 1)
    room = kept_room(device.type, K)
    held = {
        "recorded": N * D * (above + 1) * itemsize,  # each block's input and the hooked output
        "kept": kept * min(blocks, room // max(kept, 1)) if M and kept * blocks <= WORTH_KEEPING * room else 0,
    }
    results = 4 * layers * B * K * D
    upcast = VOCABULARY_CHUNK_ELEMENTS.get(device.type, 2**22) if itemsize < 4 else 0
    # z, log p, p and two copies without the tokens asked for, in float32
    head = {"head": 4 * (min(upcast, V * D) + 5 * max(targets or B, MIN_ROWS) * V + 4 * B * K * D)}
    forward = {"block": N * (2 * linear + 4 * D) * itemsize}
    # keys' and values' cotangents, the two products with their projections, and the norm's pullback
    last = {"cotangents": K * N * D * itemsize, "chunk": chunk * N * (4 * G + 4 * D) * itemsize}
    stages = [head, forward, last | {"results": results}, {"results": 6 * results}]  # decomposed in float64
    if blocks:
        whole = K * N * D * (2 if layers > 1 else 1)  # a hooked layer's own, and those that go on
        piece = chunk * N * D if chunk < K else 0
        passing, scores, forward_again = _through_a_block(widths, lengths, chunk, device)
        stages.append(
            {
                "cotangents": (whole + piece) * itemsize,
                "chunk": passing * itemsize,
                "attention": scores * 4,
                "block": (forward_again - (N * widths.kept if held["kept"] else 0)) * itemsize,
                "results": results,
            }
        )
    return held | max(stages, key=lambda stage: sum(stage.values()))


def _through_a_block(widths: Widths, lengths: Sequence[int], chunk: int, device: torch.device) -> tuple[int, int, int]:
    """The numbers that a pull of `chunk` vectors through a block takes: its own, float32 scores, and the forward's."""
    N, (D, _, M, Q, G, H, linear, *_) = sum(lengths), widths
    groups = grouped(lengths, device)
    b, T = max(((len(group), lengths[group[0]]) for group in groups), key=lambda size: size[0] * size[1] ** 2)
    most = query_blocks(T, b * H * chunk * T, device)
    t = max(stop - start for start, stop in most)
    scores = 2 * b * H * t * T  # P, and the scores that it is made of
    # dP of a block of queries, and of a group the cotangents of output, queries, keys and values, twice
    prompt = b * chunk * (H * t * T + T * (Q + 2 * G) + (T * (2 * Q + 2 * G) if len(most) > 1 else 0))
    if not M:
        return 2 * chunk * N * linear + chunk * b * H * t * T, scores, 2 * N * linear
    if b > 1:
        prompt += b * chunk * T * (2 * Q + 2 * G)  # gathered, and what goes back in one piece
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))] if len(groups) == len(lengths) else [N]
    in_mlp = max(z - a for a, z in stretches(range(1, N + 1), chunk, M, device)) * chunk
    attended = max(z - a for a, z in stretches(ends, chunk, Q + 2 * G, device)) * chunk
    memory = 2 * M * in_mlp + 3 * D * max(in_mlp, attended)  # h and h2; dn, product and through
    memory += attended * (2 * Q + 2 * G) + T * chunk * Q  # dO and dqkv, and dO of a prompt
    return memory + prompt, scores, N * (widths.kept + 2 * M + 7 * D)
