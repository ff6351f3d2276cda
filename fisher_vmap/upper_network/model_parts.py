"""The parts of a model, as the probe found them: what the forms of the kernel are given to work with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fisher_vmap.anatomy.old_functions import OldFunction
from fisher_vmap.head import UnembeddingHead
from fisher_vmap.pullbacks.fused import Forward
from fisher_vmap.pullbacks.fused_block import Rules
from fisher_vmap.upper_network.top_block import Places


@dataclass(frozen=True)
class Parts:
    """What there is in a model, and what may be done with it.

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
