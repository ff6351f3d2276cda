"""`LastBlock`: the last block, of which only the targets are read.

Above its attention only the targets matter: the block is replayed with their queries alone, against the keys and values
of the live rows, for which it runs up to its attention call. It is pulled back from the targets to the live rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from fisher_vmap.kernels.autograd import Scratch, pull_each
from fisher_vmap.kernels.decoder_block import BlockRule, seen_again
from fisher_vmap.kernels.hf_attention import KeysCaptured, Packed, capturing_keys
from fisher_vmap.linearize.block import LiveRows, push_function, replay_at
from fisher_vmap.model.layout import NotPositionwise, take_columns
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.recording import BlockCall, KeptKeys, check_primal, primals_checked_together

PullLast = Callable[[Tensor, int | None], Tensor]
"""From cotangents [K, M, D], and how many to take at a time, to those of its input's live rows, [b, n, K, D]."""

_LAST = "the replay of {} at the last positions"


class LastBlock(NamedTuple):
    """The last block at the targets: its call, its output there, [M, D], and its pullback."""

    call: BlockCall
    rows: Tensor
    pull: PullLast


def open_last(call: BlockCall, rows: LiveRows, top: Tensor | None = None, rule: BlockRule | None = None) -> LastBlock:
    """Run the last block at the targets; `top` is its output, [b, T, D], if it has run; `rule` is its rule, if any.

    Raises:
        NotPositionwise: the block cannot be run at some positions only; run it whole.
        StructureChanged: the output at the targets differs from `top`.
    """
    with weights_ready(call.block):
        if rows.columns is not None and not call.keys:
            with torch.no_grad():
                call.keys.append(_keys(call, call.hidden, rows, at_all=True))
        if rule is not None and rule.reads_once and rows.among_read.groups is not None:
            primal, pull = _by_rule(rule, call, rows)
        else:
            primal, pull = _by_autograd(call, rows)
    if top is not None:
        with primals_checked_together():  # at once: the caller has another way
            check_primal(_LAST.format(call.name), primal, take_columns(top, rows.read_columns))

    return LastBlock(call, rows.read.targets_of(primal), pull)


def _by_autograd(call: BlockCall, rows: LiveRows) -> tuple[Tensor, PullLast]:
    """The rows that are read, and the pullback by `vmap`."""
    primal, pullback = vjp(_at_targets(call, rows), rows.take(call.hidden))  # type: ignore[misc]

    def pull(cotangents_KMD: Tensor, chunk_size: int | None) -> Tensor:
        cotangents = rows.read.at_targets(cotangents_KMD.to(primal.device))
        with weights_ready(call.block):
            return pull_each(pullback, cotangents, chunk_size)

    return primal, pull


def _by_rule(rule: BlockRule, call: BlockCall, rows: LiveRows) -> tuple[Tensor, PullLast]:
    """The same by a rule of the block."""
    with torch.no_grad():
        primal, found = seen_again(rule, call, lambda: _at_targets(call, rows)(rows.take(call.hidden)))
    groups, x = rows.among_read.groups, rows.take(call.hidden)[0]
    if found is None or groups is None:
        return _by_autograd(call, rows)
    seen = found[-1].at(None, primal.shape[1]), found[0].at(None, len(x))
    packed = Packed(tuple(rows.read.ranges()), groups)

    def pull(cotangents_KMD: Tensor, chunk_size: int | None) -> Tensor:
        cotangents, scratch = rows.read.at_targets(cotangents_KMD.to(primal.device))[0], Scratch()
        K, D = cotangents.shape[1:]
        with weights_ready(call.block):
            if rows.at is None:  # every live row is read: a block like any other
                cotangents = cotangents.contiguous()
                rule.pull(x, seen[0], cotangents, packed, chunk_size, scratch)
                return cotangents[None]
            total, some = x.new_zeros(len(x), K, D), chunk_size or K
            for g, into in zip(cotangents.split(some, 1), total.split(some, 1), strict=True):
                rule.pull_to_live(x, rows.at, seen, g.contiguous(), into, packed, scratch)
        return total[None]

    return primal, pull


def pushforward_last(last: LastBlock, rows: LiveRows, tangents: Tensor, chunk_size: int | None) -> Tensor:
    """Tangents of the live rows of the last block's input, [b, n, K, D], to those of the targets, [K, M, D]."""
    call, at = last.call, rows.take(last.call.hidden)
    with weights_ready(call.block):
        function = _at_targets(call, rows)
        with torch.no_grad():
            expected = function(at)
        check_primal(_LAST.format(call.name), rows.read.targets_of(expected), last.rows)
        moved = push_function(_LAST.format(call.name), function, at, expected, tangents, chunk_size)
    return rows.read.fields_of(moved)


def _at_targets(call: BlockCall, rows: LiveRows) -> Callable[[Tensor], Tensor]:
    """The block as a function from the live rows of its input, [b, n, D], to the rows of its output that are read."""
    if rows.at is None:
        return rows.replay(call)

    def function(x: Tensor) -> Tensor:
        live = _keys(call, x, rows)
        keys = live.keys, live.values
        return replay_at(call, take_columns(x, rows.at), rows.read_columns, rows.every, rows.among_read, keys)

    return function


def _keys(call: BlockCall, x: Tensor, rows: LiveRows, at_all: bool = False) -> KeptKeys:
    """Keys and values of the live rows, or of all rows, from these rows of the block's input."""
    try:
        with capturing_keys():
            (call.replay if at_all else rows.replay(call))(x)
    except KeysCaptured as captured:
        return KeptKeys(captured.module, captured.keys, captured.values)
    raise NotPositionwise(f"{call.name} does not call our attention")
