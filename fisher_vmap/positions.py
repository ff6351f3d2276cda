"""From a cotangent at every position to the score: the bias is one vector, so its gradient is a sum over positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.layout import Layout


class Summed(NamedTuple):
    """A layer's share of the scores: gradients [B, K, D] and position energy [B, T]."""

    gradients: Tensor
    energy: Tensor


def position_mask(positions: str | Tensor, layout: Layout) -> Tensor | None:
    """[B, T] of 0 and 1, where the bias is added; None for every position.

    Args:
        positions: "all", "last" (the last real token), or a mask [B, width] in the caller's columns.
        layout: the batch.

    Raises:
        ValueError: neither of these, or a mask that is zero on a whole prompt.
    """
    if isinstance(positions, Tensor):
        if positions.shape != (len(layout.lengths), layout.width):
            raise ValueError(
                f"positions has shape {tuple(positions.shape)}; expected that of input_ids, "
                f"{(len(layout.lengths), layout.width)}"
            )
        mask_BT = layout.from_caller((positions.to(layout.input_ids.device) != 0).float())
        if not bool(mask_BT.any(1).all()):
            raise ValueError("positions selects no real token of some prompt; give at least one for each")
        return mask_BT
    if positions == "last":
        T = layout.input_ids.shape[1]
        at_T = torch.arange(T, device=layout.lengths.device)
        return (at_T == layout.lengths[:, None] - 1).float()
    if positions != "all":
        raise ValueError(f"positions is {positions!r}; expected 'all', 'last' or a mask [B, T]")
    return None


def sum_positions(cotangents_KBTD: Tensor, norm_KB: Tensor, probs_BK: Tensor, mask_BT: Tensor | None) -> Summed:
    """Sum over the biased positions, in float32, and undo the scaling of the cotangents.

    Args:
        cotangents_KBTD: [K, B, T, D] in the model's dtype, zero at padding.
        norm_KB: [K, B], what the cotangents had been divided by.
        probs_BK: [B, K], the weights of the energy.
        mask_BT: where the bias is added; None for everywhere.
    """
    device, wide = cotangents_KBTD.device, torch.promote_types(cotangents_KBTD.dtype, norm_KB.dtype)
    norm_KB, probs_BK = norm_KB.to(device, wide), probs_BK.to(device, wide)
    length_KBT = torch.linalg.vector_norm(cotangents_KBTD, dim=-1, dtype=wide)
    if mask_BT is not None:
        mask_BT = mask_BT.to(device)
        cotangents_KBTD = cotangents_KBTD * mask_BT.to(cotangents_KBTD.dtype)[None, :, :, None]
        length_KBT = length_KBT * mask_BT
    gradients_KBD = cotangents_KBTD.sum(2, dtype=wide) * norm_KB[:, :, None]
    energy_BT = torch.einsum("kbt,kb,bk->bt", length_KBT**2, norm_KB**2, probs_BK)
    return Summed(gradients_KBD.transpose(0, 1).contiguous(), energy_BT)
