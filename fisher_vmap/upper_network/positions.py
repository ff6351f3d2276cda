"""From a cotangent at every position to the score: the bias is one vector, so its gradient is a sum over positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.anatomy.arguments import check_tensor
from fisher_vmap.anatomy.layout import Layout


class Summed(NamedTuple):
    """A layer's share of the scores: gradients [B, K, D] and the position energy of each row, [N]."""

    gradients: Tensor
    energy: Tensor


def position_mask(positions: str | Tensor, layout: Layout) -> Tensor | None:
    """[N] of 0 and 1, the rows where the bias is added; None for every one.

    Args:
        positions: "all", "last" (the last real token), or a mask [B, width] in the caller's columns.
        layout: the batch.

    Raises:
        ValueError: neither of these, or a mask that is zero on a whole prompt.
    """
    if isinstance(positions, Tensor):
        expected = (len(layout.lengths), layout.width)
        if positions.shape != expected:
            raise ValueError(f"positions has shape {tuple(positions.shape)}; expected that of input_ids, {expected}")
        mask_N = layout.from_caller((positions.to(layout.device) != 0).float())
        if not bool(layout.to_caller(mask_N).any(1).all()):
            raise ValueError("positions selects no real token of some prompt; give at least one for each")
        return mask_N
    if not isinstance(positions, str):
        check_tensor("positions", positions, "[B, T], or 'all' or 'last'")
    if positions == "last":
        mask_N = torch.zeros(layout.input_ids.numel(), device=layout.device)
        mask_N[layout.last_rows(layout.device)] = 1
        return mask_N
    if positions != "all":
        raise ValueError(f"positions is {positions!r}; expected 'all', 'last' or a mask [B, T]")
    return None


def sum_positions(
    cotangents: Tensor, layout: Layout, norm_KB: Tensor, probs_BK: Tensor, mask_N: Tensor | None
) -> Summed:
    """Sum over each prompt's biased positions, in float32, and undo the scaling of the cotangents.

    Args:
        cotangents: [b, T, K, D] in the model's dtype, zero at padding.
        layout: of the batch.
        norm_KB: [K, B], what the cotangents had been divided by.
        probs_BK: [B, K], the weights of the energy.
        mask_N: [N], where the bias is added; None for everywhere.
    """
    device, wide = cotangents.device, torch.promote_types(cotangents.dtype, norm_KB.dtype)
    norm_BK, weight_BK = norm_KB.T.to(device, wide), probs_BK.to(device, wide)
    cotangents_NKD = cotangents.flatten(0, 1)
    if mask_N is not None:
        cotangents_NKD = cotangents_NKD * mask_N.to(device, cotangents.dtype)[:, None, None]
    gradients_BKD = layout.sum_prompts(cotangents_NKD, wide) * norm_BK[:, :, None]
    squared_NK = torch.linalg.vector_norm(cotangents_NKD, dim=-1, dtype=wide) ** 2
    weight_BK = weight_BK * norm_BK**2
    energy_N = squared_NK.new_zeros(len(squared_NK))
    for b, (first, stop) in enumerate(layout.ranges()):
        energy_N[first:stop] = squared_NK[first:stop] @ weight_BK[b]
    return Summed(gradients_BKD, energy_N)


def energy_of_one(
    cotangents: Tensor,
    layout: Layout,
    norm_KB: Tensor,
    combination_BK: Tensor,
    weight_B: Tensor,
    mask_N: Tensor | None,
) -> Tensor:
    """The energy of each row, [N], of one more cotangent a prompt, which is a combination of those that were pulled.

    Args:
        cotangents: [b, T, K, D], as for `sum_positions`.
        layout: of the batch.
        norm_KB: [K, B].
        combination_BK: [B, K].
        weight_B: [B], its weight.
        mask_N: [N], where the bias is added; None for everywhere.
    """
    device, wide = cotangents.device, torch.promote_types(cotangents.dtype, norm_KB.dtype)
    cotangents_NKD = cotangents.flatten(0, 1)
    factor_BK = (combination_BK.to(norm_KB.device) * norm_KB.T).to(device, wide)
    energy_N = cotangents_NKD.new_zeros(len(cotangents_NKD), dtype=wide)
    for b, (first, stop) in enumerate(layout.ranges()):
        row_nD = torch.einsum("nkd,k->nd", cotangents_NKD[first:stop].to(wide), factor_BK[b])
        energy_N[first:stop] = row_nD.square().sum(1) * weight_B[b].to(device, wide)
    return energy_N if mask_N is None else energy_N * mask_N.to(device, wide)
