"""Is the chain of blocks whole? An exact answer, by which tensors can be reached and not by how large they are.

The layerwise form holds where a block's output depends on the bias only through its own input. In one forward with
gradients every block's output is cut off and replaced by a leaf of its own. A later output that can reach any leaf but
the one just below it has another way to the bias: keys and values shared between blocks, a residual that skips a block.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.blocks import forward_inputs, output_of, with_output
from fisher_vmap.anatomy.placement import saved_aside
from fisher_vmap.anatomy.recording import hooks

Reach = list[set[int]]


def block_reach(model: nn.Module, blocks: Mapping[str, nn.Module], input_ids: Tensor) -> Reach:
    """For each block call, and last for the logits: the numbers of the block calls whose output it can reach directly.

    Args:
        model: the causal LM.
        blocks: its decoder blocks by name.
        input_ids: [B, T] int64; a few short prompts, since structure does not depend on them.

    Returns:
        One set for each call in the order of the forward, and one for the logits. In a plain chain, entry i is {i - 1}.
    """
    leaves: list[Tensor] = []
    outputs: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output_of(output)
        assert hidden is not None
        outputs.append(hidden)
        leaves.append(hidden.detach().clone().requires_grad_())
        return with_output(output, leaves[-1].clone())  # a copy: what comes next may write into it

    with (
        torch.enable_grad(),
        saved_aside(model),
        hooks(*(block.register_forward_hook(cut) for block in blocks.values())),
    ):
        outputs.append(model(**forward_inputs(model, input_ids)).logits)
        return [_reached(output, leaves) for output in outputs]


def _reached(output: Tensor, leaves: Sequence[Tensor]) -> set[int]:
    if not output.requires_grad:
        return set()
    grads = torch.autograd.grad(output.float().sum(), leaves, retain_graph=True, allow_unused=True)
    return {i for i, grad in enumerate(grads) if grad is not None}


def chain_is_whole(reach: Reach, hooked_call: int) -> bool:
    """Whether a bias at the output of that block call travels up from block to block and no other way."""
    return all({j for j in reach[i] if j >= hooked_call} == {i - 1} for i in range(hooked_call + 1, len(reach)))
