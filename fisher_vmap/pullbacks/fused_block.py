"""Blocks that run, and are pulled back, by a `BlockRule`: which of them may, and what is kept of their forwards.

A block follows a rule only if, on the run's own tokens, it returns to the bit what the rule does. What its forward had
computed then serves the pullback as it is, while there is room to keep it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.blocks import output_of, with_hidden
from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.placement import weights_ready
from fisher_vmap.anatomy.recording import BlockCall, check_primal, hooks
from fisher_vmap.pullbacks.attention_interface import packed_now
from fisher_vmap.pullbacks.block_rule import BlockRule
from fisher_vmap.pullbacks.fused_attention import rotary_call
from fisher_vmap.pullbacks.scratch import Scratch

# Of what forwards compute, how much is kept for the pullback; the blocks that find no room run again.
KEPT_BYTES = {"cpu": 3 * 2**25}
KEPT_SHARE_OF_GPU = 1 / 8  # of the memory that is free
# Where all that the blocks compute is more than so many times as much, nothing is kept: the time saved would be small
# beside the memory, which is what long prompts are short of.
WORTH_KEEPING = 2

Rules = dict[nn.Module, BlockRule]


def proven_blocks(candidates: Mapping[nn.Module, list[BlockRule]], run: Callable[[], object]) -> Rules:
    """For each block the rule that gives what the block gives, on what it sees while `run` runs the model."""
    right: Rules = {}

    def compare(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inner = rotary_call(args, kwargs, next(iter(candidates[block])).projections.head)
        expected = output_of(output)
        if inner is None or expected is None or not isinstance(output, Tensor):
            return
        for rule in candidates[block]:
            try:
                with weights_ready(block):
                    found, _ = rule.forward(inner)
            except (RuntimeError, TypeError, ValueError) as error:  # the parts do not fit together like this
                if is_out_of_memory(error):
                    raise
                continue
            # To the bit: next to a large residual stream a wrong step would look small.
            if torch.equal(found, expected):
                right[block] = rule
                return

    blocks = [block for block, rules in candidates.items() if rules]
    with hooks(*(block.register_forward_hook(compare, with_kwargs=True) for block in blocks)):
        run()
    return right


@contextmanager
def run_by_rules(rules: Rules, calls: list[BlockCall], most: int) -> Iterator[None]:
    """Within the context blocks run by their rules; the last of the calls gets what its block computed, while room is.

    Args:
        rules: of the blocks.
        calls: the list that a recording fills; it has an entry for a call before the block runs.
        most: of how many calls at the beginning of the list anything is kept; the last block is pulled back otherwise.
    """
    room = dict(KEPT_BYTES)
    if torch.cuda.is_available():
        room["cuda"] = int(KEPT_SHARE_OF_GPU * torch.cuda.mem_get_info()[0])

    def by_rule(block: nn.Module, rule: BlockRule) -> Callable[..., Any]:
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            inner = rotary_call(args, kwargs, rule.projections.head)
            if inner is None:
                return own(*args, **kwargs)
            z, kept = rule.forward(inner)
            if calls and calls[-1].block is block and len(calls) <= most:
                device, size = z.device.type, kept.bytes()
                if len(calls) == 1 and size * most > WORTH_KEEPING * room.get(device, 0):
                    room.clear()
                if size <= room.get(device, 0):
                    room[device] -= size
                    calls[-1].kept.append(kept)
            return z

        return forward

    try:
        for block, rule in rules.items():
            block.forward = by_rule(block, rule)  # type: ignore[method-assign]
        yield
    finally:
        for block in rules:
            vars(block).pop("forward", None)


def pullback_by_rule(
    rule: BlockRule, call: BlockCall, expected: Tensor, cotangents: Tensor, chunk_size: int | None, scratch: Scratch
) -> bool:
    """Pull cotangents through one call of a block in place, [1, N, K, D]; False where the rule does not hold for it.

    Args:
        rule: of the block.
        call: the call; what had not been kept of it is computed again.
        expected: [1, N, D], what the call returned.
        cotangents: of its output, changed into those of its input.
        chunk_size: how many cotangents at a time; None: all at once.
        scratch: for what passes through.

    Raises:
        StructureChanged: what the block computed, or computes again, is not what went on from it.
    """
    packed, kept = packed_now(), call.kept[0] if call.kept else None
    if packed is None:
        return False
    if kept is None:
        inner = rotary_call(*with_hidden(call.args, call.kwargs, call.hidden), rule.projections.head)
        if inner is None:
            return False
        _, kept = rule.forward(inner)
    check_primal(f"what {call.name} computed", kept.z, expected)
    G_NKD, K = cotangents[0], cotangents.shape[2]
    if chunk_size is None or chunk_size >= K:
        rule.pullback(call.hidden, kept, G_NKD, packed, scratch)
        return True
    for start in range(0, K, chunk_size):
        piece = G_NKD[:, start : start + chunk_size].contiguous()
        rule.pullback(call.hidden, kept, piece, packed, scratch)
        G_NKD[:, start : start + chunk_size] = piece
    return True
