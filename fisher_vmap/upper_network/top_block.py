"""The last block, seen from the last position alone.

Above the last block's attention only each prompt's last position matters: its MLP, its output projection, its residual.
So the block is replayed like a step of decoding: on the last rows only, with queries of theirs, against the keys and
values of all positions. These are had by running the block on all rows up to where it calls attention, and no further.

Nothing here is taken on trust. Where the forward has gone through the whole block, the replayed rows must equal what it
had at the last positions, in every batch. Where it has not, since nobody needs the other positions, the block has
returned just that before, on prompts of the run, and what counts as having a row for each position is the same.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.func import vjp, vmap

from fisher_vmap.anatomy.blocks import with_hidden
from fisher_vmap.anatomy.layout import Layout
from fisher_vmap.anatomy.placement import weights_ready
from fisher_vmap.anatomy.recording import BlockCall, StructureChanged, check_primal
from fisher_vmap.network import push_function
from fisher_vmap.pullbacks.attention_interface import KeysCaptured, against_keys, capturing_keys

log = logging.getLogger(__name__)


class NotPositionwise(Exception):
    """The block is given something whose positions cannot be told."""


Places = frozenset[tuple[Any, ...]]
"""Where among a call's arguments tensors have a row for each position: keys and indices from the outside in."""


class TopRows(NamedTuple):
    """The last block at the last rows: its output there, [B, D], and the pullback of cotangents of that."""

    rows: Tensor
    pull: Callable[[Tensor, int | None], Tensor]
    """[K, B, D] and how many cotangents at a time, to the cotangents of the block's input, [1, N, K, D]."""


def open_top(call: BlockCall, layout: Layout) -> TopRows:
    """Run the last block at the last rows.

    Args:
        call: the last call of the forward, on packed prompts; it need not have been made.
        layout: of the batch, packed.

    Raises:
        NotPositionwise: the block cannot be cut like this; run it whole.
    """
    with weights_ready(call.block):
        primal, pullback = vjp(_at_last_rows(call, layout), call.hidden)  # type: ignore[misc]

    def pull(cotangents_KBD: Tensor, chunk_size: int | None) -> Tensor:
        cotangents = cotangents_KBD.transpose(0, 1)[None].to(primal.device)
        with weights_ready(call.block):
            (below,) = vmap(pullback, in_dims=2, out_dims=2, chunk_size=chunk_size)(cotangents)
        return below  # type: ignore[no-any-return]

    return TopRows(primal[0], pull)


def proven_places(call: BlockCall, layout: Layout, top: Tensor) -> Places | None:
    """Where a last call's arguments have rows, if cut there it returns what it had; None if it cannot be cut.

    Args:
        call: the last call, on packed prompts.
        layout: of the batch, packed.
        top: [1, N, D], what the call returned.
    """
    try:
        rows = open_top(call, layout).rows
        check_primal(f"the replay of {call.name} at the last positions", rows, layout.last(top))
        return places_of(call, layout)
    except (NotPositionwise, StructureChanged) as reason:
        log.debug("the last block is run whole: %s", reason)
        return None


def places_of(call: BlockCall, layout: Layout) -> Places:
    """Where the arguments of a call have a row for each position.

    Raises:
        NotPositionwise: it cannot be told.
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


def pullback_top(
    call: BlockCall, layout: Layout, top: Tensor, cotangents_KBD: Tensor, chunk_size: int | None
) -> Tensor:
    """Cotangents of the last rows of the last block's output to those of its input, [1, N, K, D].

    Args:
        call: the last call of the forward, on packed prompts.
        layout: of the batch, packed.
        top: [1, N, D], what the call returned.
        cotangents_KBD: [K, B, D].
        chunk_size: how many cotangents at a time; None: all at once.

    Raises:
        NotPositionwise: the block cannot be cut like this; pull it back whole.
        StructureChanged: it was cut and returned something else than before.
    """
    opened = open_top(call, layout)
    check_primal(f"the replay of {call.name} at the last positions", opened.rows, layout.last(top))
    return opened.pull(cotangents_KBD, chunk_size)


def pushforward_top(call: BlockCall, layout: Layout, top: Tensor, tangents: Tensor, chunk_size: int | None) -> Tensor:
    """Tangents of the last block's input, [1, N, K, D], to those of the last rows of its output, [K, B, D].

    Arguments and errors as for `pullback_top`.
    """
    what, last = f"the replay of {call.name} at the last positions", layout.last_rows(top.device)
    with weights_ready(call.block):
        moved = push_function(what, _at_last_rows(call, layout), call.hidden, top[:, last], tangents, chunk_size)
    return moved[0].transpose(0, 1)


def _at_last_rows(call: BlockCall, layout: Layout) -> Callable[[Tensor], Tensor]:
    """The block as a function from all rows of its input, [1, N, D], to the last rows of its output, [1, B, D]."""
    last = layout.last_rows(call.hidden.device)
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
    """The same inputs with every tensor that has a row for each of `count` positions reduced to some of them.

    Positions are the second dimension, after a batch of one, or the only one.

    Raises:
        NotPositionwise: a tensor has that size somewhere else.
    """
    if isinstance(inputs, Tensor):
        if not _has_rows(inputs, count):
            return inputs
        return inputs[rows.to(inputs.device)] if inputs.dim() == 1 else inputs[:, rows.to(inputs.device)]
    if isinstance(inputs, dict):
        return {name: at_rows(value, rows, count) for name, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(at_rows(value, rows, count) for value in inputs)
    return inputs


def _has_rows(tensor: Tensor, count: int) -> bool:
    """Whether a tensor has a row for each of `count` positions, after a batch of one or as its only dimension.

    Raises:
        NotPositionwise: it has that size somewhere else.
    """
    if (tensor.dim() == 1 and len(tensor) == count) or (tensor.dim() >= 2 and tensor.shape[:2] == (1, count)):
        return True
    if count in tensor.shape:
        raise NotPositionwise(f"a tensor of shape {tuple(tensor.shape)}")
    return False
