"""The upper network, linearised, one decoder block at a time: `torch.func.vmap` over `torch.func.vjp` and `jvp`.

The cotangents of the last block's output are pulled back through one block after the other, from the top down. What
arrives at a block's output is the gradient with respect to a bias added there, position by position; every hooked
block on the way down has its answer for free. Memory holds the graph of one block at a time.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fisher_vmap.anatomy.placement import weights_ready
from fisher_vmap.anatomy.recording import BlockCall, Recording, check_primal
from fisher_vmap.pullbacks.fused_block import Rules, pullback_by_rule
from fisher_vmap.pullbacks.scratch import Scratch

# Rows of all cotangents together that are pulled through a block at a time: enough for full speed on a CPU, and a long
# prompt's memory stays near that of its forward. A GPU's batches are sized to its memory beforehand.
ROWS_AT_A_TIME = {"cpu": 8192}


def cotangents_at_a_time(cotangents: int, rows: int, device: torch.device) -> int | None:
    """How many of K cotangents of N rows to pull back together, in chunks of about one size; None: all of them."""
    most = ROWS_AT_A_TIME.get(device.type)
    if most is None or cotangents * rows <= most:
        return None
    chunks = -(-cotangents * rows // most)
    return max(1, -(-cotangents // chunks))


class Arrived(NamedTuple):
    """The cotangents at a hooked block's output, [B, T, K, D], and that output itself, [B, T, D]."""

    layer: str
    hidden: Tensor
    cotangents: Tensor


def pullback_blocks(
    recording: Recording, cotangents: Tensor, layers: Collection[str], chunk_size: int | None, rules: Rules
) -> Iterator[Arrived]:
    """Pull cotangents of the top back to the output of every hooked block; the recording is used up on the way.

    Args:
        recording: the calls above the lowest hooked block, and the top, [B, T, D].
        cotangents: [B, T, K, D], cotangents of the top. K stands inside: a position's cotangents lie side by side,
            so that a prompt's are one range of memory and what they share is broadcast from cache. They are used up.
        layers: the names of the hooked blocks.
        chunk_size: how many cotangents to pull at a time; None: all at once.
        rules: blocks that are pulled back by hand.

    Yields:
        What arrives at the output of each hooked block, from the top down, once for each of its calls.

    Raises:
        StructureChanged: a replayed block did not return what the next one had received.
    """
    expected, scratch = recording.top, Scratch()
    while recording.calls:
        call = recording.calls.pop()
        rule = rules.get(call.block)
        if call.name in layers:
            yield Arrived(call.name, expected, cotangents)
            cotangents = cotangents.clone() if rule is not None else cotangents  # what went out stays as it is
        cotangents = cotangents.to(call.hidden.device).contiguous()
        by_rule = False
        if rule is not None:
            with weights_ready(call.block):
                by_rule = pullback_by_rule(rule, call, expected, cotangents, chunk_size, scratch)
        if not by_rule:
            cotangents = pullback_block(call, expected, cotangents, chunk_size)
        expected = call.hidden
    check_primal(f"what {recording.below} returned", recording.bottom, expected)
    yield Arrived(recording.below, expected, cotangents)


def pullback_block(call: BlockCall, expected: Tensor, cotangents: Tensor, chunk_size: int | None) -> Tensor:
    """Cotangents of one block's output to those of its input, [B, T, K, D]; the primal must be the expected one."""
    with weights_ready(call.block):
        primal, pull = vjp(call.replay, call.hidden)  # type: ignore[misc]
        check_primal(f"the replay of {call.name}", primal, expected)
        cotangents = cotangents.to(primal.device)
        (below,) = vmap(pull, in_dims=2, out_dims=2, chunk_size=chunk_size)(cotangents)
    return below  # type: ignore[no-any-return]


def pushforward_blocks(
    recording: Recording, layer: str, tangents: Tensor, chunk_size: int | None, stop: int | None = None
) -> Tensor:
    """Push tangents of a bias at a hooked block up to the top; the recording stays as it is.

    Args:
        recording: the calls above the lowest hooked block.
        layer: the name of the hooked block; where it is called several times, the bias is added at each call.
        tangents: [B, T, K, D], the bias's tangent at every position.
        chunk_size: how many tangents to push at a time; None: all at once.
        stop: the number of calls to go through; None: all of them.

    Returns:
        [B, T, K, D], the tangents of what the last of these calls returned.

    Raises:
        StructureChanged: a replayed block did not return what the next one had received.
    """
    moved = tangents if recording.below == layer else None
    calls = recording.calls[:stop]
    outputs = [call.hidden for call in recording.calls[1:]] + [recording.top]
    for call, expected in zip(calls, outputs, strict=False):
        if moved is not None:
            moved = pushforward_block(call, expected, moved, chunk_size)
        if call.name == layer:
            moved = tangents if moved is None else moved + tangents.to(moved.device)
    assert moved is not None
    return moved


def pushforward_block(call: BlockCall, expected: Tensor, tangents: Tensor, chunk_size: int | None) -> Tensor:
    """Tangents of one block's input to those of its output, [B, T, K, D]; the primal must be the expected one."""
    with weights_ready(call.block):
        return push_function(f"the replay of {call.name}", call.replay, call.hidden, expected, tangents, chunk_size)


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

    pieces = []
    for piece in tangents.to(at.device).split(chunk_size or tangents.shape[2], 2):
        primal, moved = vmap(push, in_dims=2, out_dims=(None, 2))(piece)  # type: ignore[arg-type]
        check_primal(what, primal, expected)
        pieces.append(moved)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
