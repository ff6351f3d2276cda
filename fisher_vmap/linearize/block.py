"""J^T u and J v through one decoder block at a time: `torch.func.vmap` over `torch.func.vjp` and `jvp`.

The cotangents of the last block's output are pulled back through one block after the other, from the top down. What
arrives at a block's output is the gradient with respect to a bias added there, position by position; the hooked
blocks on the way down cost nothing more. Memory holds the graph of one block at a time.

Live rows. A cotangent matters at a prompt's live rows only, from the first position of the bias to the last target. So
a block is replayed at these: its inputs have their rows alone, and the keys and values of earlier rows, which the
recorded forward kept, are constants. Above the last block's attention only the targets matter: that block is replayed
with their queries alone, against the keys and values of the live rows, for which it runs up to its attention call.

A block is replayed in this way if it returned what the forward had recorded when it was first tried, and this is
checked again in every batch. Any other block, such as a recurrent one, is pulled back at all rows. If the forward
stopped before the last block, its replay was proven before, on prompts of the run, and the same arguments must have a
row for each position as in that proof.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fisher_vmap.kernels.autograd import Scratch, pull_each
from fisher_vmap.kernels.decoder_block import BlockRule, Rules, seen_again
from fisher_vmap.kernels.hf_attention import Among, Packed, attending_among
from fisher_vmap.model.layout import (
    Layout,
    first_live,
    first_target,
    narrowed,
    row_dimension,
    take_columns,
)
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.recording import (
    BlockCall,
    Recording,
    check_primal,
    map_tensors,
    primals_checked_together,
)
from fisher_vmap.model.validation import is_our_fault, is_out_of_memory

# Most rows, over all cotangents, that are pulled through a block at a time: enough for full speed on a CPU, and a long
# prompt needs little more memory than its forward. A GPU's batches are sized to its memory beforehand.
ROWS_AT_A_TIME = {"cpu": 8192}


def cotangents_at_a_time(cotangents: int, rows: int, device: torch.device) -> int | None:
    """How many of K cotangents of N rows to pull back together, in chunks of similar size; None: all of them."""
    most = ROWS_AT_A_TIME.get(device.type)
    if most is None or cotangents * rows <= most:
        return None
    chunks = -(-cotangents * rows // most)
    return max(1, -(-cotangents // chunks))


@dataclass(frozen=True)
class LiveRows:
    """The rows of a batch at which its blocks are pulled back.

    Attributes:
        every: the layout of all rows.
        live: that of the live ones.
        columns: [n] int64, the columns of the live rows among all; None: all rows are live.
        read: the layout of the rows from each prompt's first target to its last.
        read_columns: their columns among all rows; None: these are all rows.
        at: their columns among the live rows; None: these are the live rows.
        among_live: attention of the live rows.
        among_read: attention of the queries of `read` to the live keys.
        not_narrow: for each block that was tried, why it cannot be run at some rows only; empty if it can.
        note: reports a slower path taken.
    """

    every: Layout
    live: Layout
    columns: Tensor | None
    read: Layout
    read_columns: Tensor | None
    at: Tensor | None
    among_live: Among
    among_read: Among
    not_narrow: dict[str, str]
    note: Callable[[str, str], None]

    def take(self, x: Tensor) -> Tensor:
        """The live rows, [b, n, ...], of [b, T, ...]."""
        return take_columns(x, self.columns)

    def spread(self, x: Tensor) -> Tensor:
        """The inverse of `take`, with zeros at the other rows."""
        if self.columns is None:
            return x
        every = x.new_zeros(*self.every.input_ids.shape, *x.shape[2:])
        return every.index_copy_(1, self.columns.to(x.device), x)

    def replay(self, call: BlockCall) -> Callable[[Tensor], Tensor]:
        """The block as a function of the live rows of its input."""
        if self.columns is None:
            return call.replay
        return lambda x: replay_at(call, x, self.columns, self.every, self.among_live)

    def run_narrow(self, call: BlockCall, expected: Tensor) -> bool:
        """Whether a block is run at the live rows only; `expected` is its recorded output. Tried once."""
        if self.columns is None:
            return False
        if (why := self.not_narrow.get(call.name)) is None:
            why, finite = self._why_not(call, expected)
            if finite:  # values that are not finite prove nothing
                self.not_narrow[call.name] = why
        if why:
            self.note(f"rows of {call.name}", f"{call.name} is pulled back at all rows: {why}")
        return not why

    def _why_not(self, call: BlockCall, expected: Tensor) -> tuple[str, bool]:
        try:
            with torch.no_grad(), primals_checked_together():
                found = self.replay(call)(self.take(call.hidden))
                check_primal("what it returns for these rows alone", found, self.take(expected))
        except Exception as error:  # the block, or a user's hook in it, may raise anything
            if is_out_of_memory(error) or is_our_fault(error):
                raise
            return " ".join(str(error).split())[:160] or type(error).__name__, True
        return "", bool(found.isfinite().all())


def live_rows(
    layout: Layout, ours: bool, not_narrow: dict[str, str], note: Callable[[str, str], None], vectors: int | None = None
) -> LiveRows:
    """The live rows of a batch; all of them unless the model runs under our attention, which can take some alone."""
    live, columns = narrowed(layout, first_live(layout)) if ours else (layout, None)
    read, at = narrowed(live, first_target(live)) if ours else (layout, None)
    read_columns = at if columns is None else columns if at is None else columns[at]
    among_live, among_read = (Among.of(layout, live, columns, rows, vectors) for rows in (live, read))
    return LiveRows(layout, live, columns, read, read_columns, at, among_live, among_read, not_narrow, note)


class Arrived(NamedTuple):
    """The cotangents at the live rows of a hooked layer's output, [b, n, K, D]."""

    layer: str
    cotangents: Tensor


def pullback_blocks(
    recording: Recording, cotangents: Tensor, layers: Collection[str], chunk_size: int | None, rules: Rules,
    rows: LiveRows,
) -> Iterator[Arrived]:  # fmt: skip
    """Pull cotangents of the top back to the output of every hooked block; consumes the recording.

    Args:
        recording: the calls above the lowest hooked block, and the top, [B, T, D].
        cotangents: [b, n, K, D], cotangents of the live rows of the top, overwritten. K is third, so that a prompt's
            cotangents are one range of memory and what a position's cotangents share is broadcast from cache.
        layers: the names of the hooked blocks.
        chunk_size: how many cotangents to pull at a time; None: all at once.
        rules: the blocks that are pulled back by a rule.
        rows: the live rows.

    Yields:
        The cotangents at the output of each hooked block, from the top down, once for each of its calls. They are
        contiguous: autograd may choose other strides in each call, and the rounding of sums follows the strides.

    Raises:
        StructureChanged: a replayed block did not return what the next one had received.
    """
    expected, scratch = recording.top, Scratch()
    while recording.calls:
        call = recording.calls.pop()
        rule = rules.get(call.block) if rows.among_live.groups is not None else None
        cotangents = cotangents.contiguous()
        if call.name in layers:
            yield Arrived(call.name, cotangents)
            cotangents = cotangents.clone() if rule is not None else cotangents  # a rule overwrites its cotangents
        cotangents = cotangents.to(call.hidden.device)
        if rule is None or not _pull_by_rule(rule, call, expected, cotangents, chunk_size, scratch, rows):
            cotangents = pullback_block(call, expected, cotangents, chunk_size, rows)
        expected = call.hidden
    check_primal(f"what {recording.below} returned", recording.bottom, expected)
    yield Arrived(recording.below, cotangents.contiguous())


def _pull_by_rule(
    rule: BlockRule,
    call: BlockCall,
    expected: Tensor,
    cotangents: Tensor,
    chunk_size: int | None,
    scratch: Scratch,
    rows: LiveRows,
) -> bool:
    """Pull the cotangents of one block's live rows back in place, [1, n, K, D]; False if its rule cannot do it."""
    if rows.columns is not None and rule.mixes_by_autograd:
        return False
    with weights_ready(call.block):
        if call.kept:
            seen = call.kept[0]
        else:
            if rows.columns is not None and not rows.run_narrow(call, expected):
                return False
            primal, found = seen_again(rule, call, lambda: rows.replay(call)(rows.take(call.hidden)))
            check_primal(f"what {call.name} computed", primal, rows.take(expected))
            if found is None:
                return False
            seen = found[-1].at(None, primal.shape[1])
        assert rows.among_live.groups is not None
        packed = Packed(tuple(rows.live.ranges()), rows.among_live.groups)
        rule.pull(rows.take(call.hidden)[0], seen, cotangents[0], packed, chunk_size, scratch)
    return True


def pullback_block(
    call: BlockCall, expected: Tensor, cotangents: Tensor, chunk_size: int | None, rows: LiveRows
) -> Tensor:
    """Cotangents of one block's live rows, from output to input, [b, n, K, D]; the primal must be the expected one."""
    with weights_ready(call.block):
        if rows.run_narrow(call, expected):
            primal, pull = vjp(rows.replay(call), rows.take(call.hidden))  # type: ignore[misc]
            check_primal(f"the replay of {call.name}", primal, rows.take(expected))
            return pull_each(pull, cotangents.to(primal.device), chunk_size)
        primal, pull = vjp(call.replay, call.hidden)  # type: ignore[misc]
        check_primal(f"the replay of {call.name}", primal, expected)
        cotangents, every = rows.spread(cotangents.to(primal.device)), rows.every.input_ids.numel()
        chunk_size = chunk_size or cotangents_at_a_time(cotangents.shape[2], every, primal.device)
        return rows.take(pull_each(pull, cotangents, chunk_size))


def pushforward_blocks(
    recording: Recording, layer: str, tangents: Tensor, chunk_size: int | None, rows: LiveRows, stop: int | None = None
) -> Tensor:
    """Push tangents of a bias at the live rows of a hooked block up to the output of the last call, [b, n, K, D].

    The recording is kept. If the block is called several times, the bias is added at each call. `stop` is how many
    calls to pass through; None: all of them.

    Raises:
        StructureChanged: a replayed block did not return what the next one had received.
    """
    moved = tangents if recording.below == layer else None
    calls = recording.calls[:stop]
    outputs = [call.hidden for call in recording.calls[1:]] + [recording.top]
    for call, expected in zip(calls, outputs, strict=False):
        if moved is not None:
            moved = pushforward_block(call, expected, moved, chunk_size, rows)
        if call.name == layer:
            moved = tangents if moved is None else moved + tangents.to(moved.device)
    assert moved is not None
    return moved


def pushforward_block(
    call: BlockCall, expected: Tensor, tangents: Tensor, chunk_size: int | None, rows: LiveRows
) -> Tensor:
    """Tangents of one block's live rows, from input to output, [b, n, K, D]; the primal must be the expected one."""
    what = f"the replay of {call.name}"
    with weights_ready(call.block):
        if rows.run_narrow(call, expected):
            at, expected = rows.take(call.hidden), rows.take(expected)
            return push_function(what, rows.replay(call), at, expected, tangents, chunk_size)
        tangents, every = rows.spread(tangents.to(call.hidden.device)), rows.every.input_ids.numel()
        chunk_size = chunk_size or cotangents_at_a_time(tangents.shape[2], every, tangents.device)
        return rows.take(push_function(what, call.replay, call.hidden, expected, tangents, chunk_size))


def push_function(
    what: str,
    function: Callable[[Tensor], Tensor],
    at: Tensor,
    expected: Tensor,
    tangents: Tensor,
    chunk_size: int | None,
) -> Tensor:
    """`vmap` over `jvp` of a function of rows, K third; its value must be the expected one."""

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        primal, moved, *_ = jvp(function, (at,), (tangent,))
        return primal, moved

    tangents = tangents.to(at.device)
    if tangents.shape[2] == 1:
        primal, moved = push(tangents[:, :, 0])
        check_primal(what, primal, expected)
        return moved[:, :, None]
    pieces = []
    for piece in tangents.split(chunk_size or tangents.shape[2], 2):
        primal, moved = vmap(push, in_dims=2, out_dims=(None, 2))(piece)  # type: ignore[arg-type]
        check_primal(what, primal, expected)
        pieces.append(moved)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def replay_at(
    call: BlockCall, x: Tensor, columns: Tensor | None, every: Layout, among: Among,
    live: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """A block's output at some rows, from its input there, [b, n, D]; `live` are the live keys if these rows are fewer.

    Raises:
        NotPositionwise: it is unclear which of the block's inputs have rows.
    """
    args, kwargs = (call.args, dict(call.kwargs))
    if columns is not None:
        args, kwargs = at_rows((args, kwargs), columns, every.input_ids.shape)
    with attending_among(among, call.keys, live):
        return BlockCall(call.name, call.block, x, args, kwargs, [], []).replay(x)


def at_rows(inputs: Any, columns: Tensor, shape: Sequence[int]) -> Any:
    """The same inputs, with `columns` taken of every tensor that has a row for each position of a batch [b, T].

    Raises:
        NotPositionwise: a tensor has that size in another dimension.
    """

    def at(tensor: Tensor) -> Tensor:
        dim = row_dimension(tensor, shape)
        return tensor if dim is None else tensor.index_select(dim, columns.to(tensor.device))

    return map_tensors(inputs, at)
