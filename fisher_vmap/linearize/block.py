"""J^T u and J v through one decoder block at a time: `torch.func.vmap` over `torch.func.vjp` and `jvp`.

The cotangents of the last block's output are pulled back through one block after the other, from the top down. What
arrives at a block's output is the gradient with respect to a bias added there, position by position; the hooked
blocks on the way down cost nothing more. Memory holds the graph of one block at a time.

The last block at the last positions. Above the last block's attention only each prompt's last position matters: its
MLP, its output projection, its residual. So the block is replayed like a step of decoding: on the last rows only, their
queries against the keys and values of all positions. To get these, the block runs on all rows up to its attention call.

This is checked in every batch. If the forward ran the whole block, the replayed rows must equal its output at the last
positions. If the forward stopped before the block, the replay was proven before, on prompts of the run, and the same
arguments must have a row for each position as in that proof.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fisher_vmap.kernels.autograd import Scratch
from fisher_vmap.kernels.decoder_block import Rules, pullback_by_rule
from fisher_vmap.kernels.hf_attention import KeysCaptured, against_keys, capturing_keys
from fisher_vmap.linearize.model_info import Places
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.recording import (
    BlockCall,
    Recording,
    check_primal,
    map_tensors,
    primals_checked_together,
    with_hidden,
)

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


class Arrived(NamedTuple):
    """The cotangents at a hooked layer's output, [B, T, K, D]."""

    layer: str
    cotangents: Tensor


def pullback_blocks(
    recording: Recording, cotangents: Tensor, layers: Collection[str], chunk_size: int | None, rules: Rules
) -> Iterator[Arrived]:
    """Pull cotangents of the top back to the output of every hooked block; consumes the recording.

    Args:
        recording: the calls above the lowest hooked block, and the top, [B, T, D].
        cotangents: [B, T, K, D], cotangents of the top, overwritten. K is third, so that a prompt's cotangents are one
            range of memory and what a position's cotangents share is broadcast from cache.
        layers: the names of the hooked blocks.
        chunk_size: how many cotangents to pull at a time; None: all at once.
        rules: the blocks that are pulled back by a rule.

    Yields:
        The cotangents at the output of each hooked block, from the top down, once for each of its calls.

    Raises:
        StructureChanged: a replayed block did not return what the next one had received.
    """
    expected, scratch = recording.top, Scratch()
    while recording.calls:
        call = recording.calls.pop()
        rule = rules.get(call.block)
        if call.name in layers:
            yield Arrived(call.name, cotangents)
            cotangents = cotangents.clone() if rule is not None else cotangents  # a rule overwrites its cotangents
        cotangents = cotangents.to(call.hidden.device).contiguous()
        by_rule = False
        if rule is not None:
            with weights_ready(call.block):
                by_rule = pullback_by_rule(rule, call, expected, cotangents, chunk_size, scratch)
        if not by_rule:
            cotangents = pullback_block(call, expected, cotangents, chunk_size)
        expected = call.hidden
    check_primal(f"what {recording.below} returned", recording.bottom, expected)
    yield Arrived(recording.below, cotangents)


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
    """Push tangents of a bias at a hooked block, [B, T, K, D], up to the output of the last call; keeps the recording.

    If the block is called several times, the bias is added at each call. `stop` is how many calls to pass through;
    None: all of them.

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


class NotPositionwise(Exception):
    """The block cannot be run at some positions only, such as when it is unclear which argument has positions."""


class LastBlock(NamedTuple):
    """The last block at the last rows: its call, its output there, [B, D], and its pullback."""

    call: BlockCall
    rows: Tensor
    pull: Callable[[Tensor, int | None], Tensor]
    """From cotangents [K, B, D], and how many to take at a time, to cotangents of the block's input, [1, N, K, D]."""


def open_last(call: BlockCall, layout: Layout, top: Tensor | None = None) -> LastBlock:
    """Run the last block, recorded on packed prompts, at the last rows; `top` is its output, [1, N, D], if it has run.

    Raises:
        NotPositionwise: the block cannot be run at some positions only; run it whole.
        StructureChanged: the output at the last rows differs from `top`.
    """
    with weights_ready(call.block):
        primal, pullback = vjp(_at_last_rows(call, layout), call.hidden)  # type: ignore[misc]
    if top is not None:
        with primals_checked_together():  # at once: the caller has another way
            check_primal(f"the replay of {call.name} at the last positions", primal[0], layout.targets_of(top))

    def pull(cotangents_KBD: Tensor, chunk_size: int | None) -> Tensor:
        cotangents = cotangents_KBD.transpose(0, 1)[None].to(primal.device)
        with weights_ready(call.block):
            (below,) = vmap(pullback, in_dims=2, out_dims=2, chunk_size=chunk_size)(cotangents)
        return below  # type: ignore[no-any-return]

    return LastBlock(call, primal[0], pull)


def places_of(call: BlockCall, layout: Layout) -> Places:
    """Which arguments of a call have a row for each position.

    Raises:
        NotPositionwise: this is unclear for an argument.
    """
    count, found = layout.input_ids.numel(), set()

    def look(inputs: Any, path: tuple[Any, ...]) -> None:
        if isinstance(inputs, Tensor):
            if _has_rows(inputs, count):
                found.add(path)
        elif isinstance(inputs, dict):
            for name, value in inputs.items():
                look(value, (*path, name))
        elif type(inputs) in (tuple, list):
            for i, value in enumerate(inputs):
                look(value, (*path, i))

    look((call.args, dict(call.kwargs)), ())
    return frozenset(found)


def pushforward_last(last: LastBlock, layout: Layout, tangents: Tensor, chunk_size: int | None) -> Tensor:
    """Tangents of the last block's input, [1, N, K, D], to those of the last rows of its output, [K, B, D]."""
    call, what = last.call, f"the replay of {last.call.name} at the last positions"
    with weights_ready(call.block):
        function = _at_last_rows(call, layout)
        moved = push_function(what, function, call.hidden, last.rows[None], tangents, chunk_size)
    return moved[0].transpose(0, 1)


def _at_last_rows(call: BlockCall, layout: Layout) -> Callable[[Tensor], Tensor]:
    """The block as a function from all rows of its input, [1, N, D], to the last rows of its output, [1, B, D]."""
    last = layout.target_rows(call.hidden.device)
    args, kwargs = at_rows((call.args, dict(call.kwargs)), last, layout.input_ids.numel())

    def rows(hidden: Tensor) -> Tensor:
        keys = _keys(call, hidden)
        narrow = BlockCall(call.name, call.block, hidden, *with_hidden(args, kwargs, hidden[:, last]), [])
        with against_keys(keys):
            return narrow.replay(hidden[:, last])

    return rows


def _keys(call: BlockCall, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all positions, [1, G, N, E] each."""
    try:
        with capturing_keys():
            call.replay(hidden)
    except KeysCaptured as captured:
        return captured.keys, captured.values
    raise NotPositionwise(f"{call.name} does not call our attention")


def at_rows(inputs: Any, rows: Tensor, count: int) -> Any:
    """The same inputs, with `rows` taken of every tensor that has a row for each of `count` positions.

    Raises:
        NotPositionwise: a tensor has that size in another dimension.
    """

    def at(tensor: Tensor) -> Tensor:
        if not _has_rows(tensor, count):
            return tensor
        return tensor[rows.to(tensor.device)] if tensor.dim() == 1 else tensor[:, rows.to(tensor.device)]

    return map_tensors(inputs, at)


def _has_rows(tensor: Tensor, count: int) -> bool:
    """Whether a tensor has a row for each of `count` positions, after a batch of one or as its only dimension."""
    if (tensor.dim() == 1 and len(tensor) == count) or (tensor.dim() >= 2 and tensor.shape[:2] == (1, count)):
        return True
    if count in tensor.shape:
        raise NotPositionwise(f"a tensor of shape {tuple(tensor.shape)}")
    return False
