"""The upper network, linearised, one decoder block at a time: `torch.func.vmap` over `torch.func.vjp`.

The cotangents of the last block's output are pulled back through one block after the other, from the top down. What
arrives at a block's output is the gradient with respect to a bias added there, position by position; every hooked
block on the way down has its answer for free. Memory holds the graph of one block at a time.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fisher_vmap.recording import BlockCall, Recording, StructureChanged

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
    recording: Recording, cotangents: Tensor, layers: Collection[str], chunk_size: int | None
) -> Iterator[Arrived]:
    """Pull cotangents of the top back to the output of every hooked block; the recording is used up on the way.

    Args:
        recording: the calls above the lowest hooked block, and the top, [B, T, D].
        cotangents: [B, T, K, D], cotangents of the top. K stands inside: a position's cotangents lie side by side,
            so that a prompt's are one range of memory and what they share is broadcast from cache.
        layers: the names of the hooked blocks.
        chunk_size: how many cotangents to pull at a time; None: all at once.

    Yields:
        What arrives at the output of each hooked block, from the top down, once for each of its calls.

    Raises:
        StructureChanged: a replayed block did not return what the next one had received.
    """
    expected = recording.top
    while recording.calls:
        call = recording.calls.pop()
        if call.name in layers:
            yield Arrived(call.name, expected, cotangents)
        cotangents = pullback_block(call, expected, cotangents, chunk_size)
        expected = call.hidden
    check_primal(f"what {recording.below} returned", recording.bottom, expected)
    yield Arrived(recording.below, expected, cotangents)


def pullback_block(call: BlockCall, expected: Tensor, cotangents: Tensor, chunk_size: int | None) -> Tensor:
    """Cotangents of one block's output to those of its input, [B, T, K, D]; the primal must be the expected one."""
    primal, pull = vjp(call.replay, call.hidden)  # type: ignore[misc]
    check_primal(f"the replay of {call.name}", primal, expected)
    cotangents = cotangents.to(primal.device)
    (below,) = vmap(pull, in_dims=2, out_dims=2, chunk_size=chunk_size)(cotangents)
    return below  # type: ignore[no-any-return]


def check_primal(what: str, primal: Tensor, expected: Tensor) -> None:
    """Raise StructureChanged unless a replayed block returned what the recorded forward had passed on.

    The same operations on the same values agree to the bit on a CPU; kernels that add in a free order may differ by
    rounding. Values that are not finite say nothing and pass: the scores will carry them.
    """
    gap = (primal - expected.to(primal.device)).float().norm()
    size = expected.float().norm().to(gap.device)
    if bool(gap > 16 * torch.finfo(primal.dtype).eps * size):
        raise StructureChanged(f"{what} is {float(gap / size):.1e} away from what went on")
