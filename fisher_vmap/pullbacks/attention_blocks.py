"""What attention's pullback and pushforward share: its kind, its probabilities, and queries in blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_vmap.pullbacks.ragged import Group

# Elements of dP in one block of queries: small enough for a CPU's cache, large enough to keep a GPU busy.
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}


@dataclass(frozen=True)
class AttentionKind:
    """What an attention does beside the tensors.

    A dataclass and not a tuple: functorch takes tuples apart and would treat its fields as inputs.

    Attributes:
        scale: of the scores.
        causal: whether, without a mask, position t sees keys up to t + S - T only.
        groups: where prompts are packed end to end, the prompts in groups; none sees another's positions.
        one_query: with groups: there is one query a prompt, [1, H, B, E], which sees all keys of its prompt.
    """

    scale: float
    causal: bool
    groups: tuple[Group, ...] | None = None
    one_query: bool = False

    def alone(self) -> "AttentionKind":
        """The same within one prompt."""
        return AttentionKind(self.scale, self.causal)


def probabilities(
    q: Tensor, k_BGSE: Tensor, mask: Tensor | None, kind: AttentionKind, start: int, stop: int, ahead: int
) -> Tensor:
    """P of a block of queries, [B, H, t, S], in the dtype of q; the scores and the softmax in float32.

    Without a mask query t of a causal attention sees the keys up to t + `ahead`.
    """
    B, H, _, E = q.shape
    G, S = k_BGSE.shape[1], k_BGSE.shape[2]
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    q_rows = q[:, :, start:stop].reshape(B, G, -1, E).to(score_dtype)
    scores = (q_rows @ k_BGSE.to(score_dtype).mT).view(B, H, stop - start, S).mul_(kind.scale)
    if mask is not None:
        block = mask[..., start:stop, :] if mask.shape[-2] != 1 else mask
        if block.dtype == torch.bool:
            scores.masked_fill_(~block, -torch.inf)
        else:
            scores += block
    elif kind.causal:
        last_key = torch.arange(start, stop, device=q.device) + ahead
        scores.masked_fill_(torch.arange(S, device=q.device) > last_key[:, None], -torch.inf)
    return scores.softmax(-1).to(q.dtype)


def keys_seen(keys: int, all_keys: int) -> int:
    """How many keys to take for a block of queries that sees so many.

    A few more are taken, so that blocks share their sizes: for every new size of a product the CPU's library makes a
    program, which it keeps, and a long prompt's would take more memory than its tensors.
    """
    step = max(32, all_keys // 16)
    return min(all_keys, -(-keys // step) * step)


def query_blocks(T: int, elements_a_query: int, device: torch.device) -> list[tuple[int, int]]:
    """Blocks of queries for which dP stays below the device's limit."""
    limit = BLOCK_ELEMENTS.get(device.type, 2**24)
    size = max(16, limit // max(1, elements_a_query))
    return [(start, min(start + size, T)) for start in range(0, T, size)]
